"""Ask a judge about a batch, and translate what it answers.

Here the order shown is drawn and swapped back, identical and unfinished responses are settled without
asking, and every answer is checked. Asking twice, deadlines and budgets belong to a later part.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xpo_jax import distributed
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
        if isinstance(answer.p, str):
            wrong = f"p {_shown(answer.p)}; p is a float, the probability that A is better, or None"
        elif not isinstance(answer.reason, str):
            wrong = f"the reason {_shown(answer.reason)}; a reason is text"
        elif not isinstance(answer.scores, Mapping):
            wrong = f"scores {_shown(answer.scores)}; scores are a mapping, such as {{'a': 0.7}}"
        else:
            return answer if answer.p is None else answer._replace(p=_probability(answer.p))
        raise JudgeError(f"the judge answered a Verdict with {wrong}")
    if isinstance(answer, str):
        try:
            return Verdict({"A": 1.0, "B": 0.0, "tie": 0.5}[answer])
        except KeyError:
            raise JudgeError(
                f"the judge answered {_shown(answer)}; a text answer is 'A', 'B' or 'tie'"
            ) from None
    return Verdict(_probability(answer))


def _probability(p: Any) -> float | None:
    if isinstance(p, (bool, np.bool_, int, np.integer)):
        raise JudgeError(
            f"the judge answered the {type(p).__name__} {p!r}, which is refused because elsewhere 0 means"
            " that the first one won; answer 'A', 'B', 'tie' or a float, the probability that A is better"
        )
    if not isinstance(p, (float, np.floating)):
        raise JudgeError(
            f"the judge answered {_shown(p)}; answer 'A', 'B', 'tie', None, a float or a Verdict"
        )
    if math.isnan(p):
        return None
    if not 0 <= p <= 1:
        raise JudgeError(
            f"the judge answered {p!r}; a float is the probability that A is better, from 0 to 1"
        )
    return float(p)


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


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
    answers = _answers(judge, comparisons) if comparisons else []

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


def _answers(judge: Judge, comparisons: Sequence[Comparison]) -> Sequence[Answer]:
    """One answer for each comparison, unread; whatever else a judge does is a JudgeError."""
    try:
        answers = judge(comparisons)
    except Exception as error:  # a judge is anybody's code and can fail in any way
        frames = traceback.extract_tb(error.__traceback__)[1:]
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and frames and os.path.dirname(__file__) in frames[-1].filename:
            raise JudgeError(text) from error  # our own judges say themselves what is wrong
        own = [frame for frame in frames if frame.filename == frames[0].filename]  # not the libraries below
        place = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
        raise JudgeError(f"the judge failed: {type(error).__name__}: {text}{place}") from error
    vector = isinstance(answers, np.ndarray) and answers.ndim == 1
    listed = vector or (isinstance(answers, Sequence) and not isinstance(answers, (str, bytes)))
    if not listed or len(answers) != len(comparisons):
        found = f"{len(answers)} answers" if listed else type(answers).__name__
        raise JudgeError(
            f"the judge was asked {len(comparisons)} comparisons and returned {found};"
            " return a list with one answer each, in order"
        )
    return answers


def is_collective(judge: Judge) -> bool:
    """Whether a judge must be asked the whole batch by every process alike, because it runs on their devices.

    It says so by an attribute `collective` that is true. Others are asked about their process's rows only.
    """
    return bool(getattr(judge, "collective", False))


def brief(own: Verdicts) -> dict[str, Any]:
    """What other processes need to know of the verdicts that this one found on its share of the rows."""
    share = distributed.share(len(own.weight))
    return {
        "p_first": own.p_first[share],
        "weight": own.weight[share],
        "queries": sum(shown is not None for shown in own.shown[share]),
    }


def joined(own: Verdicts, briefs: Sequence[Mapping[str, Any]]) -> Verdicts:
    """The verdicts on the whole batch: numbers from the `brief` of each process, texts of this one's rows only."""
    return own._replace(
        p_first=np.concatenate([np.asarray(each["p_first"], np.float32) for each in briefs]),
        weight=np.concatenate([np.asarray(each["weight"], np.float32) for each in briefs]),
        queries=sum(each["queries"] for each in briefs),
    )


def wins(p_first: np.ndarray) -> np.ndarray:
    """1 where the first answer is judged better, however narrowly, 0 where worse, 0.5 a tie."""
    return np.where(p_first == 0.5, 0.5, (p_first > 0.5).astype(np.float64))


def metrics(verdicts: Verdicts, real: np.ndarray) -> dict[str, float]:
    """The win rate counts ties as half and is of the rows with a verdict; the shares are of all real rows."""
    judged = verdicts.weight > 0
    rows = max(1, int(real.sum()))
    return {
        "judge/win_rate": float(wins(verdicts.p_first[judged]).mean()) if judged.any() else math.nan,
        "judge/tie_rate": float((judged & (verdicts.p_first == 0.5)).sum() / rows),
        "judge/failed_rate": float((real & ~judged).sum() / rows),
    }
