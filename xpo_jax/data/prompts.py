"""From sources to prompts: the factory of the config's `data` group.

The transforms run in this order: select, rename, template, filter_tokens, filter_length, max_prompt_tokens
(transforms.py), then deduplicate, take and shuffle. Up to 50,000 rows, all of this happens before the run, and the
prompts are held in memory. A prompt of a larger source is made when its batch is read (streaming.py); only deduplicate
and take, which need every row, read them all first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from xpo_jax.config import schema
from xpo_jax.config.schema import check_increasing
from xpo_jax.data import templates
from xpo_jax.data.batches import Batches
from xpo_jax.data.prompt_sets import PromptSet, load_set, split_set
from xpo_jax.data.sources import Source
from xpo_jax.data.split import HeldOut, check_held_out
from xpo_jax.data.streaming import StreamingPrompts
from xpo_jax.data.transforms import Check, TokenFilter, Transforms, TransformSettings
from xpo_jax.data.turns import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    held_out: Source | float,
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
    chat_template_arguments: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    check: Check | None,
) -> PromptData:
    """Read, fill, validate, tokenise and filter the prompts of a run.

    The keyword arguments up to `chat_template_arguments` are the fields of the config's `data` group, hence their
    number; setup.py gives the others.

    Args:
      train: what `sources.open_rows` takes.
      held_out: the same, or what to split off from train: a fraction below 1 or a number of prompts, or
        {"size": fraction or number, "seed": 0}.
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
      chat_template_arguments: values for variables of the chat template, such as {"enable_thinking": False} of Qwen3's
        or {"date_string": "26 Jul 2024"} of Llama's, which else is the present day.
      tokenizer: of transformers, with a chat template where prompts are conversations.
      max_new_tokens: the longest response, tokens.
      check: the judge's; raises ValueError for a conversation and row that it cannot judge.

    Raises:
      ValueError: settings that contradict each other; the message begins with the field's name.
      DataError: the first unusable row, with its file and line.
    """
    # long: one argument for each field of the group
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
        chat_template_arguments=chat_template_arguments,
    )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ValueError(
            "the tokenizer has neither a pad token nor an end token; set pad_token in its folder"
        )
    train_transforms = Transforms(settings, tokenizer, check)
    if isinstance(other := check_held_out(train, held_out), HeldOut):
        train_set, held_out_set = split_set(train, train_transforms, other, take, deduplicate)
    else:
        train_set = load_set(train, train_transforms, take, deduplicate)
        held_out_set = load_set(other, Transforms(settings, tokenizer, check), None, deduplicate)
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
