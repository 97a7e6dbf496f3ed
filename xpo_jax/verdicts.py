"""Ask a judge about a batch, and translate what it answers.

Here the order shown is drawn and swapped back, identical and unfinished responses are settled without
asking, and every answer is checked. Asking twice, deadlines and budgets belong to a later part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xpo_jax.values import Answer, Comparison, Judge, Prompts, Verdict, Verdicts


class JudgeError(ValueError):
    """A judge that does not keep the contract; says which, and how to mend it."""


def parse(answer: Answer) -> Verdict:
    """One answer as a Verdict; p is None where there is none.

    Raises:
      JudgeError: an answer that the contract does not know.
    """
    if answer is None:
        return Verdict(None, "no verdict")
    if isinstance(answer, Verdict):
        return answer if answer.p is None else answer._replace(p=_probability(answer.p))
    if isinstance(answer, str):
        try:
            return Verdict({"A": 1.0, "B": 0.0, "tie": 0.5}[answer])
        except KeyError:
            raise JudgeError(
                f"the judge answered {answer[:60]!r}; a text answer is 'A', 'B' or 'tie'"
            ) from None
    return Verdict(_probability(answer))


def _probability(p: Any) -> float | None:
    if isinstance(p, (bool, np.bool_, int, np.integer)):
        raise JudgeError(
            f"the judge answered the {type(p).__name__} {p!r}, which is refused because elsewhere 0 means that"
            " the first one won; answer 'A', 'B', 'tie' or a float, the probability that A is better"
        )
    if not isinstance(p, (float, np.floating)):
        raise JudgeError(f"the judge answered {str(p)[:60]!r}; answer 'A', 'B', 'tie', None, a float or a Verdict")
    if math.isnan(p):
        return None
    if not 0 <= p <= 1:
        raise JudgeError(f"the judge answered {p!r}; a float is the probability that A is better, from 0 to 1")
    return float(p)


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
    shown_seed: Sequence[int],
) -> Verdicts:
    """Verdicts for one batch.

    Args:
      policy, reference: B texts each.
      identical: bool[B], the same tokens: a tie with weight 1, the judge is not asked.
      policy_finished, reference_finished: bool[B].
      unfinished_loses: an unfinished response loses to a finished one, two unfinished ones tie, and the
        judge is not asked.
      shown_seed: seeds the draw of which candidate is shown as A, by position in the global batch.

    Raises:
      JudgeError: a wrong number of answers, or one that the contract does not know.
    """
    B = len(policy)
    position = np.asarray(prompts.position)
    swapped = np.random.default_rng(shown_seed).random(int(position.max()) + 1)[position] < 0.5
    settled: dict[int, tuple[float, str]] = {}
    asked: list[int] = []
    for i in range(B):
        if not prompts.real[i]:
            continue
        if identical[i]:
            settled[i] = (0.5, "identical responses")
        elif unfinished_loses and not (policy_finished[i] and reference_finished[i]):
            p = 0.5 + 0.5 * (float(policy_finished[i]) - float(reference_finished[i]))
            settled[i] = (p, "unfinished response")
        else:
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
    answers = judge(comparisons) if comparisons else []
    if isinstance(answers, (str, bytes)) or not hasattr(answers, "__len__") or len(answers) != len(comparisons):
        found = f"{len(answers)} answers" if hasattr(answers, "__len__") else type(answers).__name__
        raise JudgeError(f"the judge was asked {len(comparisons)} comparisons and returned {found}; one each, in order")

    p_first, weight = np.full(B, 0.5, np.float32), np.zeros(B, np.float32)
    reasons, scores = [""] * B, [dict[str, Any]() for _ in range(B)]
    for i, (p, reason) in settled.items():
        p_first[i], weight[i], reasons[i] = p, 1.0, reason
    for i, answer in zip(asked, answers, strict=True):
        verdict = parse(answer)
        reasons[i] = verdict.reason
        names = {"a": "reference", "b": "policy"} if swapped[i] else {"a": "policy", "b": "reference"}
        scores[i] = {names.get(name, name): value for name, value in verdict.scores.items()}
        if verdict.p is not None:
            p_first[i] = 1 - verdict.p if swapped[i] else verdict.p
            weight[i] = 1.0
    shown: list[tuple[int, int] | None] = [None] * B
    for i in asked:
        shown[i] = (1, 0) if swapped[i] else (0, 1)
    return Verdicts(p_first, weight, len(comparisons), tuple(reasons), tuple(scores), tuple(shown))


def metrics(verdicts: Verdicts, real: np.ndarray) -> dict[str, float]:
    """judge/win_rate counts ties as half; shares are of the real rows, the win rate of those with a verdict."""
    judged = verdicts.weight > 0
    rows = max(1, int(real.sum()))
    return {
        "judge/win_rate": float(verdicts.p_first[judged].mean()) if judged.any() else math.nan,
        "judge/tie_rate": float((judged & (verdicts.p_first == 0.5)).sum() / rows),
        "judge/failed_rate": float((real & ~judged).sum() / rows),
    }

