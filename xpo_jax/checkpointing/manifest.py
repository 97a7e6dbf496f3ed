"""The integrity manifest of a folder: manifest.sha256, written last, in the format of `sha256sum -c`.

A folder without it holds nothing that may be used. Sealing writes it when every other file is on disk, and removal
deletes it first: wherever a process is killed, a folder with a manifest is complete. Folders may be local or in a
bucket (gs://), where each file is an object that appears in one piece.
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
_THREADS = 8  # that read at the same time; hashing releases the GIL
_REMOVAL_SECONDS = 10.0


class CheckpointError(ValueError):
    """A checkpoint cannot be saved or restored; one line that states what, where and how to fix it."""


def seal(folder: epath.Path) -> None:
    """Write the manifest of all files in the folder, once the files and their folders are on disk.

    Raises:
      OSError, WriteError: a file cannot be read or written.
    """
    names = _files(folder)
    if not in_bucket(folder):
        _flush(Path(folder))
    lines = (f"{digest}  {name}\n" for name, digest in zip(names, _hashes(folder, names), strict=True))
    write(folder / MANIFEST, "".join(lines))


def is_sealed(folder: epath.Path) -> bool:
    """Return whether there is a manifest; whether the files agree with it is for `verify`."""
    return (folder / MANIFEST).exists()


def verify(folder: epath.Path, *, needed: Sequence[str] = (), files: slice = slice(None)) -> None:
    """Compare a folder with its manifest: no file is missing or foreign, and all hold what was sealed.

    Args:
      folder: of the checkpoint.
      needed: files that must be among them.
      files: which files to read, of all in order; for processes that divide the work.

    Raises:
      CheckpointError: names the first file that is missing, damaged or not of this folder.
    """
    remedy = "delete that checkpoint to use an older one"
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise CheckpointError(
            f"{folder / MANIFEST}: {reason}, so the checkpoint cannot be verified; {remedy}"
        ) from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = _files(folder)
    for name in sorted({*sums, *needed}.difference(present)):
        raise CheckpointError(f"{folder / name}: is missing; {remedy}")
    for name in present:
        if name not in sums:
            raise CheckpointError(f"{folder / name}: is not a file of this checkpoint; remove it or {remedy}")
    to_read = present[files]
    try:
        for name, digest in zip(to_read, _hashes(folder, to_read), strict=True):
            if digest != sums[name]:
                raise CheckpointError(f"{folder / name}: is damaged (its SHA-256 differs); {remedy}")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); {remedy}") from error


def remove(folder: epath.Path) -> None:
    """Remove a folder, its manifest first, again until it is gone: after a failed write other writers may continue.

    Raises:
      OSError: the folder still exists after ten seconds.
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
                raise OSError(f"another writer keeps writing into {folder}")
        time.sleep(0.05)


def _files(folder: epath.Path) -> list[str]:
    """Return all files but the manifest, as paths relative to the folder."""
    top = str(folder).rpartition("://")[2]  # walking a bucket yields paths without gs://
    names = (
        posixpath.relpath(f"{root}/{name}".rpartition("://")[2], top)
        for root, _, names in folder.walk()
        for name in names
    )
    return sorted(name for name in names if name != MANIFEST)


def _hashes(folder: epath.Path, names: Sequence[str]) -> Iterable[str]:
    """Return the SHA-256 of each file, in order."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(digest, names)


def _flush(folder: Path) -> None:
    """Force files and folders to disk, so that a manifest on disk implies that the rest is on disk, too."""
    for entry in (*folder.absolute().parents[:2], folder, *folder.rglob("*")):
        sync(entry)
