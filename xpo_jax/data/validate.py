"""What a text and a conversation must be, before anything is tokenised.

Left out: whether user and assistant alternate and whether a system turn is welcome, which the chat template
decides; tool calls and contents that are not text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xpo_jax.data.rows import DataError, Row
from xpo_jax.io.text import one_line, shorten
from xpo_jax.values import Message

_ROLES = ("system", "user", "assistant")


def column(row: Row, name: str) -> Any:
    """The value of a row's column; DataError, with the columns that are there, if it is missing."""
    if name not in row.values:
        raise DataError(f"{row.at}: no column {name!r}; the row has: {_names(row.values)}")
    return row.values[name]


def text(value: Any, at: str, what: str) -> str:
    """The value itself, if it is a text with something in it.

    Args:
      value: any JSON value.
      at: the place, for errors ("data/train.jsonl, row 17").
      what: the value's name there ("column 'text'").

    Raises:
      DataError: not a text, nothing but white space, or half a surrogate pair, which UTF-8 cannot hold.
    """
    if not isinstance(value, str):
        raise DataError(f"{at}: {what} must be text, found {_shown(value)}")
    if not value.strip():
        raise DataError(f"{at}: {what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{at}: {what} holds half a surrogate pair, \\u{ord(value[error.start]):04x}; write it whole"
        ) from None
    return value


def conversation(value: Any, at: str, what: str) -> tuple[Message, ...]:
    """The value as messages, if it is a conversation that a model can answer.

    Args:
      value: a list of {"role": ..., "content": ...}; a system turn may only come first, the last turn is the
        user's.
      at, what: as for `text`.

    Raises:
      DataError: anything else, with the number of the turn, from 1.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{at}: {what} must be text or a list of messages, found {_shown(value)}")
    if not value:
        raise DataError(f"{at}: {what} has no messages")
    messages = []
    for number, turn in enumerate(value, start=1):
        place = f"turn {number} of {what}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{at}: {place} must be a message with role and content, found {_shown(turn)}")
        if set(turn) != {"role", "content"}:
            raise DataError(f"{at}: {place} must have role and content, it has: {_names(turn)}")
        role = turn["role"]
        if role not in _ROLES:
            raise DataError(
                f"{at}: {place} has the unknown role {_shown(role)}; the roles are {', '.join(_ROLES)}"
            )
        if role == "system" and number > 1:
            raise DataError(f"{at}: {place} is a system turn; only the first turn can be one")
        messages.append(Message(role=role, content=text(turn["content"], at, f"the content of {place}")))
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{at}: {what} ends with the {messages[-1]['role']}'s turn; the last must be the user's"
        )
    return tuple(messages)


def _shown(value: Any) -> str:
    return shorten(one_line(repr(value)), 60)


def _names(columns: Iterable[str]) -> str:
    return shorten(", ".join(columns) or "nothing", 200)
