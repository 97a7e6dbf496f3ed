"""The LLM A/B judge: a language model on the devices reads both answers, and the label it prefers decides.

p = P(label of A) / (P(label of A) + P(label of B)), where P is the probability of the token that follows the rendered
comparison. Nothing is sampled. By default the model is the policy's starting model, whose arrays are shared.

The plain words of an answer still reach the model ("I am the better one"), as with every judge that reads the answers;
what an answer cannot do is in `prompted_model.py`.

Left out on purpose: asking in both orders (`judging.both_orders` does that for any judge), reasoning before the
verdict (`reasoning.py`), and more than two answers. The model runs in `device_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from xpo_jax.config.schema import build
from xpo_jax.judges.device_model import TokenChoiceScorer
from xpo_jax.judges.prompted_model import PromptedModel
from xpo_jax.values import Comparison, Message, Verdict

LOW_MASS = 0.1  # of a median comparison; a model that answers with a label gives the labels nearly all of it


class Rules(NamedTuple):
    """A rule-based judge with a weight in the verdict: p = (1 - weight) * model's p + weight * rules' p."""

    judge: Any
    weight: float


class LLMJudge(PromptedModel):
    """Compares two answers by the probabilities of two labels; a `contract.DeviceJudge`."""

    def __init__(
        self, path: str | None, template: Any, labels: tuple[str, str], rules: Rules | None, **options: Any
    ):
        """Take what `llm` describes; the options are those of `PromptedModel`."""
        super().__init__(path, template, **options)
        self._labels, self._rules = labels, rules
        self._masses: list[float] = []  # of the comparisons since `doubt` was called
        if rules is not None:
            self.parts = rules.judge.parts  # makes this a `contract.HasParts`

    def _make_programs(self, mesh: Any, model_config: Any, dtype: Any) -> TokenChoiceScorer:
        """Make the scorer; ValueError if a label is not a single token."""
        self._scorer = TokenChoiceScorer(
            mesh,
            model_config,
            tokens=self._label_ids(),
            vocab_size=len(self._tokenizer),
            dtype=dtype,
            batch_size=self._batch_size,
            buckets=self._buckets,
        )
        return self._scorer

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check the prompt as `PromptedModel` does, and with the rules.

        Raises:
          ValueError: see there, or the rules reject the prompt.
        """
        if self._rules is not None:
            self._rules.judge.check(messages, row)
        super().check(messages, row)

    # ---- judging

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison.

        Returns:
          Verdicts. Their scores hold, under "a" and "b", the log-probability of the answer's label ("logp", nats) and
          what the rules measured ("rules"). "mass" is P(label of A) + P(label of B); far below 1, the model does not
          answer the question.

        Raises:
          JudgeError: a comparison is too long, and `on_long` is "error".
        """
        sequences = list(map(self._rendered_tokens, comparisons))
        lengths = [len(tokens) for tokens in sequences]
        logps = self._scorer(sequences)
        rules = self._rules.judge(comparisons) if self._rules is not None else [None] * len(comparisons)
        return list(map(self._verdict, logps, lengths, rules))

    def doubt(self) -> str:
        """Return that the model does not answer the question, where it gives the labels little probability."""
        masses, self._masses = self._masses, []
        if not masses or (median := float(np.median(masses))) >= LOW_MASS:
            return ""
        return (
            f"the judge's model gives its labels {self._labels[0]!r} and {self._labels[1]!r} a probability of"
            f" {median:.2g} together (the median of {len(masses)} comparisons), so it does not answer the question;"
            " change judge.template or judge.labels, or use an instruction-tuned model"
        )

    def _verdict(self, logps: np.ndarray, length: int, rule: Verdict | None) -> Verdict:
        """Return the verdict on one comparison.

        Args:
          logps: f64[2], the log-probability of each answer's label.
          length: of the rendered comparison, tokens.
          rule: the verdict of the rules, if any.
        """
        if not self._fits(length):
            return Verdict(None, self._too_long(length))
        if not np.isfinite(logps).all():
            return Verdict(None, "the judge's model gave probabilities that are not finite")
        p = float(np.exp(logps[0] - np.logaddexp(*logps)))
        mass = float(np.exp(logps).sum())
        self._masses.append(mass)
        reason = f"{p:.3f} for A, mass {mass:.3f}"
        parts: dict[str, dict[str, Any]] = {
            name: {"logp": float(logp)} for name, logp in zip(("a", "b"), logps, strict=True)
        }
        if self._rules is not None and rule is not None and rule.p is not None:
            for name, part in parts.items():
                part["rules"] = rule.scores[name]
            p = (1 - self._rules.weight) * p + self._rules.weight * rule.p
            reason += f"; by rules {rule.reason}"
        return Verdict(p, reason, {**parts, "mass": mass})

    def _label_ids(self) -> list[int]:
        """Return the token id of each label; raise ValueError if one is not a single token."""
        ids = []
        for label in self._labels:
            tokens = self._tokenizer.encode(label, add_special_tokens=False, split_special_tokens=True)
            if len(tokens) != 1:
                shown = ", ".join(repr(self._tokenizer.decode([i])) for i in tokens) or "none"
                raise ValueError(
                    f"judge.labels: {label!r} is {len(tokens)} tokens of the judge's tokenizer ({shown});"
                    " each label must be exactly one"
                )
            ids += tokens
        if ids[0] == ids[1]:
            raise ValueError(f"judge.labels: {self._labels[0]!r} and {self._labels[1]!r} are the same token")
        return ids


def llm(
    *,
    path: str | None,
    template: str | Sequence[Mapping[str, str]],
    labels: tuple[str, str],
    batch_size: int,
    buckets: Sequence[int],
    on_long: Literal["error", "no_verdict"],
    rules: Mapping[str, Any] | None,
    chat_template_arguments: Mapping[str, Any] | None,
    rule_judge: Callable[..., Any],
) -> LLMJudge:
    """Build the judge.

    Args:
      path: a folder or hub name of the model; None for the policy's starting model, whose arrays are shared.
      template: messages (for the chat template) or a text (tokenized as it is, for base models) with {A} and {B};
        {prompt} is the last user turn, and any other {column} a text column of the row.
      labels: what the template asks for, for A and for B; each must be exactly one token.
      batch_size: rows per call on the devices, divisible by mesh.data x mesh.fsdp.
      buckets: padded lengths of rendered comparisons, tokens, increasing.
      on_long: a comparison longer than the last bucket ends the run, or has no verdict and counts as failed.
      rules: None, or the fields of the rule-based judge with a "weight" in p, from 0 to below 1. With weight 0 its
        measures only appear in the log and in the tables of the evaluation.
      chat_template_arguments: values for variables of the judge's chat template, such as {"enable_thinking": False}
        of Qwen3's, or None. A template that is one text passes through no chat template, and takes none.
      rule_judge: the factory of the rule-based judge.

    Raises:
      ValueError: a value out of range; the field comes first.
    """
    weighted_rules = None
    if rules is not None:
        weight = rules.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1:
            raise ValueError(f"rules: weight must be a number from 0 to below 1, found {weight!r}")
        fields = {name: value for name, value in rules.items() if name != "weight"}
        weighted_rules = Rules(build(rule_judge, fields, "judge.rules"), weight)
    return LLMJudge(
        path,
        template,
        labels,
        weighted_rules,
        batch_size=batch_size,
        buckets=buckets,
        on_long=on_long,
        chat_template_arguments=chat_template_arguments,
    )
