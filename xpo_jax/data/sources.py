"""Rows from jsonl files: one file, a list of files, a glob, or the package's own prompts.

Everything is read at once and held in memory (tens of thousands of rows are meant), so that every row is
checked before a run starts. Left out: other formats, compressed files, remote files, streaming.
"""

from __future__ import annotations

import glob
import importlib.resources
import json
import os
from collections.abc import Sequence
from pathlib import Path

from xpo_jax.data.rows import DataError, Row

_EMBEDDED = {"embedded:train": "train.jsonl", "embedded:held_out": "held_out.jsonl"}


def read_rows(source: str | Sequence[str]) -> list[Row]:
    """Reads all rows of one or several jsonl files, in the order of the files and their lines.

    Args:
      source: a path, a glob (its matches are sorted), "embedded:train" or "embedded:held_out" for the
        package's own prompts, or a list of these.

    Returns:
      At least one row; blank lines are passed over, but counted in the row numbers.

    Raises:
      DataError: a missing, unreadable or empty file, a glob without match, and a line that is not a JSON
        object in UTF-8.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError("the list of prompt files is empty; name at least one")
    return [row for name in sources for file in _files(name) for row in _read(file)]


def _files(name: str) -> list[str]:
    """The files that one name stands for."""
    if name in _EMBEDDED or os.path.exists(name) or not glob.has_magic(name):
        return [name]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise DataError(f"{name}: no file matches, seen from {Path.cwd()}")
    return matches


def _read(file: str) -> list[Row]:
    rows = []
    # split at \n alone: JSON strings may hold the other line separators that splitlines() knows
    for number, line in enumerate(_bytes(file).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        at = f"{file}, row {number}"
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{at}: not UTF-8: byte {line[error.start]:#04x} at position {error.start + 1} of the line; "
                f"save the file as UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{at}: not JSON: {error.msg} at column {error.colno}; each line holds one object"
            ) from None
        except RecursionError:
            raise DataError(f"{at}: nested too deeply") from None
        if not isinstance(values, dict):
            raise DataError(
                f'{at}: a JSON object is expected, such as {{"text": "..."}}; found {_kind(values)}'
            )
        rows.append(Row(file, number, values))
    if not rows:
        raise DataError(f"{file}: the file is empty; one JSON object per line is expected")
    return rows


def _bytes(file: str) -> bytes:
    try:
        if file in _EMBEDDED:
            prompts = importlib.resources.files("xpo_jax") / "embedded" / "prompts"
            return (prompts / _EMBEDDED[file]).read_bytes()
        return Path(file).read_bytes()
    except FileNotFoundError:
        if file.startswith("embedded:"):
            raise DataError(
                f"{file}: there is no such file; the package's own are {', '.join(_EMBEDDED)}"
            ) from None
        raise DataError(f"{file}: there is no such file, seen from {Path.cwd()}") from None
    except IsADirectoryError:
        raise DataError(
            f"{file}: this is a directory; write {os.path.join(file, '*.jsonl')} for its files"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
