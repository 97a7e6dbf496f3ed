"""The config's loss group: settings common to all losses, beside the hyperparameters of the loss that it names."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from xpo_jax.algorithm import pairing
from xpo_jax.algorithm.losses import LOSSES, BonusLoss, LossFn
from xpo_jax.config.schema import ConfigError, build, resolve, schedule, suggestion

Schedule = Callable[[int], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """The settings that every loss has.

    Args:
      second_candidate: the model that samples the second candidate: the reference (XPO's Algorithm 1), or the policy
        (its Algorithm 2; with alpha 0, online DPO).
      candidates: first candidates that the policy draws for each prompt, from one prefill.
      pairing: the rule by which pairs of them and the second candidate are judged, if they are more than one; see
        algorithm/pairing.py. None with one.
      beta, alpha: numbers, or schedules over steps: {"kind": "linear", "start": 1e-3, "end": 0.0, "steps": 100}.
      entropy_weight: weight of the policy's mean entropy per token in the objective that is maximised; 0 is off.
      unfinished_loses: a response cut off at max_new_tokens loses to a finished one without a query to the judge.
    """

    second_candidate: Literal["reference", "policy"]
    candidates: int
    pairing: Literal["best_worst", "best_quantile", "all", "uncertain", "optimistic"] | None
    beta: float | Mapping[str, Any]
    alpha: float | Mapping[str, Any]
    entropy_weight: float
    unfinished_loses: bool

    def __post_init__(self) -> None:
        if self.entropy_weight < 0:
            raise ValueError(f"entropy_weight is {self.entropy_weight}, must be 0 (off) or more")
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}, must be at least 1")
        if self.candidates > 1 and self.pairing is None:
            raise ValueError(
                f"pairing is None, but candidates is {self.candidates}; name a rule that pairs them, such as"
                " 'uncertain', or set candidates to 1"
            )
        if self.candidates == 1 and self.pairing is not None:
            raise ValueError(
                f"pairing is {self.pairing!r}, but candidates is 1: there is one pair; raise it, or set pairing to None"
            )

    @property
    def scores_answers(self) -> bool:
        """Whether the rule needs a judge's score of every candidate."""
        return self.pairing in pairing.SCORED

    @property
    def pairs_per_prompt(self) -> int:
        """The pairs of a prompt that are learned from."""
        return pairing.pairs_per_prompt(self.pairing, self.candidates + 1)

    @property
    def summary(self) -> str:
        """Return a line for people; empty where a prompt has two candidates."""
        if self.pairing is None:
            return ""
        pairs = "1 pair" if self.pairs_per_prompt == 1 else f"{self.pairs_per_prompt} pairs"
        judged = "answers are scored" if self.scores_answers else "chosen before judging"
        return f"{self.candidates} of the policy and 1 more a prompt; {pairs} by the rule {self.pairing}, {judged}"

    def queries_per_prompt(self, per_comparison: int) -> int:
        """Return what is put to the judge for each prompt at most: a comparison, or answers that are scored."""
        return self.candidates + 1 if self.scores_answers else per_comparison

    def doubt(
        self, loss: LossFn, alpha: float, beta: float, *, fresh_pairs: bool, one_distribution: bool = True
    ) -> str:
        """Return what makes the bonus do nothing, or too much, and how to fix it, in one line; "" for nothing.

        Args:
          alpha, beta: at the first step. fresh_pairs: whether the policy learns only from what it has just drawn.
          one_distribution: whether two samples of the policy are drawn from one distribution, at one temperature.
        """
        if not isinstance(loss, BonusLoss) or not alpha:
            return ""
        independent = loss.bonus_sample == "second" and self.pairing is None and one_distribution
        if self.second_candidate == "policy" and loss.bonus == "linear" and independent:
            effect = (
                "has no mean effect on pairs that the policy has just drawn"
                if fresh_pairs
                else "acts through past pairs alone, which ruined a small network (docs/sample_efficiency.md)"
            )
            return f"the bonus {effect}; set loss.alpha to 0, or choose loss.bonus='bounded'"
        if loss.bonus == "bounded" and alpha >= 2 * beta:
            return (
                f"the bonus outweighs even a clear verdict: loss.alpha {alpha:g} >= 2 * loss.beta {beta:g}; lower"
                " loss.alpha"
            )
        return ""

    def coefficients(self, loss: LossFn, steps: int) -> tuple[Schedule, Schedule]:
        """Return alpha and beta as functions of the step, checked at every step of the run.

        Raises:
          ValueError: coefficients that `loss.check` refuses.
        """
        alpha, beta = schedule(self.alpha, "loss.alpha"), schedule(self.beta, "loss.beta")
        for step in range(steps):
            try:
                loss.check(alpha(step), beta(step))
            except ValueError as error:
                raise ConfigError(f"loss at step {step}: {error}") from error
        return alpha, beta


def make_loss(group: Mapping[str, Any] | ConfigDict, where: str = "loss") -> tuple[Loss, LossFn]:
    """Build the group's common settings and the loss that it names.

    Args:
      group: `name`, the fields of `Loss`, and the fields of the class that `name` stands for.
      where: the group's path in the config, for errors.

    Raises:
      ValueError: an unknown name; an unknown, missing or ill-typed field; an object that is no loss.
    """
    if "name" not in group:
        raise ConfigError(f'{where}.name is missing: one of {", ".join(LOSSES)}, or "package.module:Name"')
    factory = resolve(group["name"], f"{where}.name", LOSSES)
    common = {field.name for field in dataclasses.fields(Loss)}
    known = [*common, *inspect.signature(factory).parameters]
    for name in group:
        if name not in known and name != "name":
            hint = suggestion(name, known) or f"; {where} has {', '.join(sorted(known))}"
            raise ConfigError(f"{where}.{name}: no such field{hint}")
    settings = build(Loss, {name: group[name] for name in common if name in group}, where)
    loss = build(factory, {name: group[name] for name in group if name not in common}, where)
    if not isinstance(loss, LossFn):
        raise ConfigError(
            f"{where}.name: {group['name']} makes a {type(loss).__name__}, which is no loss; define"
            " __call__(policy_logps, ref_logps, p_first, *, alpha, beta) and check(alpha, beta)"
        )
    return settings, loss
