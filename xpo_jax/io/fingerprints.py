"""Fingerprints of files and folders, by which a run notices that what it reads has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

# Of a larger file, this many blocks, evenly spaced, stand for its content: a model is read in a second, and any
# training or conversion changes nearly all of its numbers.
SAMPLED_BYTES = 2**26
_BLOCKS, _BLOCK_BYTES = 64, 2**18


def of_file(path: Path) -> str:
    """Return a SHA-256 of the file's size and content; of a file above SAMPLED_BYTES, of evenly spaced blocks.

    Raises:
      OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = path.stat().st_size
        digest.update(b"%d " % size)
        if size <= SAMPLED_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for block in range(_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def of_files(paths: Iterable[Path]) -> str:
    """Return a SHA-256 of the names and fingerprints of files, in the order of their names.

    Files of one name, such as the __init__.py of several packages, are in the order of their fingerprints, so that
    neither the order of the paths nor the folders matter.
    """
    digest = hashlib.sha256()
    for name, content in sorted((path.name, of_file(path)) for path in paths):
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def combined(parts: Iterable[str]) -> str:
    """Return a SHA-256 of several fingerprints or other texts, in their order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
