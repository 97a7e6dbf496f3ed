"""The prompts of a run: of training or, offline, of recorded pairs; of evaluations; and the answers that these meet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.config.evaluation import Evaluation
from xpo_jax.data.answer_files import match_answers
from xpo_jax.data.batches import Batches
from xpo_jax.data.offline_pairs import load_pairs, log_files
from xpo_jax.data.preferences import is_preferences
from xpo_jax.data.prompts import PromptData, load_prompts
from xpo_jax.data.split import HeldOut, check_held_out
from xpo_jax.data.turns import Rules
from xpo_jax.io.text import one_line, shorten
from xpo_jax.judges import contract
from xpo_jax.judges.contract import Judge
from xpo_jax.values import Prompts


class Data(NamedTuple):
    """The prompts of a run.

    prompts: all that were loaded. batches: those of training, by step.
    held_out: batches of an evaluation. answers: for each of these batches, answers that the policy's samples meet.
    """

    prompts: PromptData
    batches: Batches
    held_out: list[Prompts]
    answers: list[list[str]] | None


def load_data(
    config: ConfigDict,
    evaluation: Evaluation,
    judge: Judge,
    tokenizer: Any,
    *,
    evaluation_judge: Judge,
    end_tokens: Collection[int],
    max_new_tokens: int,
) -> Data:
    """Load the prompts of the run that a config describes.

    Args:
      evaluation: the config's group.
      judge, evaluation_judge: each checks the prompts that it will judge.
      tokenizer, end_tokens: the policy's.
      max_new_tokens: the longest response, tokens.

    Raises:
      ValueError: as `load_prompts`, `load_pairs` and `match_answers`.
    """
    group = dict(config.data)
    if config.offline is not None:
        group["train"] = _offline_train(config)
    prompts = configs.build(
        load_prompts,
        group,
        "data",
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        check=lambda messages, row: contract.check(judge, messages, row),
    )
    if config.offline is not None:
        names = (
            *("template", "column", "max_prompt_tokens", "on_long", "take", "chat_template_arguments"),
            *("on_bad_row", "on_extra_keys", "on_assistant_last"),
        )
        pairs = configs.build(
            load_pairs,
            config.offline,
            "offline",
            **{name: config.data[name] for name in names},
            tokenizer=tokenizer,
            end_tokens=end_tokens,
            max_new_tokens=max_new_tokens,
        )
        prompts = prompts._replace(train=pairs)
    batches = prompts.train_batches(config.batch_size, config.seed)
    held_out = list(prompts.held_out_batches(config.batch_size, evaluation.prompts))
    if evaluation_judge is not judge:
        _check_held_out(held_out, evaluation_judge)
    answers = None
    if evaluation.answers is not None:
        columns = {name: config.data[name] for name in ("template", "column", "rename")}
        rules = Rules(config.data.on_extra_keys, config.data.on_assistant_last)
        answers = match_answers(held_out, evaluation.answers, **columns, rules=rules)
    return Data(prompts, batches, held_out, answers)


def _check_held_out(held_out: Sequence[Prompts], judge: Judge) -> None:
    """Raise ValueError where the judge of evaluations alone cannot judge a held-out prompt."""
    for batch in held_out:
        for i in map(int, np.flatnonzero(batch.valid)):
            try:
                contract.check(judge, batch.messages[i], batch.rows[i])
            except ValueError as error:
                prompt = shorten(one_line(str(batch.messages[i][-1]["content"])), 60)
                raise ValueError(f"evaluation.judge: the held-out prompt {prompt!r}: {error}") from error


def _offline_train(config: ConfigDict) -> Any:
    """Return what is read in place of data.train, whose prompts those of the recorded pairs will replace.

    Raises:
      ValueError: preference data from elsewhere, with the held-out prompts of the package.
    """
    held_out = configs.plain(config.data.held_out, "data.held_out")
    try:
        files = log_files(configs.plain(config.offline.pairs, "offline.pairs"))
    except ValueError:
        files = []  # load_pairs will raise it
    preferences = [file for file in files if is_preferences(file)]
    try:
        split_off = isinstance(check_held_out(preferences or "embedded:train", held_out), HeldOut)
    except ValueError as error:
        raise ValueError(f"data.{error}") from error
    return config.data.train if split_off else held_out
