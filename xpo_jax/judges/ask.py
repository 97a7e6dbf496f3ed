"""Ask a judge about a batch of response pairs, and report what it answered.

Here the order in which the two responses are shown is drawn and swapped back. Pairs that need no judge are decided:
identical responses, and, if the config says so, unfinished ones. How a judge is called and its answers are read is in
`answers.py`; when failures end a run is in `limits.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.io.text import error_line
from xpo_jax.judges.answers import Judged, call_judge, compare, query_count, rename_sides, swap_sides
from xpo_jax.judges.contract import HasStats, Judge, JudgeError
from xpo_jax.judges.limits import CallSummary
from xpo_jax.judges.outcomes import IDENTICAL, IDENTICAL_UNFINISHED, UNFINISHED, add, count_outcomes
from xpo_jax.judges.thinking import without_thinking
from xpo_jax.runtime import collectives, distributed
from xpo_jax.values import Comparison, Prompts, RecordedVerdict, Verdict, Verdicts


class ResponsePairs(NamedTuple):
    """The two responses to each of B prompts.

    policy, reference: B texts each.
    identical: bool[B]; both have the same tokens.
    policy_finished, reference_finished: bool[B].
    """

    policy: Sequence[str]
    reference: Sequence[str]
    identical: np.ndarray
    policy_finished: np.ndarray
    reference_finished: np.ndarray


class _Row(NamedTuple):
    """One row's verdict, as `RecordedVerdict` has it; `shown` is None where the judge was not asked."""

    verdict: Verdict
    shown: tuple[int, int] | None
    flipped: float | None


class ShardSummary(CallSummary):
    """A `CallSummary` with the verdicts on the shard's rows; from another process they are lists, nan is None."""

    p_first: np.ndarray | Sequence[float]
    weight: np.ndarray | Sequence[float]
    flipped: np.ndarray | Sequence[float | None]


# ---- asking ---------------------------------------------------------------------------------------


def ask(
    judge: Judge,
    prompts: Prompts,
    pairs: ResponsePairs,
    *,
    unfinished_loses: bool,
    both_orders: bool,
    hide_thinking: bool,
    shown_seed: Sequence[int],
    recorded: Mapping[int, RecordedVerdict] = MappingProxyType({}),
) -> Verdicts:
    """Return the verdicts on one batch.

    No error of a judge is raised here; see `Verdicts.fatal_error` and `FailureTolerance`.

    Args:
      unfinished_loses: decide pairs with an unfinished response without the judge: it loses to a finished one, and
        two unfinished ones tie.
      both_orders: see `answers.compare`.
      hide_thinking: the judge reads responses without their <think>...</think> blocks, see thinking.py.
      shown_seed: seeds the draw of which response is shown as A (with both orders: in the first one), by position
        in the global batch.
      recorded: by row, verdicts that the judge gave before the run was interrupted. They count as asked.
    """
    position = np.asarray(prompts.position)
    swapped = np.random.default_rng(shown_seed).random(int(position.max()) + 1)[position] < 0.5
    pairs = _without_thinking(pairs) if hide_thinking else pairs
    decided = _decide(prompts, pairs, unfinished_loses)
    earlier = {i: _Row(*verdict) for i, verdict in recorded.items() if i not in decided}
    to_ask = [int(i) for i in np.flatnonzero(prompts.valid) if i not in decided and i not in earlier]
    comparisons = [
        Comparison(
            prompts.messages[i],
            prompts.rows[i],
            pairs.reference[i] if swapped[i] else pairs.policy[i],
            pairs.policy[i] if swapped[i] else pairs.reference[i],
        )
        for i in to_ask
    ]
    fatal_error, counts = "", dict[str, float]()
    try:
        before = judge_stats(judge)
        judged = compare(judge, comparisons, both_orders=both_orders)
        counts = {name: number - before.get(name, 0) for name, number in judge_stats(judge).items()}
    except JudgeError as error:
        fatal_error = str(error)
        judged = [Judged(Verdict(None, fatal_error), None)] * len(to_ask)
    answered = {i: _translate(result, bool(swapped[i])) for i, result in zip(to_ask, judged, strict=True)}
    orders = 1 + both_orders
    queries = (query_count(row.verdict.scores, otherwise=orders) for row in {**answered, **earlier}.values())
    return _stack(
        len(prompts.valid),
        {**decided, **answered, **earlier},
        queries=sum(queries),
        orders=orders,
        fatal_error=fatal_error,
        counts=counts,
    )


