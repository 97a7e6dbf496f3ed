"""The values that this package passes on: rows as they were read, prompts as they were tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.values import Message


class DataError(ValueError):
    """Prompts that cannot be used; one line that names file and row and says how to mend it."""


class Row(NamedTuple):
    """One JSON object of a file; `number` is its line, from 1."""

    file: str
    number: int
    values: Mapping[str, Any]

    @property
    def at(self) -> str:
        """Where the row stands, as errors name it: "data/train.jsonl, row 17"."""
        return f"{self.file}, row {self.number}"


class Prompt(NamedTuple):
    """One prompt, ready for a batch.

    row: where it came from.
    messages: its conversation, ending with the user's turn; a plain text is one message of the user's.
    tokens: i32[length].
    """

    row: Row
    messages: Sequence[Message]
    tokens: np.ndarray
