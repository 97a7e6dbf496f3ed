"""Small files, written whole or not at all: strict JSON, atomic replacement, Markdown tables.

What run directories, logs, metrics and checkpoints share. It knows nothing of any of them.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class WriteError(ValueError):
    """A file cannot be written; one line that says which, why and how to mend it."""


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON that any reader accepts: numbers that are not finite become null, arrays lists.

    A float32 is written with the fewest digits that read back as the same float32 (0.1, not
    0.10000000149011612).

    Raises:
      TypeError: for a value that JSON cannot hold.
    """
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as broken input holds; escaped, it survives
        text = json.dumps(_plain(value), indent=indent, allow_nan=False)
    return text


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not isinstance(value, np.generic):
        return value if math.isfinite(value) else None
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
        if array.dtype.kind in "biu":
            return array.tolist()
        if array.shape:
            return [_plain(entry) for entry in array]
        if array.dtype == np.float64:
            return _plain(float(array))
        number = float(array.astype(np.float32))  # bfloat16 and float16 are exact in float32
        return float(str(np.float32(number))) if math.isfinite(number) else None
    raise TypeError(f"{type(value).__name__} does not fit into JSON")


def atomic_write(path: str | Path, text: str) -> None:
    """Write a file so that at any instant it is either the old one or the new one, whole.

    Raises:
      WriteError: if it cannot be written; the old file, if any, is untouched.
    """
    path = Path(path)
    # One writer holds the directory, so the name can be fixed, and a leftover is overwritten.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename itself survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(
            f"{path}: cannot be written ({error.strerror}); free space or mend the rights"
        ) from error


def append_whole(file: BinaryIO, data: bytes) -> None:
    """Append to an unbuffered file; on an error the file is as long as before.

    Raises:
      OSError: what the system said.
    """
    before, rest = os.fstat(file.fileno()).st_size, memoryview(data)
    try:
        while rest:  # a disk that fills up takes a part first, and only then refuses
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(before)
        raise


def visible(text: str) -> str:
    """The text with control characters shown as symbols, so that a sample cannot steer a terminal."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t"
        else "\N{REPLACEMENT CHARACTER}" if 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000
        else c
        for c in text.replace("\r\n", "\n")
    )  # fmt: skip


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one column per key; markup inside a cell is escaped, newlines become <br>."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def line(entries: Iterable[Any]) -> str:
        texts = ("" if e is None else f"{e:.4g}" if isinstance(e, float) else str(e) for e in entries)
        cells = (re.sub(r"([\\`*<\[&|])", r"\\\1", visible(text)).replace("\n", "<br>") for text in texts)
        return "| " + " | ".join(cells) + " |\n"

    body = "".join(line(row.get(name) for name in columns) for row in rows)
    return line(columns) + "|" + " --- |" * len(columns) + "\n" + body
