"""Several opinions on one comparison: what they amount to, and how far they disagree.

`combine.py` pools the verdicts of several judges with these functions. `vote` asks one judge that samples its answers
several times, and saves the further queries where two answers agree.

Left out on purpose: weights that are learned, and an order in which judges are asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from xpo_jax.values import Verdict

Request = tuple[int, int]  # the comparison's index, and the number of the vote on it, from 0


def mean(ps: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted mean of probabilities that A is better; at least one, weights positive."""
    p = math.fsum(w * p for w, p in zip(weights, ps, strict=True)) / math.fsum(weights)
    return min(max(p, 0.0), 1.0)  # rounding may exceed the range


def majority(ps: Sequence[float], weights: Sequence[float]) -> float:
    """Return 1 if those who prefer A outweigh those who prefer B, 0 if B's do, and 0.5 if neither.

    A p of 0.5 is for neither. How certain a p is does not count.
    """
    a, b = (
        math.fsum(w for w, p in zip(weights, ps, strict=True) if side * (p - 0.5) > 0) for side in (1, -1)
    )
    return 0.5 if math.isclose(a, b) else float(a > b)


def disagreement(ps: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weight, as a fraction of all, that is not with the most frequent of: A is better, B is, neither.

    0 where all agree. 1/3 where one of three disagrees, 1/2 where two differ, 2/3 where three do.
    """
    total = math.fsum(weights)
    sides = [
        math.fsum(w for w, p in zip(weights, ps, strict=True) if _preference(p) == side)
        for side in (-1, 0, 1)
    ]
    return 0.0 if max(sides) == total else 1 - max(sides) / total


def _preference(p: float) -> int:
    return (p > 0.5) - (p < 0.5)


def vote(
    ask: Callable[[Sequence[Request]], Sequence[Verdict]], comparisons: int, votes: int
) -> list[Verdict]:
    """Ask a judge that samples its answers `votes` times about each comparison, but only twice where two votes agree.

    Two votes agree if both prefer the same answer, or both tie. A vote without a verdict agrees with none.

    Args:
      ask: returns a verdict for each request, independent samples of the same judge.
      comparisons: how many there are.
      votes: at most, for each.

    Returns:
      With one vote its verdict. Otherwise p is the mean over the votes that have a verdict, None if none has; scores
      have, under "a" and "b", the "votes" for each, the "disagreement", and the number of "queries".
    """
    given: list[list[Verdict]] = [[] for _ in range(comparisons)]

    def collect(requests: Sequence[Request]) -> None:
        for (index, _), verdict in zip(requests, ask(requests), strict=True):
            given[index].append(verdict)

    opening = min(votes, 2)
    collect([(i, number) for i in range(comparisons) for number in range(opening)])
    if votes == 1:
        return [verdict for (verdict,) in given]
    disputed = [i for i, (one, other) in enumerate(given) if not _agree(one, other)]
    if votes > opening and disputed:
        collect([(i, number) for i in disputed for number in range(opening, votes)])
    return list(map(_pooled, given))


def _agree(one: Verdict, other: Verdict) -> bool:
    return one.p is not None and other.p is not None and _preference(one.p) == _preference(other.p)


def _pooled(votes: Sequence[Verdict]) -> Verdict:
    """Return the verdict of several votes."""
    ps = [verdict.p for verdict in votes if verdict.p is not None]
    reason = "; ".join(f"vote {number}: {verdict.reason}" for number, verdict in enumerate(votes, 1))
    if not ps:
        return Verdict(None, reason, {"queries": len(votes)})
    ones = [1.0] * len(ps)
    counts = {"a": {"votes": sum(p > 0.5 for p in ps)}, "b": {"votes": sum(p < 0.5 for p in ps)}}
    return Verdict(
        mean(ps, ones), reason, {**counts, "disagreement": disagreement(ps, ones), "queries": len(votes)}
    )
