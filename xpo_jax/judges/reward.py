"""Judges that score each answer by itself: a reward model on the devices, or a user's function.

p = sigmoid((score of A - score of B) / temperature); at temperature 0 the higher score wins. Equal scores tie. Each
answer is scored alone, so the order shown makes no difference, and no answer can pretend to be the other one. Control
tokens in a text are ordinary text.

`reward_model` reads the Hugging Face folder of a sequence-classification model with one label. The conversation with
the answer goes through the folder's chat template, and the score is read at the last token. `reward_function` calls
score(prompt, answer), where prompt is the last user turn.

Left out on purpose: reward models with several labels. The model runs in `device_model.py`.
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
from xpo_jax.data.chat_templates import ChatTemplate
from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.device_model import RewardScorer, check_divisible
from xpo_jax.judges.scores import win_probability
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.models.hf.tensors import read_model_json
from xpo_jax.models.registry import family
from xpo_jax.values import Candidate, Comparison, Message, Params, Verdict

Score = Callable[[str, str], float | None]


def verdict(a: float | None, b: float | None, temperature: float) -> Verdict:
    """Return the verdict for two scores; none if either is missing or nan. Infinite scores win or lose."""
    missing = [name for name, score in (("A", a), ("B", b)) if score is None or math.isnan(score)]
    if a is None or b is None or missing:
        return Verdict(None, f"no score for {' and '.join(missing)}", {"a": a, "b": b})
    return Verdict(win_probability(a, b, temperature), f"A {a:.4g}; B {b:.4g}", {"a": a, "b": b})


def _check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (hard verdicts) or more")


# ---- a model ------------------------------------------------------------------------------------


class RewardModel:
    """Compares two answers by a reward model's scores; a `contract.DeviceJudge`."""

    collective = True

    def __init__(
        self,
        path: str,
        temperature: float,
        batch_size: int,
        buckets: Sequence[int],
        on_long: str,
        chat_template_arguments: Mapping[str, Any] | None,
    ):
        """Take what `reward_model` has checked."""
        self._chat_template_arguments = chat_template_arguments
        self._path, self._temperature = path, temperature
        self._batch_size, self._buckets, self._on_long = batch_size, tuple(buckets), on_long

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Open the reward model for the run's mesh and dtype; nothing of the policy is used.

        Raises:
          ValueError: the batch size is not divisible over the mesh, the folder holds no such model, or its tokenizer
            has no chat template, or one that does not read an argument.
        """
        check_divisible(self._batch_size, mesh)
        self._source = hub.find(self._path)
        self._folder = self._source.folder
        # a classifier has no lm_head, even if its config.json has untied embeddings
        config = dataclasses.replace(model_folder.read_config(self._folder), tie_word_embeddings=True)
        classifier = family(config)
        architectures = read_model_json(self._folder / "config.json").get("architectures")
        if architectures != [classifier.reward_architecture]:
            raise ValueError(
                f"judge.path: {self._folder} is a model of the architectures {architectures}, not of"
                f" {classifier.reward_architecture}"
            )
        model_folder.check_params(self._folder, config, {classifier.reward_head: (1, config.hidden_size)})
        self._tokenizer = model_folder.load_tokenizer(self._folder, config)
        if self._tokenizer.chat_template is None:
            raise ValueError(f"judge.path: the tokenizer of {self._folder} has no chat template")
        try:
            self._chat_template = ChatTemplate(
                self._tokenizer, "the reward model", self._chat_template_arguments
            )
        except ValueError as error:
            raise ValueError(f"judge.chat_template_arguments: {error}") from error
        self._scores = RewardScorer(
            mesh, config, dtype=dtype, batch_size=self._batch_size, buckets=self._buckets
        )

    def models(self) -> list[dict[str, str | None]]:
        """Return the model, for environment.json; called after `attach`."""
        return [{"path": self._source.given, "commit": self._source.commit}]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check that the prompt fits the last bucket, if it must, and the chat template.

        Raises:
          ValueError: it is too long even with an empty answer, or the chat template rejects it.
        """
        self._fits(len(self._tokens(messages, "")))

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """Return a label and a compile function for each bucket."""
        return self._scores.declared_programs()

    def load(self, starting: Params | None) -> None:
        """Read the model's weights."""
        self._scores.load(self._folder)

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison; the verdict's scores hold the reward of both answers under "a" and "b".

        Raises:
          JudgeError: a conversation is too long, and `on_long` is "error".
        """
        scores = self.scores([Candidate(c.messages, c.row, text) for c in comparisons for text in (c.a, c.b)])
        return [verdict(a, b, self._temperature) for a, b in zip(scores[::2], scores[1::2], strict=True)]

    def scores(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Return the reward of each answer; None for one that is too long.

        Raises:
          JudgeError: a conversation is too long, and `on_long` is "error".
        """
        sequences = [self._tokens(c.messages, c.text) for c in candidates]
        fits = [self._fits(len(tokens)) for tokens in sequences]
        return [
            float(score) if fit else None for fit, (score,) in zip(fits, self._scores(sequences), strict=True)
        ]

    def compare_scores(self, a: float, b: float) -> float:
        """Return the probability that an answer with reward `a` is better than one with reward `b`."""
        return win_probability(a, b, self._temperature)

    def _fits(self, length: int) -> bool:
        fits = length <= self._buckets[-1]
        if not fits and self._on_long == "error":
            raise JudgeError(
                f"a conversation with its answer has {length} tokens, but the last of judge.buckets holds"
                f" {self._buckets[-1]}; raise it, or set judge.on_long to 'no_verdict' to skip such pairs"
            )
        return fits

    def _tokens(self, messages: Sequence[Message], answer: str) -> list[int]:
        turns = [*messages, Message(role="assistant", content=answer)]
        try:
            return self._chat_template(turns, "a conversation", generation_prompt=False)
        except ValueError as error:
            raise JudgeError(f"judge.path: {error}") from error


