"""Checks of texts and conversations, before anything is tokenised.

Left out on purpose: whether user and assistant alternate and whether a system turn is allowed, which the chat template
decides; tool calls; contents that are not text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xpo_jax.data.rows import DataError, Row
from xpo_jax.io.text import one_line, shorten
from xpo_jax.values import Message

_ROLES = ("system", "user", "assistant")


def column(row: Row, name: str) -> Any:
    """Return the value of a row's column; if it is missing, raise a DataError that lists the row's columns."""
    if name not in row.values:
        raise DataError(f"{row.at}: no column {name!r}; the row has: {_column_names(row.values)}")
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


def conversation(value: Any, at: str, what: str) -> tuple[Message, ...]:
    """Return the value as messages after checking that it is a conversation that a model can answer.

    Args:
      value: a list of {"role": ..., "content": ...}; only the first turn may be the system's, the last must be the
        user's.
      at, what: as for `text`.

    Raises:
      DataError: anything else, with the number of the turn, from 1.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{at}: {what} must be text or a list of messages, got {_shortened(value)}")
    if not value:
        raise DataError(f"{at}: {what} has no messages; add at least one")
    messages = []
    for number, turn in enumerate(value, start=1):
        this_turn = f"turn {number} of {what}"
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{at}: {this_turn} must be a message with role and content, got {_shortened(turn)}"
            )
        if set(turn) != {"role", "content"}:
            raise DataError(f"{at}: {this_turn} must have role and content, it has: {_column_names(turn)}")
        role = turn["role"]
        if role not in _ROLES:
            raise DataError(
                f"{at}: {this_turn} has the unknown role {_shortened(role)}; write one of {', '.join(_ROLES)}"
            )
        if role == "system" and number > 1:
            raise DataError(f"{at}: {this_turn} is a system turn; only the first turn can be one")
        messages.append(Message(role=role, content=text(turn["content"], at, f"the content of {this_turn}")))
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{at}: {what} ends with the {messages[-1]['role']}'s turn; the last must be the user's"
        )
    return tuple(messages)


def _shortened(value: Any) -> str:
    return shorten(one_line(repr(value)), 60)


def _column_names(columns: Iterable[str]) -> str:
    return shorten(", ".join(columns) or "nothing", 200)
