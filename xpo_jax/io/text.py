"""Texts for people: on one line, shortened, safe for a terminal, or as a Markdown table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def one_line(text: str) -> str:
    """Return the text with each run of white space, line breaks included, replaced by one space."""
    return " ".join(text.split())


def shorten(text: str, limit: int) -> str:
    """Return the text if it has at most `limit` characters, else its beginning and three dots."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def error_line(error: BaseException, *, with_class: bool = False) -> str:
    """Return an error's message on one line; the name of its class where it has no message.

    Args:
      error: the error.
      with_class: put the name of its class in front, where the message alone may not explain it.
    """
    message = one_line(str(error))
    if not message:
        return type(error).__name__
    return f"{type(error).__name__}: {message}" if with_class else message


def visible(text: str) -> str:
    """Return the text with control characters as symbols, so that a sample cannot control a terminal."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t"
        else "\N{REPLACEMENT CHARACTER}" if 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000
        else c
        for c in text.replace("\r\n", "\n")
    )  # fmt: skip


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with one column per key; markup in cells is escaped, newlines become <br>."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def line(entries: Iterable[Any]) -> str:
        texts = ("" if e is None else f"{e:.4g}" if isinstance(e, float) else str(e) for e in entries)
        cells = (re.sub(r"([\\`*<\[&|])", r"\\\1", visible(text)).replace("\n", "<br>") for text in texts)
        return "| " + " | ".join(cells) + " |\n"

    body = "".join(line(row.get(name) for name in columns) for row in rows)
    return line(columns) + "|" + " --- |" * len(columns) + "\n" + body
