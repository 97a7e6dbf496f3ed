"""From one file to its rows: jsonl, json, csv, tsv, txt (one prompt per line, in the column "text") and parquet.

All but parquet may be compressed: compression.py.

jsonl and txt may be of any size: memory holds only where each line begins, and a line is read on access. The other
formats are held in memory, parquet in Arrow's compact form.

Left out on purpose: remote files, separators other than comma and tab, encodings other than UTF-8.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from xpo_jax.data.compression import SUFFIXES, Decompressed
from xpo_jax.data.indexed_lines import BYTE_ORDER_MARK, CHUNK, IndexedLines
from xpo_jax.data.rows import DataError, Row, Rows, SourceError
from xpo_jax.io.copies import copied
from xpo_jax.io.text import one_line, shorten


def read(name: str, path: Path) -> Rows:
    """Return the rows of one file, in file order.

    Args:
      name: of the file, for errors.
      path: its extension determines the format: .jsonl, .json, .csv, .tsv, .txt or .parquet; all but the last may be
        followed by .gz, .zst, .bz2 or .xz.

    Returns:
      At least one row.

    Raises:
      SourceError: the file is missing, unreadable, empty, or not of the format that its extension names.
    """
    compressed = path.suffix.lower() in SUFFIXES
    suffix = (Path(path.stem) if compressed else path).suffix.lower()
    reader = None if compressed and suffix == ".parquet" else _READERS.get(suffix)
    if path.is_dir():
        raise SourceError(f"{name}: is a directory; write {os.path.join(name, '*.jsonl')} for its files")
    if reader is None and path.exists():
        raise SourceError(
            f"{name}: the extension {''.join(path.suffixes[-1 - compressed :])!r} is unknown; convert or rename the"
            f" file to one of {', '.join(_READERS)}, all but the last also with {', '.join(SUFFIXES)}"
        )
    try:
        return Decompressed(name, path, reader) if compressed and reader else (reader or _jsonl)(name, path)
    except FileNotFoundError:
        raise SourceError(f"{name}: no such file in {Path.cwd()}; correct the path") from None
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{name}: cannot be read: {reason}; check the file and its permissions") from None


class RowsInMemory:
    """Rows held in memory; a row that could not be read is stored as its error, and reading it raises that."""

    def __init__(self, rows: Sequence[Row | DataError], identity: Mapping[str, Any]):
        """Store the arguments."""
        self._rows, self.identity = rows, (identity,)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Return one row, or raise its error."""
        row = self._rows[index]
        if isinstance(row, DataError):
            raise row
        return row


class RowsOfSequence:
    """The rows of any sequence of mappings, read one by one; an exception from it becomes the row's DataError."""

    def __init__(self, name: str, sequence: Any, identity: Mapping[str, Any]):
        """Store the arguments; `sequence` has `__len__`, and `__getitem__` from 0 that returns a mapping."""
        self._name, self._sequence, self.identity = name, sequence, (identity,)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._sequence)

    def __getitem__(self, index: int) -> Row:
        """Return one row."""
        at = f"{self._name}, row {index + 1}"
        try:
            values = self._sequence[index]
        except Exception as error:  # a decoder, or the user's code, which can fail in any way
            raise DataError(f"{at}: cannot be read: {_one_line(error)}; fix the source") from error
        return make_row(self._name, index + 1, values)


def make_row(name: str, number: int, values: Any) -> Row:
    """Make a row of a copy of a mapping with text keys; raise DataError for anything else."""
    at = f"{name}, row {number}"
    if not isinstance(values, Mapping):
        raise DataError(f'{at}: must be an object, such as {{"text": "..."}}; got {_kind(values)}')
    not_text = [column for column in values if not isinstance(column, str)]
    if not_text:
        raise DataError(f"{at}: a column's name must be text, got {_one_line(not_text[0])}")
    try:
        return Row(name, number, copied(values))
    except RecursionError:
        raise DataError(f"{at}: nested too deeply; flatten it") from None


# ---------------------------------------------------------------------------------------------- formats


def _jsonl(name: str, path: Path) -> Rows:
    return IndexedLines(name, path, _object, "one JSON object")


def _text(name: str, path: Path) -> Rows:
    def parse(line: bytes, at: str) -> dict[str, Any]:
        return {"text": _decoded(line, at).rstrip("\r\n")}

    return IndexedLines(name, path, parse, "one prompt")


