"""Ask a judge about a batch, and translate what it answers; how long a run puts up with failures, and with costs.

Here the order shown is drawn and swapped back, and identical and unfinished responses are settled without
asking. What an answer means, and asking in both orders, is `contract.py`'s.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from xpo_jax.io.text import error_line
from xpo_jax.judges.contract import Judged, JudgeError, compare, exchanged, renamed
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none
from xpo_jax.values import Comparison, Judge, Prompts, RecordedVerdict, Verdict, Verdicts


def ask(
    judge: Judge,
    prompts: Prompts,
    policy: Sequence[str],
    reference: Sequence[str],
    *,
    identical: np.ndarray,
    policy_finished: np.ndarray,
    reference_finished: np.ndarray,
    unfinished_loses: bool,
    both_orders: bool,
    shown_seed: Sequence[int],
    paid: Mapping[int, RecordedVerdict] = MappingProxyType({}),
) -> Verdicts:
    """Verdicts for one batch. Whatever a judge does, it raises nothing: see `Verdicts.refused` and `FailureTolerance`.

    Args:
      policy, reference: B texts each.
      identical: bool[B], the same tokens: a tie with weight 1, the judge is not asked.
      policy_finished, reference_finished: bool[B].
      unfinished_loses: an unfinished response loses to a finished one, two unfinished ones tie, and the
        judge is not asked.
      both_orders: see `contract.compare`.
      shown_seed: seeds the draw of which candidate is shown as A (with both orders: first), by position in the
        global batch.
      paid: by row, verdicts that the judge gave before the run was interrupted. They count as asked.
    """
    B = len(policy)
    position = np.asarray(prompts.position)
    swapped = np.random.default_rng(shown_seed).random(int(position.max()) + 1)[position] < 0.5
    settled: dict[int, tuple[float, str]] = {}
    asked: list[int] = []
    for i in range(B):
        if not prompts.valid[i]:
            continue
        if identical[i]:
            settled[i] = (0.5, "identical responses")
        elif unfinished_loses and not (policy_finished[i] and reference_finished[i]):
            p = 0.5 + 0.5 * (float(policy_finished[i]) - float(reference_finished[i]))
            settled[i] = (p, "unfinished response")
        elif i not in paid:
            asked.append(i)
    comparisons = [
        Comparison(
            prompts.messages[i],
            prompts.rows[i],
            reference[i] if swapped[i] else policy[i],
            policy[i] if swapped[i] else reference[i],
        )
        for i in asked
    ]
    refused, counts = "", dict[str, float]()
    try:
        before = _stats(judge)
        answers = compare(judge, comparisons, both_orders=both_orders)
        counts = {name: number - before.get(name, 0) for name, number in _stats(judge).items()}
    except JudgeError as error:
        refused = str(error)
        answers = [Judged(Verdict(None, refused), None)] * len(asked)

    p_first, weight = np.full(B, 0.5, np.float32), np.zeros(B, np.float32)
    flipped = np.full(B, np.nan, np.float32)
    reasons, scores = [""] * B, [dict[str, Any]() for _ in range(B)]
    shown: list[tuple[int, int] | None] = [None] * B
    for i, (p, reason) in settled.items():
        p_first[i], weight[i], reasons[i] = p, 1.0, reason
    for i, (verdict, flip) in zip(asked, answers, strict=True):
        shown[i] = (1, 0) if swapped[i] else (0, 1)
        verdict = exchanged(verdict) if swapped[i] else verdict
        reasons[i] = verdict.reason
        scores[i] = renamed(verdict.scores, {"a": "policy", "b": "reference"})
        if verdict.p is not None:
            p_first[i], weight[i] = verdict.p, 1.0
        if flip is not None:
            flipped[i] = flip
    known = {i: each for i, each in paid.items() if i not in settled}
    for i, earlier in known.items():
        verdict, shown[i] = earlier.verdict, earlier.shown
        p_first[i], weight[i], reasons[i], scores[i] = verdict.p, 1.0, verdict.reason, dict(verdict.scores)
        if earlier.flipped is not None:
            flipped[i] = earlier.flipped
    return Verdicts(
        p_first,
        weight,
        (len(comparisons) + len(known)) * (1 + both_orders),
        tuple(reasons),
        tuple(scores),
        tuple(shown),
        flipped,
        refused,
        counts,
    )


def _stats(judge: Judge) -> dict[str, float]:
    """What a judge has counted since it was built.

    Raises:
      JudgeError: it has a `stats` that does not give numbers by name.
    """
    try:
        found = {str(name): float(number) for name, number in getattr(judge, "stats", dict)().items()}
        if not all(map(math.isfinite, found.values())):
            raise ValueError(f"found {found}")
        return found
    except Exception as error:  # a judge is anybody's code and can fail in any way
        reason = error_line(error, with_class=True)
        raise JudgeError(f"the judge's stats() must return numbers by name ({reason})") from error


# ---- of many processes ----------------------------------------------------------------------------


def is_collective(judge: Judge) -> bool:
    """Whether a judge must be asked the whole batch by every process alike, because it runs on their devices.

    It says so by an attribute `collective` that is true. Others are asked about their process's rows only.
    """
    return bool(getattr(judge, "collective", False))


def brief(own: Verdicts) -> dict[str, Any]:
    """What other processes need to know of the verdicts that this one found on its share of the rows."""
    share = distributed.local_slice(len(own.weight))
    asked = [shown is not None for shown in own.shown[share]]
    failures = [i for i in range(share.start, share.stop) if own.shown[i] is not None and own.weight[i] == 0]
    orders = own.queries // max(1, sum(shown is not None for shown in own.shown))
    return {
        "p_first": own.p_first[share],
        "weight": own.weight[share],
        "flipped": own.flipped[share],
        "queries": sum(asked) * orders,
        "asked": sum(asked),
        "failed": len(failures),
        "words": own.reasons[failures[0]] if failures else "",
        "refused": own.refused,
        "counts": own.counts,
    }


def joined(own: Verdicts, briefs: Sequence[Mapping[str, Any]]) -> Verdicts:
    """The verdicts on the whole batch: numbers from the `brief` of each process, texts of this one's rows only."""
    # a nan is None where it came from another process
    flipped = [np.array([np.nan if x is None else x for x in each["flipped"]], np.float32) for each in briefs]
    return own._replace(
        p_first=np.concatenate([np.asarray(each["p_first"], np.float32) for each in briefs]),
        weight=np.concatenate([np.asarray(each["weight"], np.float32) for each in briefs]),
        flipped=np.concatenate(flipped),
        queries=sum(each["queries"] for each in briefs),
        counts=summed(briefs),
    )


