"""From files to tokenised prompts, every row validated before the run: the factory of the `data` group.

A standard prompt is plain text and is tokenised as it is, control tokens included: whoever writes
`<|im_start|>` there means it. A conversational prompt goes through the tokenizer's chat template, and there
control tokens inside a message are ordinary text. Left out: responses (a prompt has none), truncation (a
prompt that is too long is refused or dropped, never cut).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np

from xpo_jax.data import filters, templates, validate
from xpo_jax.data.pipeline import Batches
from xpo_jax.data.rows import DataError, Prompt, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.values import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptSet(NamedTuple):
    """The prompts of one source.

    prompts: in the order of the files; at least one.
    read: rows in the files.
    dropped: how many rows each filter left out, by the field of the config that did it; zeros left out.
    fingerprint: SHA-256 over the kept rows and their messages, hexadecimal.
    """

    prompts: tuple[Prompt, ...]
    read: int
    dropped: Mapping[str, int]
    fingerprint: str

    def summary(self) -> str:
        """One line for the start-up summary."""
        lengths = [len(prompt.tokens) for prompt in self.prompts]
        why = ", ".join(f"{name} {count}" for name, count in self.dropped.items())
        return (
            f"{len(self.prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, from {self.read} rows"
            + (f"; left out: {why}" if why else "")
        )


class PromptData(NamedTuple):
    """What a run reads its prompts from."""

    train: PromptSet
    held_out: PromptSet
    shuffle: bool
    buckets: tuple[int, ...]
    pad_id: int

    def train_batches(self, batch_size: int, seed: int) -> Batches:
        """The training batches, for ever; shuffled per epoch if the config says so."""
        return Batches(
            self.train.prompts, batch_size, self.buckets, self.pad_id, seed if self.shuffle else None
        )

    def held_out_batches(self, batch_size: int, prompts: int) -> Batches:
        """Batches of the first held-out prompts, in order; iterate over it to see each prompt once.

        Args:
          prompts: how many; all where there are fewer.
        """
        return Batches(self.held_out.prompts[:prompts], batch_size, self.buckets, self.pad_id, None)

    def overlap(self) -> int:
        """How many held-out prompts are among the training prompts too, token by token."""
        train = {prompt.tokens.tobytes() for prompt in self.train.prompts}
        return sum(prompt.tokens.tobytes() in train for prompt in self.held_out.prompts)


def load_prompts(
    *,
    train: str | Sequence[str],
    held_out: str | Sequence[str],
    template: str | Sequence[Mapping[str, str]] | None,
    column: str | None,
    take: int | None,
    shuffle: bool,
    filter_length: bool,
    max_prompt_tokens: int,
    buckets: Sequence[int],
    on_long: Literal["error", "drop"],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> PromptData:
    """Reads, fills, validates, tokenises and filters all prompts of a run.

    Args:
      train, held_out: what `sources.read_rows` takes.
      template: a text or messages with `{column}` placeholders; or None.
      column: where template is None, the prompt's column, of texts or lists of messages; else None.
      take: use the first so many rows of train only; None for all. Rows beyond are not looked at.
      shuffle: a new order of train in each epoch.
      filter_length: leave out rows whose last user content is longer than 0.9 x max_new_tokens tokens.
      max_prompt_tokens: the longest prompt, tokens, chat template included.
      buckets: padded prompt lengths, tokens, rising; the last holds max_prompt_tokens.
      on_long: what becomes of longer prompts.
      tokenizer: of transformers, with a chat template where prompts are conversations.
      max_new_tokens: the longest response, tokens.

    Raises:
      ValueError: settings that do not go together, starting with the field's name.
      DataError: the first row that cannot be used, with its file and line.
    """
    if (template is None) == (column is None):
        raise ValueError("column: set template or column, and the other to None")
    if template is not None:
        templates.check(template)
    if take is not None and take < 1:
        raise ValueError(f"take: at least 1 is expected, or None for all rows; found {take}")
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens: at least 1 is expected, found {max_prompt_tokens}")
    if not buckets or buckets[0] < 1 or any(a >= b for a, b in pairwise(buckets)):
        raise ValueError(f"buckets: rising numbers from 1 on are expected, found {list(buckets)}")
    if buckets[-1] < max_prompt_tokens:
        raise ValueError(
            f"buckets: the last one, {buckets[-1]}, is shorter than max_prompt_tokens = {max_prompt_tokens}"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ValueError(
            "the tokenizer has neither a pad token nor an end token; set pad_token in its folder"
        )

    def load(source: str | Sequence[str], count: int | None) -> PromptSet:
        rows = read_rows(source)
        taken = filters.take(rows, count)
        prompts = _tokenise(taken, template, column, tokenizer)
        fitting = filters.filter_length(prompts, tokenizer, max_new_tokens) if filter_length else prompts
        kept = filters.filter_prompt_tokens(fitting, max_prompt_tokens, on_long)
        counts = {
            "take": len(rows) - len(taken),
            "filter_length": len(prompts) - len(fitting),
            "max_prompt_tokens": len(fitting) - len(kept),
        }
        dropped = {name: number for name, number in counts.items() if number}
        if not kept:
            why = ", ".join(f"{name} dropped {number}" for name, number in dropped.items())
            names = source if isinstance(source, str) else ", ".join(source)
            raise DataError(f"{names}: no prompt is left of {len(rows)} rows ({why}); loosen these fields")
        return PromptSet(tuple(kept), len(rows), dropped, _fingerprint(kept))

    return PromptData(load(train, take), load(held_out, None), shuffle, tuple(buckets), pad_id)


def _tokenise(
    rows: Sequence[Row],
    template: str | Sequence[Mapping[str, str]] | None,
    column: str | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Prompt]:
    """Fills, validates and tokenises; a row that cannot be used is an error."""
    prompts = []
    for row in rows:
        if template is not None:
            value, what = templates.fill(template, row), "the filled template"
        else:
            assert column is not None  # load_prompts has checked it
            value, what = validate.column(row, column), f"column {column!r}"
        if isinstance(value, str):
            messages: tuple[Message, ...] = (
                Message(role="user", content=validate.text(value, row.at, what)),
            )
            ids = tokenizer(value, verbose=False)["input_ids"]
        else:
            messages = validate.conversation(value, row.at, what)
            ids = _apply_chat_template(messages, row, tokenizer)
        if not ids:
            raise DataError(f"{row.at}: {what} gives no tokens")
        prompts.append(Prompt(row, messages, np.asarray(ids, np.int32)))
    return prompts


def _apply_chat_template(
    messages: Sequence[Message], row: Row, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.at}: a conversation needs a chat template and the tokenizer has none; use plain text"
        )
    try:
        ids = tokenizer.apply_chat_template(
            cast(list[dict[str, str]], messages),
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
    except Exception as error:  # a chat template is a program of the model's and can refuse in any way
        text = " ".join(str(error).split())
        raise DataError(
            f"{row.at}: the tokenizer's chat template refuses the conversation: {text}"
        ) from error
    return cast(list[int], ids)


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        line: list[Any] = [prompt.row.values, prompt.messages]
        digest.update(json.dumps(line, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