def _without_thinking(pairs: ResponsePairs) -> ResponsePairs:
    """Return what the judge reads of responses; those that differ in their thinking alone are identical to it."""
    policy, reference = (
        [without_thinking(text) for text in texts] for texts in (pairs.policy, pairs.reference)
    )
    same = np.array([a == b for a, b in zip(policy, reference, strict=True)])
    return pairs._replace(policy=policy, reference=reference, identical=pairs.identical | same)


def _decide(prompts: Prompts, pairs: ResponsePairs, unfinished_loses: bool) -> dict[int, _Row]:
    """Return, by row, the verdicts that need no judge."""
    decided = {}
    for i in map(int, np.flatnonzero(prompts.valid)):
        finished = pairs.policy_finished[i], pairs.reference_finished[i]
        if pairs.identical[i]:
            reason = IDENTICAL if any(finished) else IDENTICAL_UNFINISHED
            decided[i] = _Row(Verdict(0.5, reason), None, None)
        elif unfinished_loses and not all(finished):
            p = 0.5 + 0.5 * (float(finished[0]) - float(finished[1]))
            decided[i] = _Row(Verdict(p, UNFINISHED), None, None)
    return decided


def _translate(judged: Judged, swapped: bool) -> _Row:
    """Translate a verdict on A and B into one on policy and reference."""
    verdict = swap_sides(judged.verdict) if swapped else judged.verdict
    scores = rename_sides(verdict.scores, {"a": "policy", "b": "reference"})
    return _Row(verdict._replace(scores=scores), (1, 0) if swapped else (0, 1), judged.flipped)


def _stack(size: int, rows: Mapping[int, _Row], **totals: Any) -> Verdicts:
    """Return the verdicts of a batch; a row that is not in `rows` is padding and has none."""
    p_first, weight = np.full(size, 0.5, np.float32), np.zeros(size, np.float32)
    flipped = np.full(size, np.nan, np.float32)
    reasons, scores = [""] * size, [dict[str, Any]() for _ in range(size)]
    shown: list[tuple[int, int] | None] = [None] * size
    for i, row in rows.items():
        reasons[i], scores[i], shown[i] = row.verdict.reason, dict(row.verdict.scores), row.shown
        if row.verdict.p is not None:
            p_first[i], weight[i] = row.verdict.p, 1.0
        if row.flipped is not None:
            flipped[i] = row.flipped
    return Verdicts(
        p_first=p_first,
        weight=weight,
        reasons=tuple(reasons),
        scores=tuple(scores),
        shown=tuple(shown),
        flipped=flipped,
        **totals,
    )


def judge_stats(judge: object) -> dict[str, float]:
    """Return what the judge has counted since it was built.

    Raises:
      JudgeError: its `stats` did not return finite numbers by name.
    """
    if not isinstance(judge, HasStats):
        return {}
    try:
        stats = {str(name): float(number) for name, number in judge.stats().items()}
        if not all(map(math.isfinite, stats.values())):
            raise ValueError(f"it returned {stats}")
        return stats
    except Exception as error:  # a judge is arbitrary code and can fail in any way
        reason = error_line(error, with_class=True)
        raise JudgeError(f"the judge's stats() must return finite numbers by name ({reason})") from error


# ---- several processes ----------------------------------------------------------------------------


