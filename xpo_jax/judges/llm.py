"""The LLM A/B judge: a Qwen2.5 on the devices reads both answers, and which label it would write next decides.

p = P(label of A) / (P(label of A) + P(label of B)), of the token that follows the rendered comparison; nothing
is sampled. By default the model is the policy's starting model, whose arrays are shared.

An answer stays an answer: control tokens in it are ordinary text, and `prompting.py` breaks the template's tags in
it. What it says in plain words still reaches the model ("I am the better one"), as with every judge that reads.

Left out on purpose: asking in both orders (`judging.both_orders` does it for any judge), reasoning before the
verdict, and more than two answers. What runs on the devices is
`device_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from xpo_jax.config.schema import build, check_increasing
from xpo_jax.io.text import error_line
from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.device_model import TokenChoiceScorer
from xpo_jax.judges.prompting import Rendering
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.values import Comparison, Message, Params, Verdict


class Rules(NamedTuple):
    """A judge by rules with a share of the verdict: p = (1 - weight) * the model's p + weight * the rules'."""

    judge: Any
    weight: float


class LLMJudge:
    """Compares two answers by the probabilities of two labels; a `values.DeviceJudge`."""

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
    ):
        """Take what `llm` has checked."""
        self._path, self._rendered, self._labels = path, rendering, labels
        self._batch_size, self._buckets, self._on_long = batch_size, tuple(buckets), on_long
        self._rules = rules
        if rules is not None:
            self.parts = rules.judge.parts  # for the evaluation's tables: what the rules say of one answer

    # ---------------------------------------------------------------------------------- before the run

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Learn on what the run computes, and which is the policy's starting model.

        Raises:
          ValueError: a batch that the mesh does not divide, a model folder that cannot be used, a label that
            is not one token, messages that the chat template refuses.
        """
        shares = mesh.shape["data"] * mesh.shape["fsdp"]
        if self._batch_size % shares:
            raise ValueError(
                f"judge.batch_size {self._batch_size} is not divisible by mesh.data x mesh.fsdp = {shares}"
            )
        self._found = None if self._path is None else hub.find(self._path)
        self._folder = folder if self._found is None else self._found.folder
        self._shares = self._folder.resolve() == folder.resolve()
        if not self._shares:
            model_config = model_folder.read_config(self._folder)
            model_folder.check_params(self._folder, model_config)
            tokenizer = model_folder.load_tokenizer(self._folder, model_config)
        self._tokenizer = tokenizer
        self._tokens(self._rendered.template)  # whatever the chat template refuses, it refuses here
        self._choices = TokenChoiceScorer(
            mesh,
            model_config,
            tokens=self._label_ids(),
            vocab_size=len(tokenizer),
            dtype=dtype,
            batch_size=self._batch_size,
            buckets=self._buckets,
        )

    def models(self) -> list[dict[str, str | None]]:
        """The model of its own, for environment.json; called after `attach`."""
        return [] if self._found is None else [{"path": self._found.given, "commit": self._found.commit}]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Refuse a prompt that this judge cannot judge; a run asks for each before it begins.

        Raises:
          ValueError: a column of the template that is missing, empty or no text; a comparison that is too
            long even without answers, if that is an error; whatever the rules refuse.
        """
        if self._rules is not None:
            self._rules.judge.check(messages, row)
        rendered = self._rendered(Comparison(messages, row, "", ""))
        if self._on_long == "error":
            self._fits(len(self._tokens(rendered)))

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """The compilations: what to show of each, and the call that compiles it."""
        return self._choices.declared_programs()

    def load(self, starting: Params | None) -> None:
        """Take the policy's starting weights where they are this judge's and given, else read its own."""
        if self._shares and starting is not None:
            self._choices.weights = starting
        else:
            self._choices.load(self._folder)

    # ----------------------------------------------------------------------------------------- judging

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison.

        Returns:
          Verdicts. Their scores: "a" and "b" hold the log-probability of the answer's label ("logp", nats) and
          what the rules measured ("rules"); "mass" is P(label of A) + P(label of B), which is far below 1 where
          the model does not answer the question.

        Raises:
          JudgeError: a comparison that is too long, if that is an error.
        """
        asked = [self._tokens(self._rendered(comparison)) for comparison in comparisons]
        lengths = [len(tokens) for tokens in asked]
        logps = self._choices(asked)
        rules = self._rules.judge(comparisons) if self._rules is not None else [None] * len(comparisons)
        return [self._verdict(*each) for each in zip(logps, lengths, rules, strict=True)]

    def _verdict(self, logps: np.ndarray, length: int, rule: Verdict | None) -> Verdict:
        """From f64[2], the log-probability of each answer's label, and the comparison's length in tokens."""
        if not self._fits(length):
            return Verdict(
                None, f"a comparison of {length} tokens; the last bucket holds {self._buckets[-1]}"
            )
        if not np.isfinite(logps).all():
            return Verdict(None, "the judge's model gave probabilities that are not finite")
        p = float(np.exp(logps[0] - np.logaddexp(*logps)))
        mass = float(np.exp(logps).sum())
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
        """Whether a bucket holds so many tokens; an error if none does, where the config says so."""
        fits = length <= self._buckets[-1]
        if not fits and self._on_long == "error":
            raise JudgeError(
                f"a comparison has {length} tokens, the last of judge.buckets holds {self._buckets[-1]}; raise it,"
                " or set judge.on_long to 'no_verdict' to go on without a verdict"
            )
        return fits

    # ------------------------------------------------------------------------------------------ tokens

    def _tokens(self, rendered: str | Sequence[Any]) -> list[int]:
        """Token ids; messages go through the chat template. Control tokens in a text are ordinary text."""
        if isinstance(rendered, str):
            return list(self._tokenizer(rendered, split_special_tokens=True, verbose=False)["input_ids"])
        if self._tokenizer.chat_template is None:
            raise JudgeError(
                "judge.template: messages need a chat template and the judge's tokenizer has none; give a text"
            )
        try:
            return list(
                self._tokenizer.apply_chat_template(
                    rendered, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
                )
            )
        except Exception as error:  # a chat template is a program of the model's and can refuse in any way
            raise JudgeError(
                f"judge.template: the tokenizer's chat template refuses it: {error_line(error)}"
            ) from error

    def _label_ids(self) -> list[int]:
        ids = []
        for label in self._labels:
            found = self._tokenizer.encode(label, add_special_tokens=False, split_special_tokens=True)
            if len(found) != 1:
                named = ", ".join(repr(self._tokenizer.decode([i])) for i in found) or "none"
                raise ValueError(
                    f"judge.labels: {label!r} is {len(found)} tokens of the judge's tokenizer ({named});"
                    " each label must be exactly one"
                )
            ids += found
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
    rule_judge: Callable[..., Any],
) -> LLMJudge:
    """Build the judge.

    Args:
      path: the model's folder; None is the policy's starting model, whose arrays are shared.
      template: messages (for the chat template) or a text (tokenised as it is, for base models) with {A} and
        {B}; {prompt}, the user's last turn; and any {column} of the row that holds text.
      labels: what the template asks for, for A and for B; each must be exactly one token.
      batch_size: rows per call on the devices, divisible by mesh.data x mesh.fsdp.
      buckets: padded lengths of rendered comparisons, tokens, rising.
      on_long: a comparison longer than the last bucket ends the run, or has no verdict and counts as failed.
      rules: None, or the arguments of the judge by rules with "weight", its share of p, from 0 to below 1;
        with 0 its measures only stand in the log and in the evaluation's tables.
      rule_judge: the factory of the judge by rules.

    Raises:
      ValueError: anything else; the field stands first.
    """
    rendering = Rendering(template, break_control_tokens=False)  # the tokenizer reads them as ordinary text
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1 is expected, found {batch_size}")
    check_increasing(buckets, "buckets")
    added = None
    if rules is not None:
        weight = rules.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1:
            raise ValueError(f"rules: weight must be a number from 0 to below 1, found {weight!r}")
        rest = {name: value for name, value in rules.items() if name != "weight"}
        added = Rules(build(rule_judge, rest, "judge.rules"), weight)
    return LLMJudge(path, rendering, labels, batch_size, buckets, on_long, added)
