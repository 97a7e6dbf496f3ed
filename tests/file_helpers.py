"""Strict JSON, and a full disk."""

import json
import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size_bytes):
    """Let this process write no larger files, as on a full disk; this holds for root and for Orbax's threads, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def strict(text):
    """Parse JSON; NaN and Infinity, which Python accepts, are failures."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)
