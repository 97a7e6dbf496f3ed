"""The values of this room: rows as they were read, prompts as they were tokenised, and the errors about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from xpo_jax.values import Message


class DataError(ValueError):
    """Unusable data; one line that names file and row and how to fix it."""

    def __init__(self, text: str):
        """Escape line breaks and control characters in `text`, which may quote a row."""
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


class SourceError(DataError):
    """A source that is unusable as a whole, so skipping rows does not help."""


class Row(NamedTuple):
    """One row of a source.

    file: the file, or the name of the source.
    number: from 1; the line in jsonl and txt, the row in csv (the header is row 1), the index plus 1 elsewhere.
    values: by column.
    """

    file: str
    number: int
    values: Mapping[str, Any]

    @property
    def at(self) -> str:
        """The row's location for errors: "data/train.jsonl, row 17"."""
        return f"{self.file}, row {self.number}"


class Rows(Protocol):
    """The rows of a source, with random access; reading a row that is unreadable raises DataError.

    identity: what was read, for environment.json: files with size and sha256, data sets with their commit.
    """

    @property
    def identity(self) -> Sequence[Mapping[str, Any]]:
        """See above."""
        ...

    def __len__(self) -> int:
        """Count the rows, unreadable ones included."""
        ...

    def __getitem__(self, index: int) -> Row:
        """Return the row at an index from 0."""
        ...


class Prompt(NamedTuple):
    """One prompt, ready for a batch.

    row: where it came from.
    messages: its conversation, ending with a user turn; plain text is one user message.
    tokens: i32[length].
    """

    row: Row
    messages: Sequence[Message]
    tokens: np.ndarray
