"""The one place that knows how preference data are written: from a row to a record of a pairs log.

    prompt, chosen, rejected                   texts, or chosen and rejected as one assistant's message each
    chosen, rejected (and perhaps prompt)      conversations that differ in their last turn; what they share is the
                                               prompt, as in UltraFeedback, or where the prompt is implicit
    chosen, rejected                           the same as texts with "Human:" and "Assistant:", as in hh-rlhf

Conversations may be written in any way that conversations.py reads. An optional column p_chosen holds the probability
that chosen is better; without it, that is 1. One trailing end token, which some data sets include, is stripped.

Left out on purpose: more than two answers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from xpo_jax.data import conversations, validate
from xpo_jax.data.pairs_log import content_hash
from xpo_jax.data.rows import DataError, Row
from xpo_jax.data.turns import STRICT, Rules
from xpo_jax.values import Message

COLUMNS = ("prompt", "chosen", "rejected", "p_chosen")
EMPTY, EQUAL, BAD = "empty response", "equal responses", "on_bad_row"  # why a row is dropped


class Preference(NamedTuple):
    """A row of a preference data set.

    prompt: text, or the messages of a conversation.
    chosen, rejected: the two answers. p: the probability that chosen is better.
    """

    prompt: str | Sequence[Message]
    chosen: str
    rejected: str
    p: float


class ResponseTokenizer:
    """Text to the tokens of a finished response, for a model's tokenizer and the tokens that end its responses."""

    def __init__(self, tokenizer: Any, end_tokens: Sequence[int]):
        """Take the tokenizer and at least one end token, of which the first ends each response."""
        self._tokenizer, self._end = tokenizer, end_tokens[0]
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | {*tokenizer.all_special_ids}
        self._end_texts = [tokenizer.decode([id]) for id in end_tokens if id in self._special]

    def strip(self, text: str) -> str:
        """Return a text without one trailing end token."""
        trimmed = text.rstrip("\r\n")
        ends = [end for end in self._end_texts if trimmed.endswith(end)]
        return trimmed.removesuffix(max(ends, key=len)) if ends else text

    def __call__(self, text: str, at: str, what: str) -> dict[str, Any]:
        """Return a response as a pairs log holds it.

        Raises:
          DataError: the text holds a control token.
        """
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        control = sorted(self._special & {*tokens})
        if control:
            raise DataError(
                f"{at}: {what} holds the control token {self._tokenizer.decode(control[:1])!r}; remove it from the text"
            )
        tokens = [*tokens, self._end]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return {"tokens": tokens, "text": text, "finished": True}


def is_preferences(path: str) -> bool:
    """Whether a file holds preference data, and no pairs log: any format but jsonl does, and rows with its columns."""
    if not path.endswith(".jsonl") or not Path(path).is_file():
        return Path(path).exists()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and {"chosen", "rejected"} <= set(row) and "responses" not in row


def read(row: Row, rules: Rules = STRICT) -> Preference:
    """Return the preference of a row.

    Raises:
      DataError: a column that is missing or unusable, with file and row.
    """
    p = row.values.get("p_chosen")
    p = 1.0 if p is None else p
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise DataError(f"{row.at}: column 'p_chosen' must be a number from 0 to 1, got {p!r}")
    chosen, rejected = (
        conversations.unwrapped(validate.column(row, name), row.at, f"column {name!r}")
        for name in ("chosen", "rejected")
    )
    chosen, rejected = conversations.dialogue(chosen), conversations.dialogue(rejected)
    if not _is_longer(chosen) and not _is_longer(rejected):
        answers = [
            conversations.answer(value, row.at, f"column {name!r}")
            for name, value in (("chosen", chosen), ("rejected", rejected))
        ]
        validate.column(row, "prompt")
        return Preference(_prompt(row, rules), answers[0], answers[1], float(p))
    prompt, answers = _shared(row, chosen, rejected, rules)
    if row.values.get("prompt") is not None:
        _check_prompt(row, _prompt(row, rules), prompt)
    return Preference(prompt, answers[0], answers[1], float(p))


