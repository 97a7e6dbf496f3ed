"""A message template: text with `{column}` placeholders, `{{` and `}}` for braces.

Left out on purpose: format specs, conversions, attributes and indices. A template is data from a config and reads
complete columns, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from xpo_jax.data import conversations, validate
from xpo_jax.data.rows import DataError, Row
from xpo_jax.values import Message

# in this order: a doubled brace, a placeholder, a brace that belongs to neither
_PIECES = re.compile(r"(\{\{|\}\})|\{([^{}]*)\}|([{}])")


def check(template: str | Sequence[Mapping[str, str]]) -> list[str]:
    """Reject a template that could not fill any row.

    Returns:
      The placeholders' names, in order.

    Raises:
      ValueError: a stray brace, `{a.b}`, `{a!r}`, `{a:>8}`, `{a[0]}`, `{}`, no placeholder at all, or
        messages that are not a conversation.
    """
    try:
        messages = _messages(template, "template")
    except DataError as error:
        raise ValueError(str(error)) from None
    columns = [name for message in messages for name in _columns(message["content"])]
    if not columns:
        raise ValueError("template: has no {column}, so every prompt would be the same; add one")
    return columns


def fill(template: str | Sequence[Mapping[str, str]], row: Row) -> str | tuple[Message, ...]:
    """Fill a template with a row's columns: text gives text, messages give messages.

    Raises:
      DataError: a column that is missing, empty, or neither text nor an integer nor a boolean.
    """
    return substitute(
        template, lambda name: conversations.text(validate.column(row, name), row.at, f"column {name!r}")
    )


def substitute(
    template: str | Sequence[Mapping[str, str]], value: Callable[[str], str]
) -> str | tuple[Message, ...]:
    """Replace each `{name}` by value(name), once: braces in a value stay unchanged."""

    def replace(piece: re.Match[str]) -> str:
        brace, name, _ = piece.groups()
        return brace[0] if brace else value(name)

    if isinstance(template, str):
        return _PIECES.sub(replace, template)
    return tuple(
        Message(role=message["role"], content=_PIECES.sub(replace, message["content"]))
        for message in template
    )


def _messages(template: str | Sequence[Mapping[str, str]], at: str) -> Sequence[Message]:
    if isinstance(template, str):
        return (Message(role="user", content=conversations.text(template, at, "the text")),)
    messages = conversations.parse(template, at, "the list")
    assert not isinstance(messages, str)  # it is a list
    return messages


def _columns(content: str) -> list[str]:
    """Return the columns that a template's text names."""
    columns = []
    for brace, name, stray in _PIECES.findall(content):
        if stray:
            raise ValueError(
                f"template: a single {stray!r} in {content!r}; write a literal brace as {stray * 2!r}"
            )
        if brace:
            continue
        if not name or re.search(r"[.!:\[\]]", name):
            raise ValueError(
                f"template: {{{name}}} is not a placeholder; write {{column}}, or {{{{{name}}}}} for braces"
            )
        columns.append(name)
    return columns
