"""The result of a held-out evaluation, its metrics, and the limits on it that end a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from xpo_jax.evaluation.statistics import Rate, Reward
from xpo_jax.judges import outcomes


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    win_rate: mean over prompts of the policy's share of comparisons won, ties half; low and high are the
      ends of its 95 % interval over prompts.
    controlled: the same at equal lengths, see `statistics.length_controlled`.
    against_answers: the win rate against the answers of a file; None where there is no file.
    kl: nats per sequence, mean of log pi - log ref over the policy's samples; kl_per_token likewise.
    entropy: nats per token, mean of -log pi over the same; of the distribution sampled, if nothing truncates it.
    policy, reference: means over all samples of what the judge's `parts` reports of an answer (valid, copy,
      score, ...), with "tokens" and "unfinished"; only the latter two for a judge without `parts`. And the
      first answers' "distinct_1" and "distinct_2", see `statistics.distinct`.
    reward: as the win rate implies it, see `statistics.Reward`.
    intervals: the half width of the 95 % interval over prompts of each mean in `policy`, and of "kl".
    queries: comparisons that the judge was queried for.
    counts: by how much the judge's `stats` increased, by name.
    outcomes: what became of the pairs, see judges/outcomes.py.
    samples: per prompt the first answer of the policy and of the reference, for people to read; "win_share",
      the prompt's share of comparisons won; and of the comparison of those two "p_policy", the verdict, "shown",
      the letter that the policy's answer had, "reason" and "scores".
    """

    # long: one field per result
    win_rate: float
    low: float
    high: float
    controlled: Rate
    against_answers: Rate | None
    kl: float
    reward: Reward
    kl_per_token: float
    entropy: float
    policy: Mapping[str, float]
    reference: Mapping[str, float]
    intervals: Mapping[str, float]
    queries: int
    counts: Mapping[str, float]
    outcomes: Mapping[str, int]
    samples: Sequence[Mapping[str, Any]]

    def metrics(self) -> dict[str, float]:
        """Return the entries of metrics.jsonl."""
        rates = {"win_rate": Rate(self.win_rate, self.low, self.high), "win_rate_controlled": self.controlled}
        if self.against_answers is not None:
            rates["win_rate_answers"] = self.against_answers
        out: dict[str, float] = {}
        for name, rate in rates.items():
            out |= {f"eval/{name}": rate.mean, f"eval/{name}_low": rate.low, f"eval/{name}_high": rate.high}
        out |= {
            "eval/kl": self.kl,
            "eval/kl_per_token": self.kl_per_token,
            "eval/entropy": self.entropy,
            "eval/queries": float(self.queries),
        }
        out |= {f"eval/{name}": rate for name, rate in outcomes.metrics(self.outcomes).items()}
        out |= {f"eval/judge/{name}": number for name, number in self.counts.items()}
        out |= {f"eval/policy/{name}": value for name, value in self.policy.items()}
        return out | {f"eval/reference/{name}": value for name, value in self.reference.items()}


def ended_by(
    start: Evaluation,
    latest: Evaluation,
    *,
    stop_kl: float | None,
    stop_win_rate: float | None,
    stop_validity_drop: float | None,
) -> str:
    """Return the config's field by which a run ends after the latest evaluation, or "".

    Args:
      start, latest: the evaluation before the first step, and the latest.
      Others: see config/evaluation.py.

    Raises:
      ValueError: stop_validity_drop is set, but the judge does not report whether an answer is valid.
    """
    if stop_validity_drop is not None and "valid" not in start.policy:
        raise ValueError(
            'evaluation.stop_validity_drop is set, but the judge\'s parts do not report "valid"; set it to None'
        )
    if stop_kl is not None and latest.kl >= stop_kl:
        return "evaluation.stop_kl"
    if stop_win_rate is not None and latest.low >= stop_win_rate:
        return "evaluation.stop_win_rate"
    if (
        stop_validity_drop is not None
        and start.policy["valid"] - latest.policy["valid"] >= stop_validity_drop
    ):
        return "evaluation.stop_validity_drop"
    return ""
