"""From one file to its rows: jsonl, json, csv, text (one prompt a line, in the column "text") and parquet.

jsonl and text may be of any size: only where each line begins is held in memory, and a line is read when it is
asked for. The others are held whole, parquet in Arrow's compact form. Left out: compressed and remote files,
other separators than the comma, other encodings than UTF-8.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xpo_jax.data.indexed_lines import CHUNK, MARK, Lines
from xpo_jax.data.rows import DataError, Row, Rows, SourceError
from xpo_jax.io.text import one_line, shorten


def read(name: str, path: Path) -> Rows:
    """The rows of one file, in its order.

    Args:
      name: of the file, for errors.
      path: its ending says what it is: .jsonl, .json, .csv, .txt or .parquet.

    Returns:
      At least one row.

    Raises:
      SourceError: a file that is missing, unreadable, empty, or not what its ending says.
    """
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise SourceError(f"{name}: this is a directory; write {os.path.join(name, '*.jsonl')} for its files")
    if reader is None and path.exists():
        raise SourceError(
            f"{name}: the ending {path.suffix!r} is of no known kind; convert or rename the file to one of "
            + ", ".join(_READERS)
        )
    try:
        return (reader or _jsonl)(name, path)
    except FileNotFoundError:
        raise SourceError(f"{name}: there is no such file, seen from {Path.cwd()}") from None
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{name}: cannot be read: {reason}") from None


class Listed:
    """Rows that are in memory; a row that could not be read stands there as its error."""

    def __init__(self, rows: Sequence[Row | DataError], identity: Mapping[str, Any]):
        """Args are held as they are."""
        self._rows, self.identity = rows, (identity,)

    def __len__(self) -> int:
        """How many."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """One row, or its error."""
        row = self._rows[index]
        if isinstance(row, DataError):
            raise row
        return row


class Table:
    """Rows behind any sequence of mappings, asked for one by one; what that raises is the row's error."""

    def __init__(self, name: str, sequence: Any, identity: Mapping[str, Any]):
        """`sequence` has a length and gives a mapping for a place from 0."""
        self._name, self._sequence, self.identity = name, sequence, (identity,)

    def __len__(self) -> int:
        """How many."""
        return len(self._sequence)

    def __getitem__(self, index: int) -> Row:
        """One row."""
        at = f"{self._name}, row {index + 1}"
        try:
            values = self._sequence[index]
        except Exception as error:  # a decoder or code of the user's, which can fail in any way
            raise DataError(f"{at}: cannot be read: {_told(error)}") from error
        return row_of(self._name, index + 1, values)


def row_of(name: str, number: int, values: Any) -> Row:
    """A row of a mapping from text to anything; DataError for anything else."""
    at = f"{name}, row {number}"
    if not isinstance(values, Mapping):
        raise DataError(f'{at}: an object is expected, such as {{"text": "..."}}; found {_kind(values)}')
    wrong = [column for column in values if not isinstance(column, str)]
    if wrong:
        raise DataError(f"{at}: a column's name must be text, found {_told(wrong[0])}")
    return Row(name, number, dict(values))


# ------------------------------------------------------------------------------------------------ kinds


def _jsonl(name: str, path: Path) -> Rows:
    return Lines(name, path, _object, "one JSON object")


def _text(name: str, path: Path) -> Rows:
    def parse(line: bytes, at: str) -> dict[str, Any]:
        return {"text": _decoded(line, at).rstrip("\r\n")}

    return Lines(name, path, parse, "one prompt")


def _object(line: bytes, at: str) -> dict[str, Any]:
    values = _parsed(_decoded(line, at), at, "each line holds one object")
    if not isinstance(values, dict):
        raise DataError(f'{at}: a JSON object is expected, such as {{"text": "..."}}; found {_kind(values)}')
    return values


def _json(name: str, path: Path) -> Rows:
    data, identity = _whole(name, path)
    try:
        values = _parsed(_decoded(data, name), name, "the file holds one list of objects")
    except DataError as error:
        raise SourceError(str(error)) from None
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise SourceError(
                f"{name}: an object with exactly one list in it is expected, this one has {len(lists)};"
                " save the list of rows alone"
            )
        values = lists[0]
    if not isinstance(values, list):
        raise SourceError(f"{name}: a list of objects is expected, found {_kind(values)}")
    if not values:
        raise SourceError(f"{name}: the list is empty; at least one object is expected")
    return Listed([_caught(name, i, value) for i, value in enumerate(values, start=1)], identity)


def _csv(name: str, path: Path) -> Rows:
    data, identity = _whole(name, path)
    try:
        text = _decoded(data, name)
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of the whole process; 131,072 letters are too few
        records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except DataError as error:
        raise SourceError(str(error)) from None
    except csv.Error as error:
        raise SourceError(
            f"{name}: not CSV: {error}; separate by commas, and double the quotes in quotes"
        ) from None
    header = records[0] if records else []
    names = {column.strip() for column in header}
    if not header or "" in names or len(names) != len(header):
        raise SourceError(f"{name}, row 1: the header must name each column once, found {_told(header)}")
    rows: list[Row | DataError] = []
    for number, record in enumerate(records[1:], start=2):
        if record and len(record) != len(header):
            rows.append(
                DataError(
                    f"{name}, row {number}: {len(record)} fields, the header has {len(header)}; quote commas"
                )
            )
        elif record:
            columns = (column.strip() for column in header)
            rows.append(Row(name, number, dict(zip(columns, record, strict=True))))
    if not rows:
        raise SourceError(f"{name}: there is no row below the header; add one")
    return Listed(rows, identity)


class _Arrow(NamedTuple):
    """An Arrow table as a sequence of mappings."""

    table: Any

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return self.table.slice(index, 1).to_pylist()[0]


def _parquet(name: str, path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{name}: not Parquet: {_told(error)}; write the file anew") from None
    if not table.num_rows:
        raise SourceError(f"{name}: the file is empty; at least one row is expected")
    return Table(name, _Arrow(table), {"file": name, "bytes": size, "sha256": digest.hexdigest()})


_READERS: dict[str, Callable[[str, Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
}


# ------------------------------------------------------------------------------------------- small parts


def _whole(name: str, path: Path) -> tuple[bytes, dict[str, Any]]:
    data = path.read_bytes()
    if not data.strip():
        raise SourceError(f"{name}: the file is empty")
    identity = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return data.removeprefix(MARK), identity


def _decoded(data: bytes, at: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.rfind(b"\n", 0, error.start) + 1
        raise DataError(
            f"{at}: not UTF-8: byte {data[error.start]:#04x} at position {error.start - line + 1} of the line; "
            "save the file as UTF-8"
        ) from None


def _parsed(text: str, at: str, holds: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{at}: not JSON: {error.msg} at column {error.colno}{line}; {holds}") from None
    except RecursionError:
        raise DataError(f"{at}: nested too deeply") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{at}: not JSON that can be read: {_told(error)}") from None


def _caught(name: str, number: int, values: Any) -> Row | DataError:
    try:
        return row_of(name, number, values)
    except DataError as error:
        return error


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null", dict: "an object"}
    numbers = {int: "a number", float: "a number"}
    return {**names, **numbers}.get(type(value)) or f"a {type(value).__name__}"


def _told(value: object) -> str:
    """On one line, not too long; an error with its type."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else repr(value)
    return shorten(one_line(text), 200)
