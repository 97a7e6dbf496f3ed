"""Answer files: rows are matched to prompts by conversation, not by position in the file.

A row has the text column "answer", and its prompt in the first of these that it has: the columns of the config's
template (or its column), "messages" (a conversation), "prompt" (the only turn, as text). So a source's rows with an
answer added, as tools.chat writes them, need no conversion. Of the config's transforms only `rename` is applied; the
other columns are passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xpo_jax.data import conversations, templates, validate
from xpo_jax.data.conversations import as_messages, key
from xpo_jax.data.rows import DataError, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.data.turns import STRICT, Rules
from xpo_jax.values import Message, Prompts


class Answered(NamedTuple):
    """One conversation of a file, the first row that has it, and its answers in file order."""

    messages: Sequence[Message]
    row: Row
    answers: Sequence[str]


def read_answers(
    path: str,
    *,
    template: str | Sequence[Mapping[str, str]] | None,
    column: str | None,
    rename: Mapping[str, str] | None,
    rules: Rules = STRICT,
) -> dict[str, Answered]:
    """Return all answers of a file, by the `key` of their conversation, in file order.

    Args:
      path: what `sources.read_rows` takes.
      template, column, rename, rules: the config's, see `prompts.load_prompts`.

    Raises:
      DataError: a row without an answer or a conversation, with file and row.
    """
    answered: dict[str, tuple[Sequence[Message], Row, list[str]]] = {}
    for row in read_rows(path):
        row = row._replace(values={(rename or {}).get(name, name): v for name, v in row.values.items()})
        answer = conversations.answer(validate.column(row, "answer"), row.at, "column 'answer'")
        messages = _conversation(row, template, column, rules)
        answered.setdefault(key(messages), (messages, row, []))[2].append(answer)
    if not answered:
        raise DataError(f"{path}: has no rows; add at least one")
    return {name: Answered(*fields) for name, fields in answered.items()}


def match_answers(batches: Sequence[Prompts], path: str, **columns: Any) -> list[list[str]]:
    """Return for each batch the B answers to its prompts, "" in padding rows.

    Args:
      path, columns: as for `read_answers`.

    Raises:
      DataError: a prompt that has no answer in the file, or two different ones.
    """
    by_conversation = read_answers(path, **columns)

    def answer(messages: Sequence[Message]) -> str:
        answered = by_conversation.get(key(messages))
        prompt = repr(messages[-1]["content"])[:80]
        if answered is None:
            raise DataError(
                f"{path}: has no answer to the held-out prompt {prompt}; add it, or lower evaluation.prompts"
            )
        if len(set(answered.answers)) > 1:
            raise DataError(f"{answered.row.at}: {prompt} has several answers in this file; keep one of them")
        return answered.answers[0]

    return [
        [answer(m) if valid else "" for m, valid in zip(batch.messages, batch.valid, strict=True)]
        for batch in batches
    ]


def _conversation(
    row: Row, template: str | Sequence[Mapping[str, str]] | None, column: str | None, rules: Rules
) -> Sequence[Message]:
    required = templates.check(template) if template is not None else [column]
    if all(name in row.values for name in required):
        filled = row.values[column] if template is None and column else templates.fill(template or "", row)
        what = "the prompt"
    elif "messages" in row.values:
        filled, what = row.values["messages"], "column 'messages'"
    elif "prompt" in row.values:
        filled, what = row.values["prompt"], "column 'prompt'"
    else:
        raise DataError(
            f"{row.at}: has no prompt; add column {', '.join(map(repr, required))}, or 'messages' or 'prompt'"
        )
    return as_messages(conversations.parse(filled, row.at, what, rules))