def record(
    row: Row,
    position: int,
    tokenize: ResponseTokenizer,
    counts: Counter[str],
    rules: Rules = STRICT,
    on_bad_row: Literal["error", "skip"] = "error",
) -> dict[str, Any] | None:
    """Return a row of a preference data set as a record of a pairs log, None where it is dropped.

    Args:
      position: the row's index in the data set; `load_pairs` reads the records in this order.
      counts: counts EMPTY and EQUAL rows, which are dropped, BAD rows, and the end tokens that were stripped.
      rules: see `turns.Rules`.
      on_bad_row: "skip" drops a row that cannot be used.

    Raises:
      DataError: as `read`, or a control token, unless such rows are skipped.
    """
    try:
        return _record(read(row, rules), row, position, tokenize, counts)
    except DataError:
        if on_bad_row == "error":
            raise
    counts[BAD] += 1
    return None


def _record(
    preference: Preference, row: Row, position: int, tokenize: ResponseTokenizer, counts: Counter[str]
) -> dict[str, Any] | None:
    texts = [tokenize.strip(text) for text in (preference.chosen, preference.rejected)]
    stripped = sum(map(str.__ne__, texts, (preference.chosen, preference.rejected)))
    if stripped:
        counts["end tokens stripped"] += stripped
    if reason := drop_reason(*texts):
        counts[reason] += 1
        return None
    responses = [
        tokenize(text, row.at, f"column {name!r}")
        for text, name in zip(texts, ("chosen", "rejected"), strict=True)
    ]
    messages = conversations.as_messages(preference.prompt)
    values = {name: value for name, value in row.values.items() if name not in COLUMNS[1:]}
    # whether the prompt was a text decides how it is rendered
    values["prompt"] = preference.prompt if isinstance(preference.prompt, str) else list(messages)
    return {
        "step": 0,
        "position": position,
        "hash": content_hash(messages, values, responses[0]["text"], responses[1]["text"]),
        "row": values,
        "messages": messages,
        "responses": responses,
        "shown": None,
        "flipped": None,
        "p_first": preference.p,
        "weight": 1.0,
        "reason": "",
        "scores": {},
        "failure": None,
    }


def drop_reason(chosen: str, rejected: str) -> str | None:
    """Return why a preference between two texts is dropped, None if it is not."""
    if not chosen.strip() or not rejected.strip():
        return EMPTY
    return EQUAL if chosen == rejected else None


def _is_longer(value: Any) -> bool:
    """Whether a value of chosen or rejected is a conversation that holds the prompt as well."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 1


def _prompt(row: Row, rules: Rules) -> str | tuple[Message, ...]:
    prompt = conversations.dialogue(validate.column(row, "prompt"))
    if isinstance(prompt, list) and prompt[-1] == {"role": "assistant", "content": ""}:
        prompt = prompt[:-1]  # "Assistant:", which the answer follows
    return conversations.parse(prompt, row.at, "column 'prompt'", rules)


def _shared(row: Row, chosen: Any, rejected: Any, rules: Rules) -> tuple[tuple[Message, ...], list[str]]:
    """Return the turns that two conversations share, and the answers with which they end."""
    if not (_is_longer(chosen) and _is_longer(rejected)):
        raise DataError(
            f"{row.at}: chosen and rejected must both be conversations with the prompt, or both answers"
        )
    prompts, answers = [], []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        what = f"column {name!r}"
        prompts.append(conversations.turns(value[:-1], row.at, what, rules))
        answers.append(conversations.answer(value[-1:], row.at, f"the last turn of {what}"))
    if prompts[0] != prompts[1]:
        raise DataError(
            f"{row.at}: chosen and rejected differ in more than their last turn; remove the row, or cut both after the"
            " turn in which they differ"
        )
    prompt = conversations.parse(prompts[0], row.at, "the prompt that chosen and rejected share", rules)
    assert not isinstance(prompt, str)  # it is a list
    return prompt, answers


def _check_prompt(row: Row, given: str | Sequence[Message], shared: Sequence[Message]) -> None:
    users = [message["content"] for message in shared if message["role"] == "user"]
    same = given.strip() == users[-1].strip() if isinstance(given, str) else tuple(given) == tuple(shared)
    if not same:
        raise DataError(
            f"{row.at}: column 'prompt' differs from the prompt in chosen and rejected; remove one of them"
        )
