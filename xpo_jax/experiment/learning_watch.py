"""Notices that a run learns nothing because no verdict prefers one response, reports it, and ends the run."""

from __future__ import annotations

from xpo_jax.experiment.resume import Counters
from xpo_jax.judges import outcomes
from xpo_jax.judges.outcomes import Outcomes
from xpo_jax.reporting import summary

REPORT_STEPS = 10  # steps between two reports


class LearningWatch:
    """Watches what became of the pairs of each step, see judges/outcomes.py.

    Args:
      counters: of the run; `indecisive_in_a_row` is counted here.
      max_indecisive_steps: see settings.Judging.
    """

    def __init__(self, counters: Counters, max_indecisive_steps: int | None):
        self._counters, self._limit = counters, max_indecisive_steps
        self._unreported: list[Outcomes] = []
        self._last: Outcomes = {}

    def count(self, step: Outcomes) -> None:
        """Take what became of a step's pairs; print a warning if the last REPORT_STEPS steps taught nothing."""
        self._counters.indecisive_in_a_row = (
            0 if step.get("decisive") else self._counters.indecisive_in_a_row + 1
        )
        self._last = step
        self._unreported.append(step)
        if len(self._unreported) == REPORT_STEPS:
            problem = outcomes.problem(outcomes.add(self._unreported))
            summary.warn(problem, f"in the last {REPORT_STEPS} steps")
            self._unreported.clear()

    def problem(self) -> str:
        """Return why the run must end, or ""."""
        steps = self._counters.indecisive_in_a_row
        if self._limit is None or steps < self._limit:
            return ""
        return f"the run learns nothing: in {steps} steps {outcomes.problem(self._last)}"
