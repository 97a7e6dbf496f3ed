"""What became of the pairs of a run, and why nothing can be learned from them where that is so.

An update learns from a verdict that prefers one response. Where there is none, training continues and changes nothing
that anybody wanted; the causes differ (answers cut off before they differ, a judge that always ties or always prefers
the same letter), and each has its own remedy.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from xpo_jax.values import Verdicts

# Reasons of pairs that no judge was asked about.
IDENTICAL, UNFINISHED = "identical responses", "unfinished response"
IDENTICAL_UNFINISHED = "identical unfinished responses"  # cut off before they could differ
SAME_LETTER_PAIRS = 20  # that all go to one letter: a fair judge does that once in half a million

Outcomes = Mapping[str, int]
N = TypeVar("N", int, float)

_CAUSES = {
    "identical": ("the two responses were the same", "raise sampling.temperature"),
    "unfinished": (
        "neither response was finished",
        "raise sampling.max_new_tokens, or name the token that ends an answer in sampling.end_tokens",
    ),
    "flipped": (
        "the judge changed its mind with the order shown",
        "use a judge that reads both answers, and try it with python -m xpo_jax.tools.judge",
    ),
    "tied": (
        "the judge called it a tie",
        "try the judge on such answers with python -m xpo_jax.tools.judge",
    ),
    "failed": ("the judge gave no verdict", "read `failure` in pairs.jsonl, and fix the judge"),
}


def count_outcomes(verdicts: Verdicts, rows: Iterable[int]) -> dict[str, int]:
    """Count what became of some pairs of a batch.

    Args:
      verdicts: with reasons, so of this process.
      rows: the pairs to count; padding rows are left out.

    Returns:
      "pairs", and of these "decisive" (one response was preferred) or the cause why not, see _CAUSES. Of the decisive
      ones, "won" by the policy, and "judged" by the judge, of those "letter_a", where A was preferred. Where the scores
      have a "disagreement", "pooled", and of those "disagreed", where it is above 0, in either order.
    """
    counts: collections.Counter[str] = collections.Counter()
    for i in rows:
        shown, p = verdicts.shown[i], float(verdicts.p_first[i])
        if shown is None and not verdicts.reasons[i]:
            continue  # a padding row
        counts["pairs"] += 1
        if disagreements := _disagreements(verdicts.scores[i]):
            counts["pooled"] += 1
            counts["disagreed"] += max(disagreements) > 0
        if verdicts.weight[i] == 0:
            counts["failed"] += 1
        elif p != 0.5:
            counts["decisive"] += 1
            counts["won"] += p > 0.5
            counts["judged"] += shown is not None
            counts["letter_a"] += shown is not None and shown[0] == (0 if p > 0.5 else 1)
        elif shown is None:
            counts["identical" if verdicts.reasons[i] == IDENTICAL else "unfinished"] += 1
        else:
            counts["flipped" if verdicts.flipped[i] == 1 else "tied"] += 1
    return {name: int(count) for name, count in counts.items() if count}


def _disagreements(scores: Mapping[str, Any]) -> list[float]:
    """Return the "disagreement" in the scores of each order; numbers only, since a judge may log anything."""
    exchanged = scores.get("exchanged")
    orders = [scores, exchanged] if isinstance(exchanged, Mapping) else [scores]
    stated = [order.get("disagreement") for order in orders]
    return [float(x) for x in stated if isinstance(x, int | float) and not isinstance(x, bool)]


def add(several: Iterable[Mapping[str, N]]) -> dict[str, N]:
    """Return the sums, by name, of what was counted in several calls, steps or processes."""
    total: dict[str, N] = {}
    for counts in several:
        for name, number in counts.items():
            total[name] = total.get(name, 0) + number
    return total


def problem(outcomes: Outcomes) -> str:
    """Return why nothing can be learned from pairs with these outcomes, and the remedy; "" where something can."""
    pairs, judged = outcomes.get("pairs", 0), outcomes.get("judged", 0)
    if pairs and not outcomes.get("decisive"):
        cause = max(_CAUSES, key=lambda name: outcomes.get(name, 0))
        what, remedy = _CAUSES[cause]
        return f"no verdict preferred one response: of {pairs} pairs, in {outcomes[cause]} {what}; {remedy}"
    letter_a = outcomes.get("letter_a", 0)
    if judged >= SAME_LETTER_PAIRS and letter_a in (0, judged):
        letter = "A" if letter_a else "B"
        return (
            f"the judge preferred the answer shown as {letter} in all of {judged} comparisons, whichever answer that"
            " was; fix the judge, and try it with python -m xpo_jax.tools.judge"
        )
    return ""


def metrics(outcomes: Outcomes) -> dict[str, float]:
    """Return the fraction of pairs with a preference, and that of the judge's preferences for A; nan for none.

    Where several opinions were pooled, also the fraction of these pairs on which they differed.
    """
    pairs, judged, pooled = (outcomes.get(name, 0) for name in ("pairs", "judged", "pooled"))
    differed = {"disagreement_rate": outcomes.get("disagreed", 0) / pooled} if pooled else {}
    return {
        "decisive_rate": outcomes.get("decisive", 0) / pairs if pairs else np.nan,
        "letter_a_rate": outcomes.get("letter_a", 0) / judged if judged else np.nan,
        **differed,
    }