def summarize_call(verdicts: Verdicts) -> CallSummary:
    """Return the counts of this process's shard of the rows."""
    shard = distributed.local_slice(len(verdicts.weight))
    asked_rows = [i for i in range(shard.start, shard.stop) if verdicts.shown[i] is not None]
    failed_rows = [i for i in asked_rows if verdicts.weight[i] == 0]
    return {
        "pairs": len(asked_rows),
        "failed": len(failed_rows),
        "queries": sum(query_count(verdicts.scores[i], otherwise=verdicts.orders) for i in asked_rows),
        "first_failure": verdicts.reasons[failed_rows[0]] if failed_rows else "",
        "fatal_error": verdicts.fatal_error,
        "counts": dict(verdicts.counts),
        "outcomes": count_outcomes(verdicts, range(shard.start, shard.stop)),
    }


def summarize_shard(verdicts: Verdicts) -> ShardSummary:
    """Return what the other processes need of this process's shard of the rows."""
    shard = distributed.local_slice(len(verdicts.weight))
    return {
        **summarize_call(verdicts),
        "p_first": verdicts.p_first[shard],
        "weight": verdicts.weight[shard],
        "flipped": verdicts.flipped[shard],
    }


def call_by_shares(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Do what `call_judge` does, where all processes have the same comparisons: each asks about its own share.

    Raises:
      JudgeError: on every process, if the judge raised one on any.
    """
    share, fatal_error = list[Verdict](), ""
    try:
        share = call_judge(judge, comparisons[distributed.local_slice(len(comparisons))])
    except JudgeError as error:
        fatal_error = str(error)
    gathered = collectives.all_gather({"verdicts": share, "fatal_error": fatal_error})
    for result in gathered:
        if result["fatal_error"]:
            raise JudgeError(result["fatal_error"])
    return [Verdict(*verdict) for result in gathered for verdict in result["verdicts"]]


def merge_shards(local: Verdicts, summaries: Sequence[ShardSummary]) -> Verdicts:
    """Return the verdicts on the global batch, from the summaries of all processes.

    Numbers cover all rows; reasons, scores and the order shown only those of this process.
    """
    # nan arrives as None from another process
    flipped = [[math.nan if x is None else x for x in summary["flipped"]] for summary in summaries]
    return local._replace(
        p_first=np.concatenate([np.asarray(summary["p_first"], np.float32) for summary in summaries]),
        weight=np.concatenate([np.asarray(summary["weight"], np.float32) for summary in summaries]),
        flipped=np.concatenate([np.asarray(values, np.float32) for values in flipped]),
        queries=sum(summary["queries"] for summary in summaries),
        counts=add(summary["counts"] for summary in summaries),
    )


# ---- reporting ------------------------------------------------------------------------------------


def wins(p_first: np.ndarray) -> np.ndarray:
    """Return 1 where the policy's response was judged better, however narrowly, 0 where worse, 0.5 for a tie."""
    return np.where(p_first == 0.5, 0.5, (p_first > 0.5).astype(np.float64))


def metrics(verdicts: Verdicts, valid: np.ndarray) -> dict[str, float]:
    """Return the metrics of a batch.

    The win rate is over the rows with a verdict and counts a tie as half a win. The tie and failure rates are over
    all valid rows. The position flip rate is over the rows with a verdict in both orders, nan if there are none. The
    judge's own counts are of this batch alone.
    """
    judged = verdicts.weight > 0
    both_orders = verdicts.flipped[~np.isnan(verdicts.flipped)]
    rows = max(1, int(valid.sum()))
    return {
        **{f"judge/{name}": number for name, number in verdicts.counts.items()},
        "judge/win_rate": float(wins(verdicts.p_first[judged]).mean()) if judged.any() else math.nan,
        "judge/tie_rate": float((judged & (verdicts.p_first == 0.5)).sum() / rows),
        "judge/failed_rate": float((valid & ~judged).sum() / rows),
        "judge/position_flip_rate": float(both_orders.mean()) if both_orders.size else math.nan,
    }
