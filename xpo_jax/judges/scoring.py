"""Answers scored one by one, and a judge that compares them by these scores.

With a rule that pairs candidates by their scores (algorithm/pairing.py), a step first asks a judge that is
`contract.HasScores` for the score of every answer, chooses the pairs, and then asks `ScoredJudge`, which looks the
scores up: each answer is scored once, however many pairs it is in. **A query is then an answer that was scored**, not a
comparison; so it is counted in `judge/queries` and against `judging.max_queries`.

Answers with the same text to a prompt are scored once. Where an unfinished answer loses without a judge, it has no
score.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeGuard

import numpy as np

from xpo_jax.data.pairs_log import content_hash
from xpo_jax.io.copies import copied
from xpo_jax.io.text import shorten
from xpo_jax.judges.answers import failure_reason
from xpo_jax.judges.ask import judge_stats
from xpo_jax.judges.contract import HasScores, JudgeError
from xpo_jax.runtime import distributed
from xpo_jax.runtime.user_code import surroundings_restored
from xpo_jax.values import Candidate, Comparison, Prompts, Verdict, Verdicts


class ScoreSummary(TypedDict):
    """What a process found out about its rows, for all processes; plain JSON values.

    scores: by row, and in it by candidate; None for no score. queries: answers scored.
    failure: why some have no score, or "". fatal_error: see `values.Verdicts`.
    counts: by how much the judge's `stats` increased.
    """

    scores: list[list[float | None]]
    queries: int
    failure: str
    fatal_error: str
    counts: dict[str, float]


def key(candidate: Candidate) -> str:
    """Return what identifies an answer: a hash of conversation, row and text."""
    return content_hash(candidate.messages, candidate.row, candidate.text, "")


def score_rows(
    judge: HasScores,
    prompts: Prompts,
    texts: Sequence[Sequence[str]],
    loses: np.ndarray,
    *,
    recorded: Mapping[str, float],
    collective: bool,
) -> ScoreSummary:
    """Score the candidates of this process's rows; a collective judge scores those of all rows on every process.

    Args:
      texts: by candidate, B texts each, as the judge reads them.
      loses: bool[C B], where a candidate is not to be scored.
      recorded: by `key`, scores from before the run was interrupted. They count as asked.
    """
    shard = distributed.local_slice(len(prompts.valid))
    asked_rows = range(len(prompts.valid)) if collective else range(shard.start, shard.stop)
    questions: dict[str, Candidate] = {}
    keys: dict[tuple[int, int], str] = {}
    for row in asked_rows:
        for number in range(len(texts)):
            if prompts.valid[row] and not loses[number, row]:
                candidate = _candidate(prompts, row, texts[number][row])
                keys[row, number] = key(candidate)
                questions[keys[row, number]] = candidate
    answers, failure, fatal_error, counts = dict(recorded), "", "", dict[str, float]()
    new = [name for name in questions if name not in recorded]
    try:
        before = judge_stats(judge)
        scores, failure = _call(judge, [questions[name] for name in new])
        counts = {name: number - before.get(name, 0) for name, number in judge_stats(judge).items()}
        answers |= dict(zip(new, scores, strict=True))
    except JudgeError as error:
        fatal_error = str(error)
    local = range(shard.start, shard.stop)
    return {
        "scores": [
            [_plain(answers.get(keys.get((row, number), ""))) for number in range(len(texts))]
            for row in local
        ],
        "queries": len({keys[at] for at in keys if at[0] in local}),
        "failure": failure,
        "fatal_error": fatal_error,
        "counts": counts,
    }


def _candidate(prompts: Prompts, row: int, text: str) -> Candidate:
    return Candidate(prompts.messages[row], prompts.rows[row], text)


def _plain(score: float | None) -> float | None:
    """Return a finite score, or None; infinite ones could not be logged."""
    return None if score is None or not math.isfinite(score) else score


def _call(judge: HasScores, candidates: Sequence[Candidate]) -> tuple[list[float], str]:
    """Return a score for each answer, nan for none, and why there are such."""
    if not candidates:
        return [], ""
    try:
        with surroundings_restored():
            returned = judge.scores(
                [Candidate(copied(c.messages), copied(c.row), c.text) for c in candidates]
            )
        returned = list(returned)
        if len(returned) != len(candidates):
            raise ValueError(
                f"{len(candidates)} answers were to be scored, and scores() returned {len(returned)}"
            )
    except JudgeError:
        raise
    except BaseException as error:  # a judge is arbitrary code and can fail in any way
        return [math.nan] * len(candidates), failure_reason(error)
    scores = [float(score) if _is_finite(score) else math.nan for score in returned]
    missing = [score for score in returned if not _is_finite(score)]
    if not missing:
        return scores, ""
    first = shorten(repr(missing[0]), 80)
    return scores, (
        f"the judge's scores() gave {len(missing)} of {len(scores)} answers no finite number, the first {first}"
    )


def _is_finite(score: Any) -> TypeGuard[float]:
    """Return whether a judge returned a finite number; a bool is none, because it may mean that an answer won."""
    return isinstance(score, numbers.Real) and not isinstance(score, bool) and math.isfinite(score)


class ScoredJudge:
    """Compares answers by scores that a judge gave before.

    Args:
      judge: it.
      scores: by `key`.
      failure: why some answers have none, or "".
    """

    def __init__(self, judge: HasScores, scores: Mapping[str, float], failure: str):
        self._judge, self._scores, self._failure = judge, scores, failure

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Compare by the scores; there is no verdict where one is missing."""
        return [self._compare(c) for c in comparisons]

    def _compare(self, c: Comparison) -> Verdict:
        a, b = (self._scores.get(key(Candidate(c.messages, c.row, text)), math.nan) for text in (c.a, c.b))
        if math.isnan(a) or math.isnan(b):
            return Verdict(None, self._failure or "no score")
        scores = {"a": {"score": a}, "b": {"score": b}}
        p = self._judge.compare_scores(a, b)
        if not _is_finite(p) or not 0 <= p <= 1:
            raise JudgeError(
                f"the judge's compare_scores({a:.4g}, {b:.4g}) returned {shorten(repr(p), 80)}; return the probability"
                " that the first is better, from 0 to 1"
            )
        return Verdict(float(p), f"A {a:.4g}; B {b:.4g}", scores)


