"""Files that are written completely or not at all, and strict JSON.

Run directories, logs, metrics and checkpoints use these. Nothing here depends on what the files hold.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xpo_jax.io.text import one_line


class WriteError(ValueError):
    """A file cannot be written; one line that states which, why, and how to fix it."""


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON that any reader accepts: non-finite numbers become null, arrays become lists.

    A float32 is written with the fewest digits that read back as the same float32 (0.1, not
    0.10000000149011612).

    Raises:
      TypeError: for a value that JSON cannot hold.
    """
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as broken input may hold; it survives if escaped
        text = json.dumps(_plain(value), indent=indent, allow_nan=False)
    return text


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
      path: the file.
      remedy: what the user can do if it cannot be read; ends the error's line.

    Raises:
      ValueError: the file is missing, cannot be read, or holds no JSON object; the line names the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path} is not valid JSON ({one_line(str(error))}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object; {remedy}")
    return value


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
    """Write a file so that at any instant it is either the complete old one or the complete new one.

    Raises:
      WriteError: the file cannot be written; an old one is unchanged.
    """
    path = Path(path)
    # A directory has a single writer, so the name can be fixed; a leftover is overwritten.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)  # so that the rename itself survives a power cut
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(
            f"{path}: cannot be written ({error.strerror}); free space or fix the permissions"
        ) from error


def sync(path: str | Path) -> None:
    """Force a file's content, or a folder's entries, to disk.

    Raises:
      OSError: the path cannot be opened or written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_whole(file: BinaryIO, data: bytes) -> None:
    """Append to an unbuffered file; after an error the file is as long as before.

    Raises:
      OSError: the data cannot be written.
    """
    before, rest = os.fstat(file.fileno()).st_size, memoryview(data)
    try:
        while rest:  # a disk that fills up takes a part first and refuses the rest
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(before)
        raise
