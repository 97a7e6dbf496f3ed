"""Paths that may be local or in a bucket (gs://), and writing a complete file in either."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

from etils import epath

from xpo_jax.io.files import atomic_write


def absolute(path: str | Path | epath.Path) -> epath.Path:
    """Return the absolute path, which has pathlib's methods, local or in a bucket.

    Raises:
      ValueError: a path in a bucket, and the package that accesses buckets is not installed.
    """
    if not in_bucket(path):
        return epath.Path(os.path.abspath(path))
    _prepare_buckets()
    return epath.Path(path)


def in_bucket(path: str | Path | epath.Path) -> bool:
    """Return whether the path is in a bucket, rather than on a disk of this machine or one that it mounts."""
    return "://" in str(path)


def write(file: epath.Path, text: str) -> None:
    """Write a file completely or not at all, in an existing folder."""
    if in_bucket(file):
        file.write_text(text)  # an object appears when it is complete
    else:
        atomic_write(Path(file), text)


@functools.cache
def _prepare_buckets() -> None:
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError("gs:// paths need gcsfs; install xpo-jax[gcs]")
    import fsspec.config

    # Others write into the same folders (tensorstore in this process, other processes), so listings are not cached.
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
