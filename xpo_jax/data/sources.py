"""From a source, as a config names it, to its rows.

    "my/train.jsonl", "my/*.parquet"     a file or a glob: jsonl, json, csv, tsv, txt, parquet
    "my/folder"                          saved by `datasets.save_to_disk`, or shards in parquet
    "embedded:train"                     the package's own prompts; "embedded:held_out"
    "package.module:Name"                your own: called without arguments, it returns mappings
    {"hf": "owner/name", "split": "train", "config": ..., "revision": ...}
                                         a Hugging Face data set; config and revision are optional
    [source, source]                     concatenated
    {"sources": [...], "weights": [...], "seed": 0}
                                         mixed

Why not Hugging Face `datasets` for all of these (`load_dataset`, `interleave_datasets`): its readers parse a file as a
whole into one typed table, so an error could not name file and row, on_bad_row = "skip" could not skip one broken line,
and a large file would first be copied into its cache. Its streams (`IterableDataset.state_dict`) resume by skipping to
a saved position, whereas a batch here is random access by step. It reads what it is best at: data sets on the hub.

Left out on purpose: code that a data set brings, which is never run, and streaming over the network.
"""

from __future__ import annotations

import glob
import importlib.resources
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import grain
import numpy as np

from xpo_jax.config import schema
from xpo_jax.data import folders, formats
from xpo_jax.data.rows import Row, Rows, SourceError
from xpo_jax.io.copies import copied
from xpo_jax.io.user_paths import expand

Source = str | Sequence[str | Mapping[str, Any]] | Mapping[str, Any]

_EMBEDDED = {"embedded:train": "train.jsonl", "embedded:held_out": "held_out.jsonl"}
_LITERAL = re.compile(r"\{|\[\s*['\"{]")  # a glob may begin with a bracket, too
_CUSTOM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def open_rows(source: Source) -> Rows:
    """Return the rows of a source, with random access.

    Args:
      source: see above; the matches of a glob are sorted.

    Returns:
      At least one row.

    Raises:
      SourceError: a source that is unreadable or has no rows, or a glob without a match.
    """
    if isinstance(source, Mapping):
        if "sources" in source:
            return Mixed(**_fields(source, {"sources", "weights"}, {"seed"}))
        return _hf(**_fields(source, {"hf", "split"}, {"config", "revision"}))
    if not isinstance(source, str):
        if not source:
            raise SourceError("the list of sources is empty; name at least one")
        parts = [open_rows(part) for part in source]
        return parts[0] if len(parts) == 1 else Concatenated(parts)
    source = expand(source)
    if _LITERAL.match(source) and not os.path.exists(source):
        raise SourceError(
            f"{source}: is a list or mapping as text; write it in a config, because on the command line a source is a"
            " path, a glob or a name"
        )
    if source.startswith("embedded:"):
        return _embedded(source)
    if _CUSTOM.fullmatch(source) and not os.path.exists(source):
        return _custom(source)
    if os.path.isdir(source):
        return _folder(source)
    if os.path.exists(source) or not glob.has_magic(source):
        return formats.read(source, Path(source))
    matches = sorted(glob.glob(source, recursive=True))
    if not matches:
        raise SourceError(f"{source}: no file matches in {Path.cwd()}; correct the pattern")
    return open_rows(matches)


def read_rows(source: Source) -> list[Row]:
    """Return all rows of a source, in memory.

    Raises:
      DataError: as `open_rows`, and for the first unreadable row.
    """
    rows = open_rows(source)
    return [rows[index] for index in range(len(rows))]


def source_name(source: Source) -> str:
    """Return the source's name for errors."""
    if isinstance(source, str):
        return source
    if isinstance(source, Mapping):
        return source_name(source["sources"]) if "sources" in source else f"hf {source.get('hf')}"
    return ", ".join(source_name(part) for part in source)


class Concatenated:
    """Sources one after another."""

    def __init__(self, parts: Sequence[Rows]):
        """Store the arguments."""
        self._parts, self._ends = parts, np.array(list(accumulate(map(len, parts))))
        self.identity = tuple(entry for part in parts for entry in part.identity)

    def __len__(self) -> int:
        """Count the rows of all sources."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        """Return one row."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - int(self._ends[part]) + len(self._parts[part])]