def _object(line: bytes, at: str) -> dict[str, Any]:
    values = _parsed(_decoded(line, at), at, "write one object per line")
    if not isinstance(values, dict):
        raise DataError(f'{at}: must be a JSON object, such as {{"text": "..."}}; got {_kind(values)}')
    return values


def _json(name: str, path: Path) -> Rows:
    data, identity = _read_file(name, path)
    try:
        values = _parsed(_decoded(data, name), name, "write one list of objects")
    except DataError as error:
        raise SourceError(str(error)) from None
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise SourceError(
                f"{name}: must be a list of objects, or an object with exactly one list; got {len(lists)}"
                " lists; save the list of rows alone"
            )
        values = lists[0]
    if not isinstance(values, list):
        raise SourceError(f"{name}: must be a list of objects, got {_kind(values)}")
    if not values:
        raise SourceError(f"{name}: the list is empty; add at least one object")
    return RowsInMemory([_row_or_error(name, i, value) for i, value in enumerate(values, start=1)], identity)


def _csv(name: str, path: Path, delimiter: str = ",") -> Rows:
    data, identity = _read_file(name, path)
    try:
        text = _decoded(data, name)
        csv.field_size_limit(
            min(sys.maxsize, 2**31 - 1)
        )  # for the whole process; the default of 131,072 characters is too small
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except DataError as error:
        raise SourceError(str(error)) from None
    except csv.Error as error:
        raise SourceError(
            f"{name}: not {'CSV' if delimiter == ',' else 'TSV'}: {error}; separate fields by"
            f" {'commas' if delimiter == ',' else 'tabs'}, and double the quotes inside quotes"
        ) from None
    header = records[0] if records else []
    names = {column.strip() for column in header}
    if not header or "" in names or len(names) != len(header):
        raise SourceError(f"{name}, row 1: the header must name each column once, got {_one_line(header)}")
    rows: list[Row | DataError] = []
    for number, record in enumerate(records[1:], start=2):
        if record and len(record) != len(header):
            rows.append(
                DataError(
                    f"{name}, row {number}: has {len(record)} fields, the header has {len(header)}; quote"
                    f" {'commas' if delimiter == ',' else 'tabs'}"
                )
            )
        elif record:
            columns = (column.strip() for column in header)
            rows.append(Row(name, number, dict(zip(columns, record, strict=True))))
    if not rows:
        raise SourceError(f"{name}: has no row below the header; add one")
    return RowsInMemory(rows, identity)


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
        raise SourceError(f"{name}: not Parquet: {_one_line(error)}; write the file again") from None
    if not table.num_rows:
        raise SourceError(f"{name}: the file is empty; add at least one row")
    return RowsOfSequence(name, _Arrow(table), {"file": name, "bytes": size, "sha256": digest.hexdigest()})


_READERS: dict[str, Callable[[str, Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".txt": _text,
    ".parquet": _parquet,
}


# ---------------------------------------------------------------------------------------------- helpers


def _read_file(name: str, path: Path) -> tuple[bytes, dict[str, Any]]:
    data = path.read_bytes()
    if not data.strip():
        raise SourceError(f"{name}: the file is empty; add at least one row")
    identity = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return data.removeprefix(BYTE_ORDER_MARK), identity


def _decoded(data: bytes, at: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.rfind(b"\n", 0, error.start) + 1
        raise DataError(
            f"{at}: not UTF-8: byte {data[error.start]:#04x} at position {error.start - line + 1} of the line; "
            "save the file as UTF-8"
        ) from None


def _parsed(text: str, at: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{at}: not JSON: {error.msg} at column {error.colno}{line}; {remedy}") from None
    except RecursionError:
        raise DataError(f"{at}: nested too deeply; flatten it") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{at}: unreadable JSON: {_one_line(error)}; {remedy}") from None


def _row_or_error(name: str, number: int, values: Any) -> Row | DataError:
    try:
        return make_row(name, number, values)
    except DataError as error:
        return error


def _kind(value: object) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null", dict: "an object"}
    numbers = {int: "a number", float: "a number"}
    return {**names, **numbers}.get(type(value)) or f"a {type(value).__name__}"


def _one_line(value: object) -> str:
    """Return an exception with its type, or a value's repr, on one line of at most 200 characters."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else repr(value)
    return shorten(one_line(text), 200)
