"""Which prompts are left out, and how many.

Each filter takes prompts and returns those that it keeps, in their order; the caller counts the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from xpo_jax.data.rows import DataError, Prompt, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def take(rows: Sequence[Row], count: int | None) -> Sequence[Row]:
    """The first `count` rows, or all of them for None or where there are fewer."""
    return rows[:count]


def filter_length(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[Prompt]:
    """Leaves out prompts whose last user content is longer than 0.9 x max_new_tokens tokens.

    For tasks in which the answer is about as long as the text, such as a paraphrase: a longer text could not
    be answered in full.
    """
    texts = [prompt.messages[-1]["content"] for prompt in prompts]
    tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # in integers: 0.9 x 10 is not 9 in floating point
    return [p for p, ids in zip(prompts, tokens, strict=True) if 10 * len(ids) <= 9 * max_new_tokens]


def filter_prompt_tokens(
    prompts: Sequence[Prompt], max_prompt_tokens: int, on_long: Literal["error", "drop"]
) -> list[Prompt]:
    """Leaves out prompts longer than max_prompt_tokens, or refuses them.

    Raises:
      DataError: for on_long "error", the first of them.
    """
    for prompt in prompts:
        if on_long == "error" and len(prompt.tokens) > max_prompt_tokens:
            raise DataError(
                f"{prompt.row.at}: the prompt has {len(prompt.tokens)} tokens, more than "
                f"max_prompt_tokens = {max_prompt_tokens}; raise it, or set on_long = 'drop'"
            )
    return [prompt for prompt in prompts if len(prompt.tokens) <= max_prompt_tokens]
