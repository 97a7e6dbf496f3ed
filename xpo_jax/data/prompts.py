"""From sources to prompts: the factory of the `data` group.

The steps in their order: select, rename, template, filter_tokens, filter_length, max_prompt_tokens (transforms.py),
then deduplicate, take and shuffle. Up to 50,000 rows all of this is done before the run, and the prompts are held in
memory. Of a larger source a prompt is made when its batch is asked for (streaming.py); only deduplicate and take, which
need all rows, look at all of them first.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from xpo_jax.config import schema
from xpo_jax.config.schema import check_increasing
from xpo_jax.data import templates
from xpo_jax.data.batches import Batches
from xpo_jax.data.rows import DataError, Prompt
from xpo_jax.data.sources import Source, named, open_rows
from xpo_jax.data.streaming import PassingPrompts
from xpo_jax.data.transforms import REASONS, Check, Steps, TokenFilter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sources of more rows are read as the run goes on. Half a minute of tokenising, some 100 MB.
MAX_ROWS_IN_MEMORY = 50_000


class PromptSet(NamedTuple):
    """The prompts of one source.

    prompts: in the order of the source; at least one. In memory as a tuple, else PassingPrompts.
    read: rows in the source.
    dropped: how many rows each step left out, by the field of the config that did it; zeros left out. Of
      PassingPrompts without a look at all rows: of the first ones.
    note: more for the start-up summary.
    fingerprint: SHA-256 over the kept rows and their messages, or of PassingPrompts over `sources`; hexadecimal.
    sources: what was read: files with size and SHA-256, data sets with their commits.
    """

    prompts: Sequence[Prompt]
    read: int
    dropped: Mapping[str, int]
    note: str
    fingerprint: str
    sources: Sequence[Mapping[str, Any]]

    def summary(self) -> str:
        """One line for the start-up summary."""
        why = ", ".join(f"{name} {count}" for name, count in self.dropped.items())
        if isinstance(self.prompts, PassingPrompts):
            counted = self.prompts.described()
        else:
            lengths = [len(prompt.tokens) for prompt in self.prompts]
            counted = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens"
        return f"{counted}, from {self.read} rows" + (f"; left out: {why}" if why else "") + self.note


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
        held_out = self.held_out.prompts
        first = held_out.first(prompts) if isinstance(held_out, PassingPrompts) else held_out[:prompts]
        return Batches(first, batch_size, self.buckets, self.pad_id, None)

    def overlap(self) -> int | None:
        """How many held-out prompts are among the training prompts too, token by token.

        Returns:
          None where one of them is not in memory.
        """
        if any(isinstance(each.prompts, PassingPrompts) for each in (self.train, self.held_out)):
            return None
        train = {prompt.tokens.tobytes() for prompt in self.train.prompts}
        return sum(prompt.tokens.tobytes() in train for prompt in self.held_out.prompts)


def load_prompts(
    *,
    train: Source,
    held_out: Source,
    select: Sequence[str] | None,
    rename: Mapping[str, str] | None,
    template: str | Sequence[Mapping[str, str]] | None,
    column: str | None,
    filter_tokens: Mapping[str, Any] | None,
    filter_length: bool,
    max_prompt_tokens: int,
    buckets: Sequence[int],
    on_long: Literal["error", "drop"],
    on_bad_row: Literal["error", "skip"],
    deduplicate: bool,
    take: int | None,
    shuffle: bool,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    check: Check | None,
) -> PromptData:
    """Reads, fills, validates, tokenises and filters the prompts of a run.

    Args:
      train, held_out: what `sources.open_rows` takes.
      select: the columns to keep; None for all.
      rename: new names of columns, by their old ones.
      template: a text or messages with `{column}` placeholders; or None.
      column: where template is None, the prompt's column, of texts or lists of messages; else None.
      filter_tokens: {"columns": names, "combine": "max" or "sum", "max_tokens": n}, see `steps.TokenFilter`.
      filter_length: leave out rows whose last user content is longer than 0.9 x max_new_tokens tokens: for tasks
        in which the answer is about as long as the text, such as a paraphrase.
      max_prompt_tokens: the longest prompt, tokens, chat template included.
      buckets: padded prompt lengths, tokens, rising; the last holds max_prompt_tokens.
      on_long: what becomes of longer prompts.
      on_bad_row: what becomes of rows that cannot be used.
      deduplicate: of prompts with the same tokens keep the first.
      take: use the first so many prompts of train only; None for all. Rows beyond are not looked at.
      shuffle: a new order of train in each epoch.
      tokenizer: of transformers, with a chat template where prompts are conversations.
      max_new_tokens: the longest response, tokens.
      check: of the judge; raises ValueError for a conversation and row that it cannot judge.

    Raises:
      ValueError: settings that do not go together, starting with the field's name.
      DataError: the first row that cannot be used, with its file and line.
    """
    if (template is None) == (column is None):
        raise ValueError("column: set template or column, and the other to None")
    if template is not None:
        templates.check(template)
    if select is not None and not select:
        raise ValueError("select: at least one column is expected, or None for all")
    if take is not None and take < 1:
        raise ValueError(f"take: at least 1 is expected, or None for all rows; found {take}")
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens: at least 1 is expected, found {max_prompt_tokens}")
    check_increasing(buckets, "buckets")
    if buckets[-1] < max_prompt_tokens:
        raise ValueError(
            f"buckets: the last one, {buckets[-1]}, is shorter than max_prompt_tokens = {max_prompt_tokens}"
        )
    limits = None
    if filter_tokens is not None:
        limits = schema.build(TokenFilter, filter_tokens, "data.filter_tokens")
        if not limits.columns or limits.max_tokens < 1:
            raise ValueError("filter_tokens: at least one column and max_tokens of at least 1 are expected")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ValueError(
            "the tokenizer has neither a pad token nor an end token; set pad_token in its folder"
        )

    def load(source: Source, count: int | None) -> PromptSet:
        steps = Steps(
            tokenizer=tokenizer,
            select=select,
            rename=rename,
            template=template,
            column=column,
            filter_tokens=limits,
            # in integers: 0.9 x 10 is not 9 in floating point
            filter_length=9 * max_new_tokens // 10 if filter_length else None,
            max_prompt_tokens=max_prompt_tokens,
            on_long=on_long,
            on_bad_row=on_bad_row,
            check=check,
        )
        return _load(source, steps, count, deduplicate)

    return PromptData(load(train, take), load(held_out, None), shuffle, tuple(buckets), pad_id)


def _load(source: Source, steps: Steps, take: int | None, deduplicate: bool) -> PromptSet:
    rows = open_rows(source)
    small = min(len(rows), take or len(rows)) <= MAX_ROWS_IN_MEMORY
    if not small and take is None and not deduplicate:
        passing = PassingPrompts(named(source), rows, steps)
        digest = hashlib.sha256(json.dumps(list(rows.identity), sort_keys=True).encode())
        return PromptSet(
            passing, len(rows), passing.dropped, _note(steps), digest.hexdigest(), tuple(rows.identity)
        )
    dropped: Counter[str] = Counter()
    prompts: list[Prompt] = []
    places: list[int] = []
    lengths: list[int] = []
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    for index in range(len(rows)):
        if take is not None and len(places) == take:
            dropped["take"] = len(rows) - index
            break
        prompt = steps(rows, index)
        if isinstance(prompt, str):
            dropped[prompt] += 1
            continue
        if deduplicate:
            key = hashlib.blake2b(prompt.tokens.tobytes(), digest_size=16).digest()
            if key in seen:
                dropped["deduplicate"] += 1
                continue
            seen.add(key)
        line: list[Any] = [prompt.row.values, prompt.messages]
        digest.update(json.dumps(line, sort_keys=True).encode() + b"\n")
        places.append(index)
        lengths.append(len(prompt.tokens))
        if small:
            prompts.append(prompt)
    if not places:
        why = ", ".join(f"{name} dropped {dropped[name]}" for name in REASONS if dropped[name])
        first = f"; first: {steps.first_bad}" if steps.first_bad else ""
        raise DataError(
            f"{named(source)}: no prompt is left of {len(rows)} rows ({why}{first}); loosen these fields"
        )
    counts = {name: dropped[name] for name in REASONS if dropped[name]}
    kept: Sequence[Prompt] = tuple(prompts)
    if not small:
        kept = PassingPrompts(
            named(source), rows, steps, np.array(places, np.int64), np.array(lengths, np.int32)
        )
    return PromptSet(kept, len(rows), counts, _note(steps), digest.hexdigest(), tuple(rows.identity))


def _note(steps: Steps) -> str:
    columns = (
        f"; columns left out by select: {', '.join(steps.columns_left_out)}" if steps.columns_left_out else ""
    )
    return columns + (f"; the first bad row: {steps.first_bad}" if steps.first_bad else "")
