"""Failure tolerance and budget: when a judge's failures or its cost end a run."""

import pytest

from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.limits import Budget, FailureTolerance


def summary(pairs, failed, reason="its words", fatal_error=""):
    first_failure = reason if failed else ""
    return {"pairs": pairs, "failed": failed, "first_failure": first_failure, "fatal_error": fatal_error}


def test_failure_tolerance_too_many_failures_in_a_row_raise():
    failure_tolerance = FailureTolerance(max_failed_fraction=0.5, max_failed_batches=2)
    # half is not more than half; a batch within the limit restarts the count; one without pairs leaves it
    for batch in ([summary(8, 4)], [summary(8, 5)], [summary(8, 4)], [summary(8, 5)], [summary(0, 0)]):
        failure_tolerance.check(batch)
    with pytest.raises(JudgeError, match="more than 50% of the pairs in 2 batches in a row; .*: its words$"):
        failure_tolerance.check([summary(6, 3, "its words"), summary(2, 2, "and others")])  # of two processes
    for _ in range(5):
        FailureTolerance(max_failed_fraction=1.0, max_failed_batches=1).check([summary(4, 4)])


def test_failure_tolerance_first_batch_without_a_verdict_raises():
    failure_tolerance = FailureTolerance(max_failed_fraction=0.5, max_failed_batches=2)
    failure_tolerance.check([summary(0, 0)])
    with pytest.raises(
        JudgeError, match="^the judge gave no verdict on any of the first 8 pairs: its words$"
    ):
        failure_tolerance.check([summary(4, 4), summary(4, 4)])
    failure_tolerance = FailureTolerance(max_failed_fraction=0.5, max_failed_batches=2)
    failure_tolerance.check([summary(4, 3)])
    failure_tolerance.check([summary(4, 0)])
    failure_tolerance.check([summary(4, 4)])  # not the first


def test_failure_tolerance_fatal_error_raises_before_anything_is_counted():
    failure_tolerance = FailureTolerance(max_failed_fraction=1.0, max_failed_batches=9)
    with pytest.raises(JudgeError, match="^the server is gone$"):
        failure_tolerance.check([summary(4, 0), summary(4, 4, fatal_error="the server is gone")])
    assert failure_tolerance.state == (0, False)


def test_failure_tolerance_state_resumes_the_count():
    first = FailureTolerance(max_failed_fraction=0.5, max_failed_batches=2)
    first.check([summary(4, 3)])
    second = FailureTolerance(max_failed_fraction=0.5, max_failed_batches=2)
    second.state = list(first.state)  # as JSON has it
    with pytest.raises(JudgeError, match="in 2 batches in a row"):
        second.check([summary(4, 3)])


def test_budget_reserves_the_last_evaluation():
    limits = {"queries_per_prompt": 2, "queries_per_comparison": 2, "comparisons_per_evaluation": 100}
    free = Budget(None, **limits, every_steps=2)
    free.check(8)
    assert free.allows(10**9, 0, 8, evaluated=True)
    budget = Budget(1000, **limits, every_steps=3)
    # 200 for the last evaluation, 16 for the step, 200 more if a periodic one follows the step
    assert budget.allows(784, 0, 8, evaluated=True) and not budget.allows(785, 0, 8, evaluated=True)
    assert budget.allows(584, 2, 8, evaluated=True) and not budget.allows(585, 2, 8, evaluated=True)
    # the same before the evaluation at step 3, which is then to be paid as well
    assert budget.allows(584, 3, 8, evaluated=False) and not budget.allows(585, 3, 8, evaluated=False)
    assert budget.allows(784, 3, 8, evaluated=True) and not budget.allows(785, 3, 8, evaluated=True)
    # two steps, of which the second, or the first, is followed by a periodic evaluation
    assert budget.allows(572, 1, 8, 6, evaluated=True) and not budget.allows(573, 1, 8, 6, evaluated=True)
    assert budget.allows(572, 2, 6, 8, evaluated=True) and not budget.allows(573, 2, 6, 8, evaluated=True)
    with pytest.raises(
        ValueError,
        match=r"^judging.max_queries is 415, .* 200 queries each and a step 16: set it to at least 416",
    ):
        Budget(415, **limits, every_steps=0).check(8)
    Budget(416, **limits, every_steps=0).check(8)