class Scored(NamedTuple):
    """The scores of a batch, from all processes.

    scores: f64[C B], nan for none. queries: answers scored. failure: why some have none, or "".
    counts: of the judge's `stats`.
    """

    scores: np.ndarray
    queries: int
    failure: str
    counts: Mapping[str, float]

    def counted(self, verdicts: Verdicts) -> Verdicts:
        """Return verdicts of a `ScoredJudge` with what was put to the judge itself."""
        return verdicts._replace(queries=self.queries, counts=self.counts)


def merge(summaries: Iterable[ScoreSummary]) -> Scored:
    """Return the scores of all rows.

    Raises:
      JudgeError: a fatal error on any process.
    """
    summaries = list(summaries)
    if fatal_error := next((s["fatal_error"] for s in summaries if s["fatal_error"]), ""):
        raise JudgeError(fatal_error)
    rows = [[math.nan if x is None else x for x in row] for s in summaries for row in s["scores"]]
    counts: dict[str, Any] = {}
    for summary in summaries:
        for name, number in summary["counts"].items():
            counts[name] = counts.get(name, 0) + number
    return Scored(
        np.array(rows, np.float64).T,
        sum(s["queries"] for s in summaries),
        next((s["failure"] for s in summaries if s["failure"]), ""),
        counts,
    )


def scores_by_key(prompts: Prompts, texts: Sequence[Sequence[str]], scores: np.ndarray) -> dict[str, float]:
    """Return the scores by `key`."""
    return {
        key(_candidate(prompts, row, text)): float(scores[number, row])
        for number in range(len(texts))
        for row, text in enumerate(texts[number])
        if prompts.valid[row]
    }