class Mixed:
    """Sources mixed by weight, without repeating a row, until one source is exhausted.

    The rows of each source, and their order, are functions of the seed; no permutation is stored.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float], seed: int = 0):
        """Check and open the sources; as many weights above 0, of any sum; seed from 0 to 2^32 - 1."""
        lists = isinstance(sources, list | tuple) and isinstance(weights, list | tuple)
        if not lists or len(sources) != len(weights) or len(weights) < 2:
            raise SourceError("sources and weights: must be two lists of the same length, at least 2")
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
                raise SourceError(f"weights: must be numbers above 0, got {weight!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise SourceError(f"seed of a mixture: must be from 0 to {2**32 - 1}, got {seed!r}")
        self._parts = [open_rows(source) for source in sources]
        shuffled = [
            grain.MapDataset.source(range(len(part)))
            .seed((seed + i) % 2**32)
            .shuffle()
            .map(partial(_pair, i))
            for i, part in enumerate(self._parts)
        ]
        self._order = grain.MapDataset.mix(shuffled, [weight / sum(weights) for weight in weights])
        self.identity = tuple(entry for part in self._parts for entry in part.identity)

    def __len__(self) -> int:
        """Count the rows until one source is exhausted."""
        return len(self._order)

    def __getitem__(self, index: int) -> Row:
        """Return one row."""
        part, row = self._order[index]
        return self._parts[part][row]


def _pair(part: int, row: int) -> tuple[int, int]:
    return part, row


def _fields(source: Mapping[str, Any], required: set[str], optional: set[str]) -> dict[str, Any]:
    """Return the mapping after checking that it has the required fields and no unknown ones."""
    missing, unknown = required - set(source), set(source) - required - optional
    if missing or unknown:
        raise SourceError(
            f"a source must have {', '.join(sorted(required))} and may have {', '.join(sorted(optional))};"
            f" got {', '.join(source) or 'nothing'}"
        )
    return dict(source)


def _embedded(name: str) -> Rows:
    if name not in _EMBEDDED:
        raise SourceError(f"{name}: no such embedded prompts; name one of {', '.join(_EMBEDDED)}")
    with importlib.resources.as_file(importlib.resources.files("xpo_jax") / "embedded" / "prompts") as folder:
        return formats.read(name, folder / _EMBEDDED[name])


def _folder(name: str) -> Rows:
    rows = folders.saved(name)
    if rows is not None:
        return rows
    parts = [formats.read(file, Path(file)) for file in folders.shards(name)]
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def _custom(name: str) -> Rows:
    factory = schema.resolve(name, "data source", {})
    try:
        rows = factory()
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, Mapping):
            rows = [copied(row) for row in rows]  # a generator may yield the same mapping again
        count = len(rows)
    except Exception as error:  # the user's code, which can fail in any way
        raise SourceError(
            f"{name}: must return rows when called without arguments: {schema.reason(error)}"
        ) from error
    if not count:
        raise SourceError(f"{name}: returned no rows; return at least one mapping")
    return formats.RowsOfSequence(name, rows, {"source": name, "rows": count})


def _hf(hf: Any, split: Any, config: Any = None, revision: Any = None) -> Rows:
    """Load a Hugging Face data set into the local cache of `datasets`, memory-mapped; its code is never run."""
    for field, value in {"hf": hf, "split": split, "config": config, "revision": revision}.items():
        if not isinstance(value, str) and not (value is None and field in ("config", "revision")):
            raise SourceError(f"{field} of a Hugging Face data set: must be text, got {value!r}")
    import datasets  # takes 1.4 s

    name = f"hf {hf}" + (f" {config}" if config else "") + f" {split}"
    try:
        data = datasets.load_dataset(hf, config, split=split, revision=revision)
        count = len(data)
    except Exception as error:  # network, hub and file formats each have their own exceptions
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            raise SourceError(
                f"{name}: the cache of data sets cannot be used ({error.filename}: {error.strerror}); set HF_HOME to a"
                " folder that can be written, with enough space"
            ) from error
        reason = re.sub(r"\w+://\S+", "(address)", schema.reason(error))[:300]  # addresses may be signed
        raise SourceError(
            f"{name}: cannot be loaded: {reason}; check name, config, split and revision"
        ) from error
    if not count:
        raise SourceError(f"{name}: the split is empty; choose another")
    files = " ".join(getattr(data.info, "download_checksums", None) or ())
    commits = sorted(set(re.findall(r"@([0-9a-f]{40})/", files)))
    identity = {
        "hf": hf,
        "config": config,
        "split": split,
        "revision": revision,
        "commits": commits,
        "rows": count,
    }
    return formats.RowsOfSequence(name, data, identity)
