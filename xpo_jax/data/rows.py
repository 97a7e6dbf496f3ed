"""The values that this package passes on: rows as they were read, prompts as they were tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from xpo_jax.values import Message


class DataError(ValueError):
    """Prompts that cannot be used; one line that names file and row and says how to mend it."""

    def __init__(self, text: str):
        """What a row holds may stand in `text`: line breaks and control characters in it are written as escapes."""
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


class SourceError(DataError):
    """A whole source that cannot be used, so that no row of it can be skipped."""


class Row(NamedTuple):
    """One row of a source.

    file: the file or the name of the source.
    number: from 1; the line in jsonl and text, the row in csv (the header is row 1), the place elsewhere.
    values: by column.
    """

    file: str
    number: int
    values: Mapping[str, Any]

    @property
    def at(self) -> str:
        """Where the row stands, as errors name it: "data/train.jsonl, row 17"."""
        return f"{self.file}, row {self.number}"


class Rows(Protocol):
    """The rows of a source, random access; one that cannot be read raises DataError when it is asked for.

    identity: what was read, for environment.json: files with size and sha256, data sets with their commit.
    """

    @property
    def identity(self) -> Sequence[Mapping[str, Any]]:
        """See above."""
        ...

    def __len__(self) -> int:
        """How many, broken ones included."""
        ...

    def __getitem__(self, index: int) -> Row:
        """The row at a place from 0."""
        ...


class Prompt(NamedTuple):
    """One prompt, ready for a batch.

    row: where it came from.
    messages: its conversation, ending with the user's turn; a plain text is one message of the user's.
    tokens: i32[length].
    """

    row: Row
    messages: Sequence[Message]
    tokens: np.ndarray
