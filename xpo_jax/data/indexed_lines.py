"""A file of lines, of any size, random access: where each line begins is held in memory, nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xpo_jax.data.rows import Row, SourceError

CHUNK = 1 << 22  # bytes of a file that are looked at at once
MARK = b"\xef\xbb\xbf"  # of UTF-8, as some editors put it in front


class Lines:
    """The lines of a file, blank ones passed over; in memory is only where each begins."""

    def __init__(self, name: str, path: Path, parse: Callable[[bytes, str], Mapping[str, Any]], holds: str):
        """Goes through the file once, for the places of its lines and its hash.

        Args:
          name, path: as for `formats.read`.
          parse: a line and its place, for errors, to its columns.
          holds: what a line is, for errors.
        """
        self._name, self._path, self._parse = name, path, parse
        digest, begins, numbers = hashlib.sha256(), [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        offset, start, lines, filled = 0, 0, 0, False
        with open(path, "rb") as file:
            self._state = _state(file.fileno())
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                found, count, carry, filled = _scan(chunk, start, offset, filled)
                begins.append(found[0])
                numbers.append(found[1] + lines)
                offset, start, lines = offset + len(chunk), carry, lines + count
        if filled:
            begins.append(np.array([start], np.int64))
            numbers.append(np.array([lines + 1], np.int64))
        self._begins = np.concatenate(begins)
        self._numbers = np.concatenate(numbers).astype(np.uint32)
        if not len(self) or (len(self) == 1 and not self._line(0).strip()):
            raise SourceError(f"{name}: the file is empty; {holds} per line is expected")
        self.identity = ({"file": name, "bytes": offset, "sha256": digest.hexdigest()},)

    def __len__(self) -> int:
        """Lines that are not blank."""
        return len(self._begins)

    def __getitem__(self, index: int) -> Row:
        """Reads one line.

        Raises:
          DataError: a line that is not what it should be.
          SourceError: a file that has changed since its lines were found.
        """
        number = int(self._numbers[index])
        return Row(self._name, number, self._parse(self._line(index), f"{self._name}, row {number}"))

    def _line(self, index: int) -> bytes:
        try:
            with open(self._path, "rb") as file:
                same = _state(file.fileno()) == self._state
                file.seek(int(self._begins[index]))
                line = file.readline().removesuffix(b"\n")
        except OSError as error:
            raise SourceError(f"{self._name}: cannot be read any more: {error.strerror}") from None
        if not same:
            raise SourceError(
                f"{self._name}: the file has changed during the run; start again with a copy of it"
            )
        return line.removeprefix(MARK) if index == 0 else line


def _state(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _scan(
    chunk: bytes, start: int, offset: int, filled: bool
) -> tuple[tuple[np.ndarray, np.ndarray], int, int, bool]:
    """Where the lines that end in a chunk begin.

    Args:
      start: where the line begins that the chunk goes on with, bytes from the file's begin.
      offset: where the chunk begins.
      filled: whether that line has something but white space so far.

    Returns:
      Begins and numbers (from 1, in the chunk) of the lines that are not blank; how many ended; start and filled
      for the next chunk.
    """
    data = np.frombuffer(chunk, np.uint8)
    # split at \n alone: JSON strings may hold the other line separators that splitlines() knows
    ends = np.flatnonzero(data == 10)
    solid = np.append(data > 32, False)  # what JSON and bytes.strip() call white space is below that
    begins = np.concatenate(([0], ends + 1))
    some = np.logical_or.reduceat(solid, begins)
    some[0] |= filled
    places = begins + offset
    places[0] = start
    kept = np.flatnonzero(some[:-1])
    return (places[kept], kept + 1), len(ends), int(places[-1]), bool(some[-1])
