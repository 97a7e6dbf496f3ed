"""Notices that a run learns nothing, or not what it should, reports it, and ends the run where nothing is learned."""

from __future__ import annotations

from xpo_jax.experiment.resume import Counters
from xpo_jax.judges import contract, outcomes
from xpo_jax.judges.outcomes import Outcomes
from xpo_jax.reporting import summary

REPORT_STEPS = 10  # steps between two reports
MANY_CUT = 0.05  # of the responses: what the judge does not see, the policy may learn


class LearningWatch:
    """Watches what became of the pairs of each step, see judges/outcomes.py, and what the judge saw of them.

    Args:
      counters: of the run; `indecisive_in_a_row` is counted here.
      max_indecisive_steps: see settings.Judging.
      judge: of the run.
    """

    def __init__(self, counters: Counters, max_indecisive_steps: int | None, judge: contract.Judge):
        self._counters, self._limit, self._judge = counters, max_indecisive_steps, judge
        self._unreported: list[Outcomes] = []
        self._last: Outcomes = {}
        self._cut_rates: list[float] = []

    def count(self, step: Outcomes, *, cut_rate: float) -> None:
        """Take the results of a step; print a warning if something was wrong in the last REPORT_STEPS steps.

        Args:
          step: what became of its pairs.
          cut_rate: the fraction of responses from which special tokens were cut before the judge saw them.
        """
        self._counters.indecisive_in_a_row = (
            0 if step.get("decisive") else self._counters.indecisive_in_a_row + 1
        )
        self._last = step
        self._unreported.append(step)
        self._cut_rates.append(cut_rate)
        if len(self._unreported) == REPORT_STEPS:
            when = f"in the last {REPORT_STEPS} steps"
            summary.warn(outcomes.problem(outcomes.add(self._unreported)), when)
            summary.warn(contract.doubt(self._judge), when)
            summary.warn(_cut_problem(sum(self._cut_rates) / REPORT_STEPS), when)
            self._unreported.clear()
            self._cut_rates.clear()

    def problem(self) -> str:
        """Return why the run must end, or ""."""
        steps = self._counters.indecisive_in_a_row
        if self._limit is None or steps < self._limit:
            return ""
        without = f"{steps} steps without a verdict that prefers a response"
        return f"the run learns nothing: {without}; in the last one {outcomes.problem(self._last)}"


def _cut_problem(rate: float) -> str:
    """Return why it matters that special tokens were cut from this fraction of the responses; "" for few."""
    if rate < MANY_CUT:
        return ""
    return (
        f"{rate:.0%} of the responses had special tokens before their end, which the judge does not see, so the policy"
        " may learn to write them; if one of them ends an answer, name it in sampling.end_tokens"
    )
