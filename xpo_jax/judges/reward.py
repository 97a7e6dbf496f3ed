"""Judges that score each answer by itself: a reward model on the devices, or a function of yours.

The verdict is sigmoid((score of A - score of B) / temperature), or the higher one wins where the temperature is 0;
equal scores tie. Each answer is seen alone, so the order shown makes no difference, and nothing that one answer says
can be taken for the other's. Control tokens in a text are ordinary text.

`reward_model` reads a Hugging Face folder of a sequence classifier with one label: the conversation with
the answer goes through the folder's chat template, and the score is taken from the last token of what comes out.
`reward_function` calls score(prompt, answer), where prompt is the last turn of the user's.

Left out on purpose: reward models of other families, and several labels. What runs on the devices is `device_model.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xpo_jax.config.schema import check_increasing, resolve
from xpo_jax.io.text import error_line
from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.device_model import RewardScorer
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.models.hf.tensors import read_model_json
from xpo_jax.models.registry import family
from xpo_jax.values import Comparison, Message, Params, Verdict

Score = Callable[[str, str], float | None]


def verdict(a: float | None, b: float | None, temperature: float) -> Verdict:
    """The verdict of two scores; none where one is missing or nan. Infinite ones win or lose as they should."""
    missing = [name for name, score in (("A", a), ("B", b)) if score is None or math.isnan(score)]
    if a is None or b is None or missing:
        return Verdict(None, f"no score for {' and '.join(missing)}", {"a": a, "b": b})
    if a == b:
        p = 0.5
    elif temperature == 0:
        p = float(a > b)
    else:
        p = 0.5 + 0.5 * math.tanh((a - b) / temperature / 2)  # the sigmoid, without overflow
    return Verdict(p, f"A {a:.4g}; B {b:.4g}", {"a": a, "b": b})


def _check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, must be 0 (hard verdicts) or more")


# ---- a model ------------------------------------------------------------------------------------


class RewardModel:
    """Compares two answers by a reward model's scores; a `values.DeviceJudge`."""

    collective = True

    def __init__(self, path: str, temperature: float, batch_size: int, buckets: Sequence[int], on_long: str):
        """Take what `reward_model` has checked."""
        self._path, self._temperature = path, temperature
        self._batch_size, self._buckets, self._on_long = batch_size, tuple(buckets), on_long

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Learn on what the run computes; of its model nothing is used.

        Raises:
          ValueError: a batch that the mesh does not divide, a folder that holds no such model, a tokenizer without
            chat template.
        """
        shares = mesh.shape["data"] * mesh.shape["fsdp"]
        if self._batch_size % shares:
            raise ValueError(
                f"judge.batch_size {self._batch_size} is not divisible by mesh.data x mesh.fsdp = {shares}"
            )
        self._found = hub.find(self._path)
        self._folder = self._found.folder
        # a classifier has no lm_head, even if its config.json has untied embeddings
        config = dataclasses.replace(model_folder.read_config(self._folder), tie_word_embeddings=True)
        classifier = family(config)
        stated = read_model_json(self._folder / "config.json").get("architectures")
        if stated != [classifier.reward_architecture]:
            raise ValueError(
                f"judge.path: {self._folder} is a model of the architectures {stated}, not of"
                f" {classifier.reward_architecture}"
            )
        model_folder.check_params(self._folder, config, {classifier.reward_head: (1, config.hidden_size)})
        self._tokenizer = model_folder.load_tokenizer(self._folder, config)
        if self._tokenizer.chat_template is None:
            raise ValueError(f"judge.path: the tokenizer of {self._folder} has no chat template")
        self._scores = RewardScorer(
            mesh, config, dtype=dtype, batch_size=self._batch_size, buckets=self._buckets
        )

    def models(self) -> list[dict[str, str | None]]:
        """The model, for environment.json; called after `attach`."""
        return [{"path": self._found.given, "commit": self._found.commit}]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Refuse a prompt that is too long even without an answer, if that is an error.

        Raises:
          ValueError: that, or a conversation that the chat template refuses.
        """
        self._fits(len(self._tokens(messages, "")))

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """The compilations: what to show of each, and the call that compiles it."""
        return self._scores.declared_programs()

    def load(self, starting: Params | None) -> None:
        """Read the model's weights."""
        self._scores.load(self._folder)

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison; `scores` holds the reward of both answers under "a" and "b".

        Raises:
          ValueError: a conversation that is too long, if that is an error.
        """
        asked = [self._tokens(c.messages, answer) for c in comparisons for answer in (c.a, c.b)]
        fits = [self._fits(len(tokens)) for tokens in asked]
        found = [
            float(score) if fit else None for fit, (score,) in zip(fits, self._scores(asked), strict=True)
        ]
        return [verdict(a, b, self._temperature) for a, b in zip(found[::2], found[1::2], strict=True)]

    def _fits(self, length: int) -> bool:
        fits = length <= self._buckets[-1]
        if not fits and self._on_long == "error":
            raise JudgeError(
                f"a conversation with its answer has {length} tokens, the last of judge.buckets holds"
                f" {self._buckets[-1]}; raise it, or set judge.on_long to 'no_verdict' to go on without a verdict"
            )
        return fits

    def _tokens(self, messages: Sequence[Message], answer: str) -> list[int]:
        turns = [*map(dict, messages), {"role": "assistant", "content": answer}]
        try:
            return list(
                self._tokenizer.apply_chat_template(turns, return_dict=False, sanitize_control_tokens=True)
            )
        except Exception as error:  # a chat template is a program of the model's and can refuse in any way
            raise JudgeError(
                f"judge.path: the reward model's chat template refuses it: {error_line(error)}"
            ) from error


def reward_model(
    *,
    path: str,
    temperature: float,
    batch_size: int,
    buckets: Sequence[int],
    on_long: Literal["error", "no_verdict"],
) -> RewardModel:
    """Build the judge.

    Args:
      path: a folder or hub name of a sequence classifier with one label.
      temperature: what a difference of scores is divided by; 1 is how most reward models were trained (Bradley and
        Terry), 0 gives hard verdicts.
      batch_size: rows per call on the devices, divisible by mesh.data x mesh.fsdp; a comparison is two.
      buckets: padded lengths of a conversation with its answer, tokens, rising.
      on_long: a longer one ends the run, or has no score and counts as failed.

    Raises:
      ValueError: values that are out of range; the field stands first.
    """
    _check_temperature(temperature)
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1 is expected, found {batch_size}")
    check_increasing(buckets, "buckets")
    return RewardModel(path, temperature, batch_size, buckets, on_long)


# ---- a function ---------------------------------------------------------------------------------


class RewardFunction:
    """Compares two answers by what a function scores them."""

    def __init__(self, score: Score, temperature: float):
        """Take what `reward_function` has checked."""
        self._score, self._temperature = score, temperature

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison; one that the function fails on has no verdict, and the others theirs."""
        return [self._compare(comparison) for comparison in comparisons]

    def _compare(self, comparison: Comparison) -> Verdict:
        try:
            a, b = self._number(comparison, comparison.a), self._number(comparison, comparison.b)
        except Exception as error:  # the user's own code can fail in any way
            return Verdict(None, f"the score failed: {type(error).__name__}: {error}")
        return verdict(a, b, self._temperature)

    def parts(self, messages: Sequence[Message], text: str) -> dict[str, Any]:
        """The score of one answer, for the evaluation's tables; none where the function fails."""
        try:
            score = self._number(Comparison(messages, {}, "", ""), text)
        except Exception:  # as above; the verdict tells it
            return {}
        return {} if score is None or not math.isfinite(score) else {"score": score}

    def _number(self, comparison: Comparison, answer: str) -> float | None:
        users = [message["content"] for message in comparison.messages if message["role"] == "user"]
        score = self._score(users[-1] if users else "", answer)
        if score is None:
            return None
        if not isinstance(score, numbers.Real):
            raise TypeError(f"{type(score).__name__} is no score; return a number, or None")
        return float(score)


def reward_function(*, function: str, temperature: float) -> RewardFunction:
    """Build the judge.

    Args:
      function: package.module:Name of score(prompt, answer) -> number, or None for no score. It gets two texts: the
        last turn of the user's, and an answer.
      temperature: see `reward_model`; choose it near the typical difference of two scores.

    Raises:
      ValueError: no such function, or one that does not take two arguments.
    """
    _check_temperature(temperature)
    score = resolve(function, "judge.function", {})
    try:
        inspect.signature(score).bind("prompt", "answer")
    except TypeError:
        takes = inspect.signature(score)
        raise ValueError(
            f"judge.function: {function} is called as score(prompt, answer), but takes {takes}"
        ) from None
    except ValueError:  # some builtins do not tell what they take
        pass
    return RewardFunction(score, temperature)
