"""A file of lines, of any size, with random access: only the byte offset of each line is held in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xpo_jax.data.rows import Row, SourceError

CHUNK = 1 << 22  # bytes of a file that are scanned at once
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8; some editors put it at the start of a file


class IndexedLines:
    """The lines of a file without the blank ones; memory holds only where each begins."""

    def __init__(self, name: str, path: Path, parse: Callable[[bytes, str], Mapping[str, Any]], content: str):
        """Read the file once, for the offsets of its lines and its hash.

        Args:
          name, path: as for `formats.read`.
          parse: maps a line, and its location for errors, to its columns.
          content: what a line holds, for errors.
        """
        self._name, self._path, self._parse = name, path, parse
        digest, begins, numbers = hashlib.sha256(), [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        offset, line_begin, lines, filled = 0, 0, 0, False
        with open(path, "rb") as file:
            self._state = _state(file.fileno())
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                (chunk_begins, chunk_numbers), count, line_begin, filled = _scan(
                    chunk, line_begin, offset, filled
                )
                begins.append(chunk_begins)
                numbers.append(chunk_numbers + lines)
                offset, lines = offset + len(chunk), lines + count
        if filled:
            begins.append(np.array([line_begin], np.int64))
            numbers.append(np.array([lines + 1], np.int64))
        self._begins = np.concatenate(begins)
        self._numbers = np.concatenate(numbers).astype(np.uint32)
        if not len(self) or (len(self) == 1 and not self._line(0).strip()):
            raise SourceError(f"{name}: the file is empty; write {content} per line")
        self.identity = ({"file": name, "bytes": offset, "sha256": digest.hexdigest()},)

    def __len__(self) -> int:
        """Count the lines that are not blank."""
        return len(self._begins)

    def __getitem__(self, index: int) -> Row:
        """Read one line.

        Raises:
          DataError: `parse` rejects the line.
          SourceError: the file has changed since it was indexed.
        """
        number = int(self._numbers[index])
        return Row(self._name, number, self._parse(self._line(index), f"{self._name}, row {number}"))

    def _line(self, index: int) -> bytes:
        try:
            with open(self._path, "rb") as file:
                unchanged = _state(file.fileno()) == self._state
                file.seek(int(self._begins[index]))
                line = file.readline().removesuffix(b"\n")
        except OSError as error:
            raise SourceError(
                f"{self._name}: can no longer be read: {error.strerror}; restore the file"
            ) from None
        if not unchanged:
            raise SourceError(
                f"{self._name}: the file has changed during the run; start again with a copy of it"
            )
        return line.removeprefix(BYTE_ORDER_MARK) if index == 0 else line


def _state(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _scan(
    chunk: bytes, line_begin: int, offset: int, filled: bool
) -> tuple[tuple[np.ndarray, np.ndarray], int, int, bool]:
    """Locate the lines that end in a chunk.

    Args:
      line_begin: where the line begins that continues into the chunk, bytes from the start of the file.
      offset: where the chunk begins.
      filled: whether that line has anything but white space so far.

    Returns:
      Begins and numbers (from 1, in the chunk) of the lines that are not blank; how many lines ended; line_begin and
      filled for the next chunk.
    """
    data = np.frombuffer(chunk, np.uint8)
    # split at \n alone: JSON strings may hold the other line separators that splitlines() splits at
    ends = np.flatnonzero(data == 10)
    visible = np.append(data > 32, False)  # white space, as JSON and bytes.strip() define it, is at most 32
    starts = np.concatenate(([0], ends + 1))
    nonblank = np.logical_or.reduceat(visible, starts)
    nonblank[0] |= filled
    begins = starts + offset
    begins[0] = line_begin
    lines = np.flatnonzero(nonblank[:-1])
    return (begins[lines], lines + 1), len(ends), int(begins[-1]), bool(nonblank[-1])
