"""Folders that are one data set: saved by `datasets.save_to_disk`, or shards in parquet.

Left out on purpose: folders of other files, for which a glob states what is meant.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from xpo_jax.data import formats
from xpo_jax.data.indexed_lines import CHUNK
from xpo_jax.data.rows import Rows, SourceError
from xpo_jax.io.text import error_line, shorten

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def saved(name: str) -> Rows | None:
    """Return the rows of a folder that `save_to_disk` has written, memory-mapped; None if it is no such folder.

    Raises:
      SourceError: it holds several splits, or cannot be read.
    """
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(
                f"{name}: dataset_dict.json cannot be read: {error_line(error)}; save it again"
            ) from None
        raise SourceError(
            f"{name}: holds the splits {', '.join(splits)}; write {os.path.join(name, splits[0])}"
        )
    if not (folder / "state.json").is_file():
        return None
    import datasets  # takes 1.4 s

    try:
        data = datasets.load_from_disk(name).with_format(None)
        files = [
            entry["filename"] for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]
        ]
        identity: dict[str, Any] = {"folder": name, "rows": len(data), "sha256": _digest(folder, files)}
    except Exception as error:  # of Arrow, of JSON, of the file system
        raise SourceError(
            f"{name}: cannot be loaded: {shorten(error_line(error), 200)}; save the data set again"
        ) from error
    if not len(data):
        raise SourceError(f"{name}: the data set is empty; add at least one row")
    return formats.RowsOfSequence(name, data, identity)


def shards(name: str) -> list[str]:
    """Return the parquet files of a folder and its subfolders, sorted.

    Raises:
      SourceError: there are none; they are of several splits; or some are missing.
    """
    files = sorted(
        path for path in Path(name).rglob("*.parquet") if not any(part[0] == "." for part in path.parts[1:])
    )
    if not files:
        if not any(Path(name).iterdir()):
            raise SourceError(f"{name}: is an empty folder; name one with files")
        raise SourceError(f"{name}: is a directory; write {os.path.join(name, '*.jsonl')} for its files")
    counts: Counter[tuple[Path, str, int]] = Counter()
    for path in files:
        match = _SHARD.fullmatch(path.stem)
        prefix = match[1] if match else path.stem if path.stem in _SPLITS else ""
        counts[path.parent, prefix, int(match[3]) if match else 0] += 1
    patterns = {os.path.join(parent, f"{prefix}*.parquet") for parent, prefix, _ in counts}
    if len(patterns) > 1:
        raise SourceError(
            f"{name}: holds more than one split or data set; write one of {', '.join(sorted(patterns))}"
        )
    for (parent, prefix, total), count in counts.items():
        if total and count != total:
            raise SourceError(
                f"{name}: holds {count} of the {total} shards of {parent / prefix}; complete the download, or write"
                f" {os.path.join(parent, '*.parquet')} for those that are here"
            )
    return [str(path) for path in files]


def _digest(folder: Path, files: list[str]) -> str:
    """Return a SHA-256 of the content of some files."""
    digest = hashlib.sha256()
    for file in files:
        with open(folder / file, "rb") as content:
            while chunk := content.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
