"""Paths that may be local or in a bucket (gs://), and writing one file whole in either."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

from etils import epath

from xpo_jax.io.files import atomic_write


def find(path: str | Path | epath.Path) -> epath.Path:
    """The path, absolute; with pathlib's methods, wherever it is.

    Raises:
      ValueError: a path in a bucket, without what is needed to get there.
    """
    found = epath.Path(path)
    if not in_bucket(found):
        return epath.Path(os.path.abspath(found))
    _prepare_buckets()
    return found


def in_bucket(path: str | Path | epath.Path) -> bool:
    """Whether it is no file of this machine's, nor of a disk that it mounts."""
    return "://" in str(path)


def write(file: epath.Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is there."""
    if in_bucket(file):
        file.write_text(text)  # an object appears when it is whole
    else:
        atomic_write(Path(file), text)


@functools.cache
def _prepare_buckets() -> None:
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError("gs:// paths need gcsfs; install xpo-jax[gcs]")
    import fsspec.config

    # Others write into the same folders (tensorstore in this process, the other processes): remember no listing.
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
