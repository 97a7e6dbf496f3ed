"""From what a config calls a source to its rows.

    "my/train.jsonl", "my/*.parquet"     a file or a glob: jsonl, json, csv, txt, parquet
    "embedded:train"                     the package's own prompts; "embedded:held_out"
    "package.module:Name"                your own: called without arguments, it returns mappings
    {"hf": "owner/name", "split": "train", "config": ..., "revision": ...}
                                         a Hugging Face data set; the last two may be left out
    [source, source]                     one after the other
    {"sources": [...], "weights": [...], "seed": 0}
                                         mixed

Left out: code that comes with a data set, which is never run, and streaming over the network.
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
from xpo_jax.data import formats
from xpo_jax.data.rows import Row, Rows, SourceError

Source = str | Sequence[str | Mapping[str, Any]] | Mapping[str, Any]

_EMBEDDED = {"embedded:train": "train.jsonl", "embedded:held_out": "held_out.jsonl"}
_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def open_rows(source: Source) -> Rows:
    """The rows of a source, random access.

    Args:
      source: see above; the matches of a glob are sorted.

    Returns:
      At least one row.

    Raises:
      SourceError: a source that cannot be read or has no rows, a glob without match.
    """
    if isinstance(source, Mapping):
        if "sources" in source:
            return Mixed(**_fields(source, {"sources", "weights"}, {"seed"}))
        return _hf(**_fields(source, {"hf", "split"}, {"config", "revision"}))
    if not isinstance(source, str):
        if not source:
            raise SourceError("the list of prompt files is empty; name at least one")
        parts = [open_rows(part) for part in source]
        return parts[0] if len(parts) == 1 else Joined(parts)
    if source.startswith("{") and not os.path.exists(source):
        raise SourceError(
            f"{source}: there is no such file; lists and mappings stand in a config, on the command line a source is a"
            " path, a glob or a name"
        )
    if source.startswith("embedded:"):
        return _embedded(source)
    if _OWN.fullmatch(source) and not os.path.exists(source):
        return _own(source)
    if os.path.exists(source) or not glob.has_magic(source):
        return formats.read(source, Path(source))
    matches = sorted(glob.glob(source, recursive=True))
    if not matches:
        raise SourceError(f"{source}: no file matches, seen from {Path.cwd()}")
    return open_rows(matches) if len(matches) > 1 else formats.read(matches[0], Path(matches[0]))


def read_rows(source: Source) -> list[Row]:
    """All rows of a source, held in memory.

    Raises:
      DataError: as `open_rows`, and the first row that cannot be read.
    """
    rows = open_rows(source)
    return [rows[index] for index in range(len(rows))]


def named(source: Source) -> str:
    """The source for an error line."""
    if isinstance(source, str):
        return source
    if isinstance(source, Mapping):
        return named(source["sources"]) if "sources" in source else f"hf {source.get('hf')}"
    return ", ".join(named(part) for part in source)


class Joined:
    """Sources one after the other."""

    def __init__(self, parts: Sequence[Rows]):
        """Args are held as they are."""
        self._parts, self._ends = parts, np.array(list(accumulate(map(len, parts))))
        self.identity = tuple(each for part in parts for each in part.identity)

    def __len__(self) -> int:
        """Rows of all."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        """One row."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - int(self._ends[part]) + len(self._parts[part])]


class Mixed:
    """Sources mixed by weight: no row twice, as many as there are until one source is used up.

    Which rows of each are taken, and in which order, is drawn from the seed; nothing is laid down in memory.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float], seed: int = 0):
        """`sources` are sources, `weights` as many numbers above 0, of any sum; seed from 0 to 2^32 - 1."""
        lists = all(isinstance(each, list | tuple) for each in (sources, weights))
        if not lists or len(sources) != len(weights) or len(weights) < 2:
            raise SourceError("sources and weights: two lists of the same length, at least 2, are expected")
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
                raise SourceError(f"weights: numbers above 0 are expected, found {weight!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise SourceError(f"seed of the mixture: 0 to {2**32 - 1} is expected, found {seed!r}")
        self._parts = [open_rows(source) for source in sources]
        drawn = [
            grain.MapDataset.source(range(len(part)))
            .seed((seed + i) % 2**32)
            .shuffle()
            .map(partial(_pair, i))
            for i, part in enumerate(self._parts)
        ]
        self._places = grain.MapDataset.mix(drawn, [weight / sum(weights) for weight in weights])
        self.identity = tuple(each for part in self._parts for each in part.identity)

    def __len__(self) -> int:
        """Rows until one source is used up."""
        return len(self._places)

    def __getitem__(self, index: int) -> Row:
        """One row."""
        part, place = self._places[index]
        return self._parts[part][place]


def _pair(part: int, place: int) -> tuple[int, int]:
    return part, place


def _fields(source: Mapping[str, Any], wanted: set[str], optional: set[str]) -> dict[str, Any]:
    """The mapping, if it has what is wanted and nothing unknown."""
    missing, unknown = wanted - set(source), set(source) - wanted - optional
    if missing or unknown:
        raise SourceError(
            f"a source has {', '.join(sorted(wanted))} and may have {', '.join(sorted(optional))};"
            f" found {', '.join(source) or 'nothing'}"
        )
    return dict(source)


def _embedded(name: str) -> Rows:
    if name not in _EMBEDDED:
        raise SourceError(f"{name}: there is no such file; the package's own are {', '.join(_EMBEDDED)}")
    with importlib.resources.as_file(importlib.resources.files("xpo_jax") / "embedded" / "prompts") as folder:
        return formats.read(name, folder / _EMBEDDED[name])


def _own(name: str) -> Rows:
    factory = schema.resolve(name, "data source", {})
    try:
        made = factory()
        if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")) or isinstance(made, Mapping):
            made = list(made)
        count = len(made)
    except Exception as error:  # code of the user's, which can fail in any way
        raise SourceError(
            f"{name}: called without arguments it must return rows: {schema.reason(error)}"
        ) from error
    if not count:
        raise SourceError(f"{name}: it returned no rows; return at least one mapping")
    return formats.Table(name, made, {"source": name, "rows": count})


def _hf(hf: Any, split: Any, config: Any = None, revision: Any = None) -> Rows:
    """A Hugging Face data set, in the local cache of `datasets`, memory-mapped; code of it is never run."""
    for field, value in {"hf": hf, "split": split, "config": config, "revision": revision}.items():
        if not isinstance(value, str) and not (value is None and field in ("config", "revision")):
            raise SourceError(f"{field} of a Hugging Face data set: text is expected, found {value!r}")
    import datasets  # takes 1.4 s

    name = f"hf {hf}" + (f" {config}" if config else "") + f" {split}"
    try:
        data = datasets.load_dataset(hf, config, split=split, revision=revision)
        count = len(data)
    except Exception as error:  # of the network, the hub, the file formats: each has its own kinds
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
    return formats.Table(name, data, identity)