def summed(briefs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the judges of all processes counted in all calls."""
    counts: dict[str, float] = {}
    for each in briefs:
        for name, number in each["counts"].items():
            counts[name] = counts.get(name, 0.0) + number
    return counts


# ---- failures and costs ---------------------------------------------------------------------------


class FailureTolerance:
    """How long a run puts up with a judge that fails; one for all of a run, alike on every process.

    Args:
      max_failed_fraction, max_failed_batches: see settings.Judging.
    """

    def __init__(self, *, max_failed_fraction: float, max_failed_batches: int):
        self._share, self._batches = max_failed_fraction, max_failed_batches
        self._in_a_row, self._asked_before = 0, False

    @property
    def state(self) -> tuple[int, bool]:
        """For a checkpoint; set it to go on from there."""
        return self._in_a_row, self._asked_before

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self._in_a_row, self._asked_before = state

    def check(self, briefs: Sequence[Mapping[str, Any]]) -> None:
        """Take note of a batch, from the `brief` of each process and call.

        Raises:
          JudgeError: an answer that is refused; a first batch without any verdict; too many failures in too many
            batches in a row. In the judge's words.
        """
        refused = next((each["refused"] for each in briefs if each["refused"]), "")
        if refused:
            raise JudgeError(refused)
        asked, failed = (sum(each[name] for each in briefs) for name in ("asked", "failed"))
        if not asked:
            return
        words = next((each["words"] for each in briefs if each["words"]), "")
        first, self._asked_before = not self._asked_before, True
        self._in_a_row = self._in_a_row + 1 if failed / asked > self._share else 0
        if first and failed == asked and self._share < 1:
            raise JudgeError(f"the judge has no verdict on any of the first {asked} pairs: {words}")
        if self._in_a_row == self._batches:
            raise JudgeError(
                f"the judge had no verdict on more than {self._share:.0%} of the pairs in {self._in_a_row}"
                f" batches in a row; in the last of them: {words}"
            )


@contextlib.contextmanager
def save_on_judge_error(save: Callable[[], object]) -> Iterator[None]:
    """Where a judge ends the run in here, `save` is called before the error is told, with what it returns."""
    try:
        yield
    except JudgeError as error:
        saved = save()
        with all_or_none("judging"):  # the same on every process
            raise JudgeError(f"{error}; the last weights are in {saved}") from error


class Budget:
    """What a run may ask its judge, comparisons counted once for each order; the end of a run is kept back.

    Args:
      max_queries: None for no limit.
      orders: 2 where every comparison is asked in both orders.
      evaluation: comparisons of one evaluation at most.
      every_steps: an evaluation comes after every so many steps, too; 0 for none.
    """

    def __init__(self, max_queries: int | None, *, orders: int, evaluation: int, every_steps: int):
        self.max_queries, self._every = max_queries, every_steps
        self._orders, self._evaluation = orders, evaluation * orders

    def check(self, first_batch: int) -> None:
        """Raises ValueError where a run could not make a single step; `first_batch` is that step's valid rows."""
        least = 2 * self._evaluation + self._orders * first_batch
        if self.max_queries is not None and self.max_queries < least:
            raise ValueError(
                f"judging.max_queries is {self.max_queries}, but the evaluations at the start and the end may ask"
                f" {self._evaluation} each and a step {self._orders * first_batch}: give at least {least}, or lower"
                " evaluation.prompts or evaluation.reference_samples"
            )

    def allows(self, spent: int, step: int, rows: int) -> bool:
        """Whether step number `step` (from 0) with so many valid rows can be paid, and the last evaluation after it."""
        periodic = self._evaluation if self._every and (step + 1) % self._every == 0 else 0
        needed = self._orders * rows + periodic + self._evaluation
        return self.max_queries is None or spent + needed <= self.max_queries


# ---- what is reported -----------------------------------------------------------------------------


def wins(p_first: np.ndarray) -> np.ndarray:
    """1 where the first answer is judged better, however narrowly, 0 where worse, 0.5 a tie."""
    return np.where(p_first == 0.5, 0.5, (p_first > 0.5).astype(np.float64))


def metrics(verdicts: Verdicts, valid: np.ndarray) -> dict[str, float]:
    """The win rate counts ties as half and is of the rows with a verdict; the shares are of all valid rows.

    The position flip rate is of the rows with a verdict in both orders; nan where there is none. What the judge
    itself counted is of this batch alone.
    """
    judged = verdicts.weight > 0
    twice = verdicts.flipped[~np.isnan(verdicts.flipped)]
    rows = max(1, int(valid.sum()))
    return {
        **{f"judge/{name}": number for name, number in verdicts.counts.items()},
        "judge/win_rate": float(wins(verdicts.p_first[judged]).mean()) if judged.any() else math.nan,
        "judge/tie_rate": float((judged & (verdicts.p_first == 0.5)).sum() / rows),
        "judge/failed_rate": float((valid & ~judged).sum() / rows),
        "judge/position_flip_rate": float(twice.mean()) if twice.size else math.nan,
    }