def reward_model(
    *,
    path: str,
    temperature: float,
    batch_size: int,
    buckets: Sequence[int],
    on_long: Literal["error", "no_verdict"],
    chat_template_arguments: Mapping[str, Any] | None,
) -> RewardModel:
    """Build the judge.

    Args:
      path: a folder or hub name of a sequence-classification model with one label.
      temperature: divides the difference of two scores. Most reward models are trained with 1 (Bradley-Terry); 0
        gives hard verdicts.
      batch_size: rows per call on the devices, divisible by mesh.data x mesh.fsdp; a comparison has two.
      buckets: padded lengths of a conversation with its answer, tokens, increasing.
      on_long: a conversation longer than the last bucket ends the run, or has no score and counts as failed.
      chat_template_arguments: values for variables of the folder's chat template, or None.

    Raises:
      ValueError: a value out of range; the field comes first.
    """
    _check_temperature(temperature)
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1 is expected, found {batch_size}")
    check_increasing(buckets, "buckets")
    return RewardModel(path, temperature, batch_size, buckets, on_long, chat_template_arguments)


# ---- a function ---------------------------------------------------------------------------------


class RewardFunction:
    """Compares two answers by the scores of a function."""

    def __init__(self, score: Score, temperature: float):
        """Take what `reward_function` has checked."""
        self._score, self._temperature = score, temperature

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison; if the function fails on one, only that one has no verdict."""
        return [self._compare(comparison) for comparison in comparisons]

    def _compare(self, comparison: Comparison) -> Verdict:
        try:
            a, b = self._number(comparison, comparison.a), self._number(comparison, comparison.b)
        except Exception as error:  # the user's code can fail in any way
            return Verdict(None, f"the score failed: {type(error).__name__}: {error}")
        return verdict(a, b, self._temperature)

    def scores(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Return the score of each answer; None where the function fails."""
        return [self.parts(c.messages, c.text).get("score") for c in candidates]

    def compare_scores(self, a: float, b: float) -> float:
        """Return the probability that an answer with score `a` is better than one with score `b`."""
        return win_probability(a, b, self._temperature)

    def parts(self, messages: Sequence[Message], text: str) -> dict[str, Any]:
        """Return the score of one answer, for the tables of the evaluation; nothing if the function fails."""
        try:
            score = self._number(Comparison(messages, {}, "", ""), text)
        except Exception:  # as above; the verdict has the reason
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
      function: package.module:name of score(prompt, answer), which gets the last user turn and an answer, both text,
        and returns a number, or None for no score.
      temperature: see `reward_model`; choose it near the typical difference of two scores.

    Raises:
      ValueError: there is no such function, or it does not take two arguments.
    """
    _check_temperature(temperature)
    score = resolve(function, "judge.function", {})
    try:
        inspect.signature(score).bind("prompt", "answer")
    except TypeError:
        raise ValueError(
            f"judge.function: {function} is called as score(prompt, answer), but takes {inspect.signature(score)}"
        ) from None
    except ValueError:  # some builtins have no signature
        pass
    return RewardFunction(score, temperature)
