"""How many failures of its judge a run tolerates, and how many queries it may make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from xpo_jax.judges.contract import JudgeError


class CallSummary(TypedDict):
    """The counts of one process's shard of the rows, after one call of `ask.ask`; plain JSON values.

    pairs: how many pairs the judge was asked about. failed: how many of these have no verdict.
    queries: see `values.Verdicts`.
    first_failure: the reason of the first failed pair, or "".
    fatal_error: see `values.Verdicts`.
    counts: by how much the judge's `stats` increased.
    outcomes: see outcomes.py.
    """

    pairs: int
    failed: int
    queries: int
    first_failure: str
    fatal_error: str
    counts: dict[str, float]
    outcomes: dict[str, int]


class FailureTolerance:
    """Decides when a judge has failed too often. A run has one, in the same state on every process.

    Args:
      max_failed_fraction, max_failed_batches: see settings.Judging.
    """

    def __init__(self, *, max_failed_fraction: float, max_failed_batches: int):
        self._max_fraction, self._max_batches = max_failed_fraction, max_failed_batches
        self._failed_batches_in_a_row, self._asked_before = 0, False

    @property
    def state(self) -> tuple[int, bool]:
        """What a checkpoint stores; assign it to resume."""
        return self._failed_batches_in_a_row, self._asked_before

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self._failed_batches_in_a_row, self._asked_before = state

    def check(self, summaries: Sequence[CallSummary]) -> None:
        """Count the failures of a batch.

        Args:
          summaries: of every process, and of every call if there were several.

        Raises:
          JudgeError: a fatal error; no verdict on any pair of the first batch; or more than
            `max_failed_fraction` failed pairs in `max_failed_batches` batches in a row.
        """
        fatal_error = next((s["fatal_error"] for s in summaries if s["fatal_error"]), "")
        if fatal_error:
            raise JudgeError(fatal_error)
        pairs, failed = sum(s["pairs"] for s in summaries), sum(s["failed"] for s in summaries)
        if not pairs:
            return
        reason = next((s["first_failure"] for s in summaries if s["first_failure"]), "")
        is_first, self._asked_before = not self._asked_before, True
        too_many = failed / pairs > self._max_fraction
        self._failed_batches_in_a_row = self._failed_batches_in_a_row + 1 if too_many else 0
        if is_first and failed == pairs and self._max_fraction < 1:
            raise JudgeError(f"the judge gave no verdict on any of the first {pairs} pairs: {reason}")
        if self._failed_batches_in_a_row == self._max_batches:
            raise JudgeError(
                f"the judge gave no verdict on more than {self._max_fraction:.0%} of the pairs in"
                f" {self._failed_batches_in_a_row} batches in a row; in the last of them: {reason}"
            )


class Budget:
    """The queries that a run may make, with those of its last evaluation held in reserve.

    Args:
      max_queries: None for no limit.
      queries_per_prompt: at most, in a step. queries_per_comparison: at most; both orders counted apart.
      comparisons_per_evaluation: at most.
      every_steps: steps from one periodic evaluation to the next; 0 for none.
    """

    def __init__(
        self,
        max_queries: int | None,
        *,
        queries_per_prompt: int,
        queries_per_comparison: int,
        comparisons_per_evaluation: int,
        every_steps: int,
    ):
        self.max_queries, self._every_steps = max_queries, every_steps
        self._per_prompt = queries_per_prompt
        self._evaluation_queries = comparisons_per_evaluation * queries_per_comparison

    def check(self, first_batch: int) -> None:
        """Check that the run can make at least one step.

        Args:
          first_batch: valid rows of that step.

        Raises:
          ValueError: it cannot.
        """
        least = 2 * self._evaluation_queries + self._per_prompt * first_batch
        if self.max_queries is not None and self.max_queries < least and not self._evaluation_queries:
            raise ValueError(
                f"judging.max_queries is {self.max_queries}, but a step may need {least} queries: set it to at least"
                " that, or lower batch_size"
            )
        if self.max_queries is not None and self.max_queries < least:
            raise ValueError(
                f"judging.max_queries is {self.max_queries}, but the evaluations at the start and at the end may"
                f" need {self._evaluation_queries} queries each and a step {self._per_prompt * first_batch}: set it to"
                f" at least {least}, or lower evaluation.prompts or evaluation.reference_samples"
            )

    def allows(self, spent: int, step: int, *rows: int, evaluated: bool) -> bool:
        """Return whether the budget covers some steps, the evaluations that may follow them, and the last evaluation.

        Args:
          spent: queries so far.
          step: number of the first of them, from 0.
          rows: valid rows of each.
          evaluated: whether `spent` has those of an evaluation that is due before the first of them.
        """
        ends = range(step + evaluated, step + 1 + len(rows))
        evaluations = sum(bool(self._every_steps) and end % self._every_steps == 0 for end in ends)
        needed = self._per_prompt * sum(rows) + (1 + evaluations) * self._evaluation_queries
        return self.max_queries is None or spent + needed <= self.max_queries
