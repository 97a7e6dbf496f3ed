"""From sources to prompts: the factory of the config's `data` group.

The transforms run in this order: select, rename, template, filter_tokens, filter_length, max_prompt_tokens
(transforms.py), then deduplicate, take and shuffle. Up to 50,000 rows, all of this happens before the run, and the
prompts are held in memory. A prompt of a larger source is made when its batch is read (streaming.py); only deduplicate
and take, which need every row, read them all first.
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
from xpo_jax.data.sources import Source, open_rows, source_name
from xpo_jax.data.streaming import StreamingPrompts
from xpo_jax.data.transforms import REASONS, Check, TokenFilter, Transforms, TransformSettings
from xpo_jax.data.turns import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Larger sources are streamed. This many rows take half a minute to tokenise and some 100 MB.
MAX_ROWS_IN_MEMORY = 50_000


class PromptSet(NamedTuple):
    """The prompts of one source.

    prompts: in the order of the source; at least one. A tuple if they are in memory, otherwise StreamingPrompts.
    read: rows in the source.
    dropped: how many rows each transform excluded, by config field, without zeros. For StreamingPrompts that did
      not need every row: of the first rows only.
    note: further text for the start-up summary.
    fingerprint: hexadecimal SHA-256 over the rows kept and their messages; for StreamingPrompts that did not need
      every row, over `sources`.
    sources: what was read: files with size and SHA-256, data sets with their commits.
    """

    prompts: Sequence[Prompt]
    read: int
    dropped: Mapping[str, int]
    note: str
    fingerprint: str
    sources: Sequence[Mapping[str, Any]]

    def summary(self) -> str:
        """Describe the prompts in one line of the start-up summary."""
        reasons = ", ".join(f"{name} {count}" for name, count in self.dropped.items())
        if isinstance(self.prompts, StreamingPrompts):
            counted = self.prompts.summary()
        else:
            lengths = [len(prompt.tokens) for prompt in self.prompts]
            counted = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens"
        return f"{counted}, from {self.read} rows" + (f"; left out: {reasons}" if reasons else "") + self.note


class PromptData(NamedTuple):
    """The prompts of a run, and how they are batched."""

    train: PromptSet
    held_out: PromptSet
    shuffle: bool
    buckets: tuple[int, ...]
    pad_id: int

    def train_batches(self, batch_size: int, seed: int) -> Batches:
        """Return the training batches, endless; shuffled in each epoch if the config asks for it."""
        return Batches(
            self.train.prompts, batch_size, self.buckets, self.pad_id, seed if self.shuffle else None
        )

    def held_out_batches(self, batch_size: int, prompts: int) -> Batches:
        """Return batches of the first held-out prompts, in order; iterating gives each prompt once.

        Args:
          prompts: how many; all of them if there are fewer.
        """
        held_out = self.held_out.prompts
        first = held_out.head(prompts) if isinstance(held_out, StreamingPrompts) else held_out[:prompts]
        return Batches(first, batch_size, self.buckets, self.pad_id, None)

    def overlap(self) -> int | None:
        """Count the held-out prompts whose tokens are also those of a training prompt.

        Returns:
          None if either set is streamed.
        """
        if any(isinstance(data.prompts, StreamingPrompts) for data in (self.train, self.held_out)):
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
    on_extra_keys: Literal["error", "drop"],
    on_assistant_last: Literal["error", "drop"],
    deduplicate: bool,
    take: int | None,
    shuffle: bool,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    check: Check | None,
) -> PromptData:
    """Read, fill, validate, tokenise and filter the prompts of a run.

    The keyword arguments up to `shuffle` are the fields of the config's `data` group, hence their number; setup.py
    gives the others.

    Args:
      train, held_out: what `sources.open_rows` takes.
      select: the columns to keep; None for all.
      rename: new names of columns, by their old ones.
      template: text or messages with `{column}` placeholders; or None.
      column: if template is None, the column that holds the prompt, text or a list of messages; otherwise None.
      filter_tokens: {"columns": names, "combine": "max" or "sum", "max_tokens": n}, see `transforms.TokenFilter`.
      filter_length: exclude rows whose last user content is longer than 0.9 x max_new_tokens tokens: for tasks
        in which the response is about as long as the text, such as paraphrasing.
      max_prompt_tokens: the longest prompt, tokens, chat template included.
      buckets: padded prompt lengths, tokens, increasing; the last holds max_prompt_tokens.
      on_long: what happens to longer prompts.
      on_bad_row: what happens to unusable rows.
      on_extra_keys, on_assistant_last: see `turns.Rules`.
      deduplicate: of prompts with the same tokens, keep the first.
      take: use only the first `take` prompts of train; None for all. Rows beyond them are not read.
      shuffle: order train differently in each epoch.
      tokenizer: of transformers, with a chat template where prompts are conversations.
      max_new_tokens: the longest response, tokens.
      check: the judge's; raises ValueError for a conversation and row that it cannot judge.

    Raises:
      ValueError: settings that contradict each other; the message begins with the field's name.
      DataError: the first unusable row, with its file and line.
    """
    _check_prompt_settings(template, column, select)
    _check_length_settings(take, max_prompt_tokens, buckets)
    settings = TransformSettings(
        select=select,
        rename=rename,
        template=template,
        column=column,
        filter_tokens=_token_filter(filter_tokens),
        # in integers: 0.9 x 10 is not 9 in floating point
        filter_length=9 * max_new_tokens // 10 if filter_length else None,
        max_prompt_tokens=max_prompt_tokens,
        on_long=on_long,
        on_bad_row=on_bad_row,
        conversations=Rules(on_extra_keys, on_assistant_last),
    )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ValueError(
            "the tokenizer has neither a pad token nor an end token; set pad_token in its folder"
        )
    train_set = _load(train, Transforms(settings, tokenizer, check), take, deduplicate)
    held_out_set = _load(held_out, Transforms(settings, tokenizer, check), None, deduplicate)
    return PromptData(train_set, held_out_set, shuffle, tuple(buckets), pad_id)


def _check_prompt_settings(
    template: str | Sequence[Mapping[str, str]] | None, column: str | None, select: Sequence[str] | None
) -> None:
    if (template is None) == (column is None):
        raise ValueError("column: set either template or column, and the other to None")
    if template is not None:
        templates.check(template)
    if select is not None and not select:
        raise ValueError("select: name at least one column, or set None for all")


def _check_length_settings(take: int | None, max_prompt_tokens: int, buckets: Sequence[int]) -> None:
    if take is not None and take < 1:
        raise ValueError(f"take: must be at least 1, or None for all rows; got {take}")
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens: must be at least 1, got {max_prompt_tokens}")
    check_increasing(buckets, "buckets")
    if buckets[-1] < max_prompt_tokens:
        raise ValueError(
            f"buckets: the last one, {buckets[-1]}, is shorter than max_prompt_tokens = {max_prompt_tokens}"
        )


def _token_filter(fields: Mapping[str, Any] | None) -> TokenFilter | None:
    if fields is None:
        return None
    token_filter = schema.build(TokenFilter, fields, "data.filter_tokens")
    if not token_filter.columns or token_filter.max_tokens < 1:
        raise ValueError("filter_tokens: needs at least one column, and max_tokens of at least 1")
    return token_filter


def _load(source: Source, transforms: Transforms, take: int | None, deduplicate: bool) -> PromptSet:
    rows = open_rows(source)
    in_memory = min(len(rows), take or len(rows)) <= MAX_ROWS_IN_MEMORY
    if not in_memory and take is None and not deduplicate:
        streaming = StreamingPrompts(source_name(source), rows, transforms)
        digest = hashlib.sha256(json.dumps(list(rows.identity), sort_keys=True).encode())
        return PromptSet(
            streaming,
            len(rows),
            streaming.dropped,
            _note(transforms),
            digest.hexdigest(),
            tuple(rows.identity),
        )
    dropped: Counter[str] = Counter()
    prompts: list[Prompt] = []
    indices: list[int] = []
    lengths: list[int] = []
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    for index in range(len(rows)):
        if take is not None and len(indices) == take:
            dropped["take"] = len(rows) - index
            break
        prompt = transforms(rows, index)
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
        indices.append(index)
        lengths.append(len(prompt.tokens))
        if in_memory:
            prompts.append(prompt)
    counts = {name: dropped[name] for name in REASONS if dropped[name]}
    if not indices:
        reasons = ", ".join(f"{name} dropped {count}" for name, count in counts.items())
        first = f"; first: {transforms.first_bad}" if transforms.first_bad else ""
        raise DataError(
            f"{source_name(source)}: no prompt is left of {len(rows)} rows ({reasons}{first}); loosen these fields"
        )
    prompt_set: Sequence[Prompt] = tuple(prompts)
    if not in_memory:
        prompt_set = StreamingPrompts(
            source_name(source), rows, transforms, np.array(indices, np.int64), np.array(lengths, np.int32)
        )
    return PromptSet(
        prompt_set, len(rows), counts, _note(transforms), digest.hexdigest(), tuple(rows.identity)
    )


def _note(transforms: Transforms) -> str:
    left_out, first_bad = transforms.columns_left_out, transforms.first_bad
    columns = f"; columns left out by select: {', '.join(left_out)}" if left_out else ""
    changes = ", ".join(f"{name} {count}" for name, count in sorted(transforms.conversation_changes.items()))
    columns += f"; dropped from conversations: {changes}" if changes else ""
    return columns + (f"; the first bad row: {first_bad}" if first_bad else "")
