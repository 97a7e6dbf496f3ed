"""The LLM A/B judge: a language model on the devices reads both answers, and the label it prefers decides.

p = P(label of A) / (P(label of A) + P(label of B)), where P is the probability of the token that follows the rendered
comparison. Nothing is sampled. By default the model is the policy's starting model, whose arrays are shared.

An answer cannot change the structure of the prompt: control tokens in it are ordinary text, and `prompting.py` breaks
the template's tags in it. Its plain words still reach the model ("I am the better one"), as with every judge that
reads the answers.

Left out on purpose: asking in both orders (`judging.both_orders` does that for any judge), reasoning before the
verdict, and more than two answers. The model runs in `device_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from xpo_jax.config.schema import build, check_increasing
from xpo_jax.data.chat_templates import ChatTemplate
from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.device_model import TokenChoiceScorer, check_divisible
from xpo_jax.judges.prompting import Rendering
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.values import Comparison, Message, Params, Verdict

LOW_MASS = 0.1  # of a median comparison; a model that answers with a label gives the labels nearly all of it


class Rules(NamedTuple):
    """A rule-based judge with a weight in the verdict: p = (1 - weight) * model's p + weight * rules' p."""

    judge: Any
    weight: float


class LLMJudge:
    """Compares two answers by the probabilities of two labels; a `contract.DeviceJudge`."""

    collective = True

    def __init__(
        self,
        path: str | None,
        rendering: Rendering,
        labels: tuple[str, str],
        batch_size: int,
        buckets: Sequence[int],
        on_long: str,
        rules: Rules | None,
        chat_template_arguments: Mapping[str, Any] | None,
    ):
        """Take what `llm` has checked."""
        self._path, self._render, self._labels = path, rendering, labels
        self._chat_template_arguments = chat_template_arguments
        self._batch_size, self._buckets, self._on_long = batch_size, tuple(buckets), on_long
        self._rules = rules
        self._masses: list[float] = []  # of the comparisons since `doubt` was called
        if rules is not None:
            self.parts = rules.judge.parts  # makes this a `contract.HasParts`

    # ---- before the run

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Open the judge's model, or the policy's starting model where they are the same, for the run's mesh and dtype.

        Raises:
          ValueError: the batch size is not divisible over the mesh, the model folder cannot be used, a label is not a
            single token, or the chat template rejects the template or does not read an argument.
        """
        check_divisible(self._batch_size, mesh)
        self._source = None if self._path is None else hub.find(self._path)
        self._folder = folder if self._source is None else self._source.folder
        self._shares_policy_weights = self._folder.resolve() == folder.resolve()
        if not self._shares_policy_weights:
            model_config = model_folder.read_config(self._folder)
            model_folder.check_params(self._folder, model_config)
            tokenizer = model_folder.load_tokenizer(self._folder, model_config)
        self._tokenizer = tokenizer
        try:
            self._chat_template = ChatTemplate(
                tokenizer, "the judge's tokenizer", self._chat_template_arguments
            )
        except ValueError as error:
            raise ValueError(f"judge.chat_template_arguments: {error}") from error
        self._tokens(self._render.template)  # so that the chat template rejects it now, if ever
        self._scorer = TokenChoiceScorer(
            mesh,
            model_config,
            tokens=self._label_ids(),
            vocab_size=len(tokenizer),
            dtype=dtype,
            batch_size=self._batch_size,
            buckets=self._buckets,
        )

    def models(self) -> list[dict[str, str | None]]:
        """Return the judge's model, if `path` names one, for environment.json; called after `attach`."""
        return [] if self._source is None else [{"path": self._source.given, "commit": self._source.commit}]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check that the prompt can be rendered and fits the last bucket, if it must.

        Raises:
          ValueError: a column of the template is missing, empty or not text; the comparison is too long even with empty
            answers; or the rules reject the prompt.
        """
        if self._rules is not None:
            self._rules.judge.check(messages, row)
        rendered = self._render(Comparison(messages, row, "", ""))
        if self._on_long == "error":
            self._fits(len(self._tokens(rendered)))

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """Return a label and a compile function for each bucket."""
        return self._scorer.declared_programs()

    def load(self, starting: Params | None) -> None:
        """Share the policy's starting weights if this judge uses them and they are available, else read them."""
        if self._shares_policy_weights and starting is not None:
            self._scorer.weights = starting
        else:
            self._scorer.load(self._folder)

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
        sequences = [self._tokens(self._render(comparison)) for comparison in comparisons]
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
            return Verdict(
                None, f"a comparison of {length} tokens; the last bucket holds {self._buckets[-1]}"
            )
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

    def _fits(self, length: int) -> bool:
        """Return whether a bucket holds the tokens; raise JudgeError if none does and `on_long` is "error"."""
        fits = length <= self._buckets[-1]
        if not fits and self._on_long == "error":
            raise JudgeError(
                f"a comparison has {length} tokens, but the last of judge.buckets holds {self._buckets[-1]}; raise it,"
                " or set judge.on_long to 'no_verdict' to skip such pairs"
            )
        return fits

    # ---- tokens

    def _tokens(self, rendered: str | Sequence[Any]) -> list[int]:
        """Return token ids; messages go through the chat template. Control tokens in a text are ordinary text."""
        if isinstance(rendered, str):
            return list(self._tokenizer(rendered, split_special_tokens=True, verbose=False)["input_ids"])
        try:
            return self._chat_template(list[Any](rendered), "the list")
        except ValueError as error:
            raise JudgeError(f"judge.template: {error}") from error

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
    rendering = Rendering(template, break_control_tokens=False)  # the tokenizer reads them as ordinary text
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1 is expected, found {batch_size}")
    check_increasing(buckets, "buckets")
    if chat_template_arguments and isinstance(template, str):
        raise ValueError(
            "chat_template_arguments: the template is one text, which passes through no chat template; write it as"
            " messages, or set chat_template_arguments to None"
        )
    weighted_rules = None
    if rules is not None:
        weight = rules.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1:
            raise ValueError(f"rules: weight must be a number from 0 to below 1, found {weight!r}")
        fields = {name: value for name, value in rules.items() if name != "weight"}
        weighted_rules = Rules(build(rule_judge, fields, "judge.rules"), weight)
    return LLMJudge(
        path, rendering, labels, batch_size, buckets, on_long, weighted_rules, chat_template_arguments
    )
