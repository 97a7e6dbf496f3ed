"""What vouches for the files of a folder: manifest.sha256, written last, as `sha256sum -c` reads it.

A folder without it holds nothing that may be used. Sealing writes it when every other file is on disk, removing
takes it away first: wherever a process is killed, a folder either is whole or does not look it. Folders may be
local or in a bucket (gs://), where each file is an object and appears whole.
"""

from __future__ import annotations

import hashlib
import posixpath
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from xpo_jax.io.files import sync
from xpo_jax.io.paths import in_bucket, write

MANIFEST = "manifest.sha256"
_THREADS = 8  # that read at a time; hashing lets go of Python's lock
_REMOVAL_SECONDS = 10.0


class CheckpointError(ValueError):
    """A checkpoint cannot be saved or restored; one line that says what, where and how to mend it."""


def seal(folder: epath.Path) -> None:
    """Write the manifest of all files in the folder, once they and the way to them are on disk.

    Raises:
      OSError, WriteError: if something cannot be read or written.
    """
    names = _files(folder)
    if not in_bucket(folder):
        _flush(Path(folder))
    lines = (f"{digest}  {name}\n" for name, digest in zip(names, _hashes(folder, names), strict=True))
    write(folder / MANIFEST, "".join(lines))


def sealed(folder: epath.Path) -> bool:
    """Whether there is a manifest; it may still be that something does not agree with it."""
    return (folder / MANIFEST).exists()


def verify(folder: epath.Path, *, needed: Sequence[str] = (), share: slice = slice(None)) -> None:
    """Compare a folder with its manifest: no file is missing, none is foreign, and they hold what was sealed.

    Args:
      needed: files that must be among them.
      share: which files to read, of all in order; for processes that divide the work.

    Raises:
      CheckpointError: naming the first file that is missing, damaged or not of this folder.
    """
    mend = "delete that checkpoint to use an older one"
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise CheckpointError(f"{folder / MANIFEST}: {reason}, so nothing vouches for it; {mend}") from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = _files(folder)
    for name in sorted({*sums, *needed}.difference(present)):
        raise CheckpointError(f"{folder / name}: is missing; {mend}")
    for name in present:
        if name not in sums:
            raise CheckpointError(f"{folder / name}: is not a file of this checkpoint; remove it or {mend}")
    mine = present[share]
    try:
        for name, digest in zip(mine, _hashes(folder, mine), strict=True):
            if digest != sums[name]:
                raise CheckpointError(f"{folder / name}: is damaged (its SHA-256 differs); {mend}")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); {mend}") from error


def remove(folder: epath.Path) -> None:
    """Remove a folder, its manifest first, until it stays away: behind a write that failed others may go on.

    Raises:
      OSError: if it is still there after ten seconds.
    """
    until = time.monotonic() + _REMOVAL_SECONDS
    while folder.exists():
        try:
            (folder / MANIFEST).unlink(missing_ok=True)
            folder.rmtree(missing_ok=True)
        except OSError:
            if time.monotonic() > until:
                raise
        else:
            if time.monotonic() > until:
                raise OSError(f"something writes into {folder} again and again")
        time.sleep(0.05)


def _files(folder: epath.Path) -> list[str]:
    """All files but the manifest, as paths relative to the folder."""
    top = str(folder).rpartition("://")[2]  # what is walked in a bucket has no gs://
    names = (
        posixpath.relpath(f"{root}/{name}".rpartition("://")[2], top)
        for root, _, names in folder.walk()
        for name in names
    )
    return sorted(name for name in names if name != MANIFEST)


def _hashes(folder: epath.Path, names: Sequence[str]) -> Iterable[str]:
    """SHA-256 of each file, in order."""

    def one(name: str) -> str:
        with (folder / name).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(one, names)


def _flush(folder: Path) -> None:
    """Force files and folders to disk, so that a manifest that is there means that the rest is, too."""
    for entry in (*folder.absolute().parents[:2], folder, *folder.rglob("*")):
        sync(entry)
