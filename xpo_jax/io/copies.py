"""Copies at the border to user code, which may edit what it is given, and reuse what it has returned.

Left out on purpose: objects of other types, such as images, which are passed as they are; a row that holds one cannot
be logged anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def copied(value: Any) -> Any:
    """Return the value with its mappings, lists, tuples and NumPy arrays copied, at any depth."""
    if isinstance(value, Mapping):
        return {name: copied(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [copied(entry) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    return value.copy() if isinstance(value, np.ndarray) else value
