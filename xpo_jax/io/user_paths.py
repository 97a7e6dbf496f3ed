"""Paths as people write them, with `~` for a home folder and with environment variables; and the cache in that home."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expand(path: str) -> str:
    """Return a path or pattern in which `~`, `~user`, `$NAME` and `${NAME}` are replaced; any other text as it is.

    A path that exists as it is written is not changed.

    Raises:
      ValueError: a variable that is not set or empty, or a user without a home folder.
    """
    if ("$" not in path and not path.startswith("~")) or os.path.lexists(path):
        return path

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ValueError(
                f"{path}: the environment variable {name} is not set; set it, or write the path out"
            )
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if expanded.startswith("~"):
        raise ValueError(
            f"{path}: there is no such home folder; write the path out, or ./~ for a file of that name"
        )
    return expanded


def user_cache(environ: Mapping[str, str]) -> Path:
    """Return this project's folder in the user's cache directory (XDG_CACHE_HOME, or ~/.cache); it may not exist."""
    user = Path(environ.get("XDG_CACHE_HOME") or "")
    if not user.is_absolute():  # the XDG standard ignores a relative one
        user = Path(os.path.expanduser("~")) / ".cache"
    return user / "xpo_jax"
