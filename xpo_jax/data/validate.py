"""Checks of columns and texts, before anything is tokenised; those of conversations are in conversations.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xpo_jax.data.rows import DataError, Row
from xpo_jax.io.text import one_line, shorten


def column(row: Row, name: str) -> Any:
    """Return the value of a row's column; if it is missing, raise a DataError that lists the row's columns."""
    if name not in row.values:
        raise DataError(f"{row.at}: no column {name!r}; the row has: {column_names(row.values)}")
    return row.values[name]


def text(value: Any, at: str, what: str) -> str:
    """Return the value after checking that it is text and not blank.

    Args:
      value: any JSON value.
      at: the location, for errors ("data/train.jsonl, row 17").
      what: the value's name there ("column 'text'").

    Raises:
      DataError: not text, only white space, or half a surrogate pair, which UTF-8 cannot encode.
    """
    if not isinstance(value, str):
        raise DataError(f"{at}: {what} must be text, got {_shortened(value)}")
    if not value.strip():
        raise DataError(f"{at}: {what} is empty; fill it in")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{at}: {what} holds half a surrogate pair, \\u{ord(value[error.start]):04x}; write both halves"
        ) from None
    return value


def _shortened(value: Any) -> str:
    return shorten(one_line(repr(value)), 60)


def column_names(columns: Iterable[str]) -> str:
    """Return the names of a row's columns, or of a message's keys, for errors."""
    return shorten(", ".join(columns) or "nothing", 200)
