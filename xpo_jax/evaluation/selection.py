"""Which of a run's policies is exported (`checkpoint.export`): the measure, its interval, and how it is shown.

    last            none; the measure is the win rate, whose best checkpoint stays beside the newest
    best            the held-out win rate
    best_score      the mean of the "score" that the judge's parts report of the policy's answers
    best_objective  E[r] - beta KL, what the loss maximises, with r from the win rate, see `Reward.objective`

The highest of several values looks better than it is, so the interval is shown with it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from xpo_jax.evaluation.result import Evaluation
from xpo_jax.evaluation.statistics import Rate
from xpo_jax.judges.contract import HasParts, Judge

MEASURES = {
    "last": "win rate",
    "best": "win rate",
    "best_score": "mean score",
    "best_objective": "E[r] - beta KL, nats",
}


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a run chooses what it exports.

    Args:
      export: see `settings.Checkpoint`.
      beta: of the objective: that of the loss in the run's last step.
      every_steps: from one evaluation to the next; 0 for none between the first and the last.

    Raises:
      ValueError: there is nothing to choose from.
    """

    export: str
    beta: float
    every_steps: int

    def __post_init__(self) -> None:
        if self.chooses and not self.every_steps:
            raise ValueError(
                f"checkpoint.export is {self.export!r}, but evaluation.every_steps is 0, so there is nothing to choose"
                " from; set it, or export 'last'"
            )

    @property
    def chooses(self) -> bool:
        """Whether another policy than the last may be exported."""
        return self.export != "last"

    @property
    def criterion(self) -> str:
        """What a checkpoint's score is; those with another one cannot be compared."""
        return f"{MEASURES[self.export]}, beta {self.beta:g}" if self._is_objective else MEASURES[self.export]

    @property
    def _is_objective(self) -> bool:
        return self.export == "best_objective"

    def check_judge(self, judge: Judge) -> None:
        """Raise ValueError if the judge of evaluations reports no parts, and the choice needs one."""
        if self.export == "best_score" and not isinstance(judge, HasParts):
            raise ValueError(
                "checkpoint.export is 'best_score', but the judge has no method parts(messages, text), which reports"
                " \"score\"; export 'best' or 'best_objective', or add it"
            )

    def check(self, evaluation: Evaluation) -> None:
        """Raise ValueError if the judge does not report what the choice needs."""
        if self.export == "best_score" and "score" not in evaluation.policy:
            raise ValueError(
                "checkpoint.export is 'best_score', but the judge's parts do not report \"score\"; export 'best' or"
                " 'best_objective', or let the judge's parts report it"
            )

    def measure(self, evaluation: Evaluation) -> Rate:
        """Return the measure with the ends of its 95 % interval; nan if the judge had no verdict."""
        if self._is_objective:
            return evaluation.reward.objective(evaluation.kl, self.beta)
        if self.export == "best_score":
            mean, half = evaluation.policy["score"], evaluation.intervals["score"]
            return Rate(mean, mean - half, mean + half)
        return Rate(evaluation.win_rate, evaluation.low, evaluation.high)

    def score(self, evaluation: Evaluation) -> float | None:
        """Return the measure as a checkpoint keeps it: higher is better, None if it is not known."""
        mean = self.measure(evaluation).mean
        return mean if math.isfinite(mean) else None

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        """Return the entries of metrics.jsonl, for a measure that is not among those of every evaluation."""
        if self.export not in ("best_score", "best_objective"):
            return {}
        measure = self.measure(evaluation)._asdict()
        return {f"eval/export{'' if end == 'mean' else f'_{end}'}": value for end, value in measure.items()}

    def result(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return the entries of result.json about the exported policy; none if it is the last."""
        if not self.chooses:
            return {}
        measure = self.measure(evaluation)._asdict()
        named = {
            f"exported_value{'' if end == 'mean' else f'_{end}'}": value for end, value in measure.items()
        }
        return {"exported_by": self.criterion, **named}

    def line(self, step: int, evaluation: Evaluation) -> str:
        """Return one line on what is exported, "" if it is the last."""
        if not self.chooses:
            return ""
        which = f"step {step}" if step else "step 0, the untrained start"
        return f"exported: {which}, the best by {self.criterion}: {written(self.measure(evaluation))}"


def written(measure: Rate) -> str:
    """Return a measure with its interval as text."""
    return "{:.4g} [{:.4g}, {:.4g}]".format(*measure)
