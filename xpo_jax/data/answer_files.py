"""Files of answers: who is asked what is found by the conversation, not by the place in the file.

A row has the text column "answer" and says what was asked by one of these, the first that it has:
the columns that the config's template (or its column) wants, "messages" (a conversation), "prompt" (its only turn, a
text). So the rows of a source with an answer added, as tools.chat writes them, do as they are. Of the config only
`rename` is done before; what else stands in a row is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xpo_jax.data import templates, validate
from xpo_jax.data.rows import DataError, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.values import Message, Prompts


class Answered(NamedTuple):
    """One conversation of a file, the row that first asked it, and its answers in their order."""

    messages: Sequence[Message]
    row: Row
    answers: Sequence[str]


def read_answers(
    path: str,
    *,
    template: str | Sequence[Mapping[str, str]] | None,
    column: str | None,
    rename: Mapping[str, str] | None,
) -> dict[str, Answered]:
    """All answers of a file, by `key` of their conversation, in the order of the file.

    Args:
      path: what `sources.read_rows` takes.
      template, column, rename: the config's, see `prompts.load_prompts`.

    Raises:
      DataError: a row without an answer or a conversation, with file and row.
    """
    found: dict[str, tuple[Sequence[Message], Row, list[str]]] = {}
    for row in read_rows(path):
        row = row._replace(values={(rename or {}).get(name, name): v for name, v in row.values.items()})
        answer = validate.column(row, "answer")
        if not isinstance(answer, str):
            raise DataError(f"{row.at}: column 'answer' must be text, found {answer!r}")
        messages = _asked(row, template, column)
        found.setdefault(key(messages), (messages, row, []))[2].append(answer)
    if not found:
        raise DataError(f"{path}: has no rows")
    return {name: Answered(*each) for name, each in found.items()}


def match_answers(batches: Sequence[Prompts], path: str, **columns: Any) -> list[list[str]]:
    """Per batch the B answers to its prompts, "" in padding rows.

    Args:
      path, columns: as for `read_answers`.

    Raises:
      DataError: a prompt that the file has no answer to, or two different ones.
    """
    found = read_answers(path, **columns)

    def answer(messages: Sequence[Message]) -> str:
        answered = found.get(key(messages))
        asked = repr(messages[-1]["content"])[:80]
        if answered is None:
            raise DataError(
                f"{path}: has no answer to the held-out prompt {asked}; add it, or lower evaluation.prompts"
            )
        if len(set(answered.answers)) > 1:
            raise DataError(f"{answered.row.at}: {asked} has several answers in this file; keep one of them")
        return answered.answers[0]

    return [
        [answer(m) if valid else "" for m, valid in zip(batch.messages, batch.valid, strict=True)]
        for batch in batches
    ]


def key(messages: Sequence[Message]) -> str:
    """The same for the same conversation."""
    return json.dumps([[message["role"], message["content"]] for message in messages])


def _asked(row: Row, template: str | Sequence[Mapping[str, str]] | None, column: str | None) -> Any:
    wanted = templates.check(template) if template is not None else [column]
    if all(name in row.values for name in wanted):
        filled = row.values[column] if template is None and column else templates.fill(template or "", row)
        what = "the prompt"
    elif "messages" in row.values:
        filled, what = row.values["messages"], "column 'messages'"
    elif "prompt" in row.values:
        filled, what = row.values["prompt"], "column 'prompt'"
    else:
        raise DataError(
            f"{row.at}: does not say what was asked; give {', '.join(map(repr, wanted))}, or 'messages' or 'prompt'"
        )
    if isinstance(filled, str):
        return (Message(role="user", content=validate.text(filled, row.at, what)),)
    return validate.conversation(filled, row.at, what)
