"""Scores of single answers: what is put to the judge, what becomes of failures, and how processes share the work."""

import math

import numpy as np
import pytest
from fakes import Scoring

from xpo_jax.judges import scoring
from xpo_jax.judges.contract import HasScores, JudgeError
from xpo_jax.judges.reward import RewardFunction
from xpo_jax.values import Candidate, Comparison, Prompts


@pytest.fixture(autouse=True)
def reset():
    Scoring.calls.clear()


def prompts(valid=(True, True)):
    count = len(valid)
    return Prompts(
        rows=tuple({"n": n} for n in range(count)),
        messages=tuple([{"role": "user", "content": str(n)}] for n in range(count)),
        tokens=np.zeros((count, 1), np.int32),
        lengths=np.ones(count, np.int32),
        position=np.arange(count, dtype=np.int32),
        valid=np.array(valid),
    )


TEXTS = [["a", "bb"], ["a", "cccc"], ["ddd", "ee"]]  # by candidate; the first prompt has one answer twice


def score(judge, *, loses=None, recorded=None, of=None):
    none = np.zeros((3, 2), bool)
    return scoring.score_rows(
        judge,
        of or prompts(),
        TEXTS,
        none if loses is None else loses,
        recorded=recorded or {},
        collective=False,
    )


class Failing(Scoring):
    def __init__(self, outcome):
        self._outcome = outcome

    def scores(self, candidates):
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


def test_every_answer_is_scored_once_and_counts_once():
    summary = score(Scoring())
    assert Scoring.calls == [["a", "ddd", "bb", "cccc", "ee"]]
    assert summary["scores"] == [[1, 1, 3], [2, 4, 2]] and summary["queries"] == 5
    assert scoring.merge([summary]).scores.tolist() == [[1, 2], [1, 4], [3, 2]]


def test_padding_rows_and_answers_that_lose_are_not_put_to_the_judge():
    loses = np.array([[False, False], [False, False], [True, False]])
    summary = score(Scoring(), loses=loses, of=prompts((True, False)))
    assert Scoring.calls == [["a"]]
    assert summary["scores"] == [[1, 1, None], [None] * 3] and summary["queries"] == 1


def test_recorded_scores_are_not_asked_for_again_and_count():
    of = prompts()
    names = {scoring.key(Candidate(of.messages[0], of.rows[0], "a")): 7.0}
    summary = score(Scoring(), recorded=names)
    assert Scoring.calls == [["ddd", "bb", "cccc", "ee"]]
    assert summary["scores"][0] == [7, 7, 3] and summary["queries"] == 5


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (KeyError("gone"), "the judge failed: KeyError"),
        ([1.0], "5 answers were to be scored, and scores"),
        (
            [1.0, None, math.inf, math.nan, 2.0],
            "scores() gave 3 of 5 answers no finite number, the first None",
        ),
        ([1.0, *["high"] * 3, 2.0], "scores() gave 3 of 5 answers no finite number, the first 'high'"),
        ([1.0, *[True] * 3, 2.0], "scores() gave 3 of 5 answers no finite number, the first True"),
    ],
)
def test_failure_costs_the_scores_and_is_the_reason_of_missing_verdicts(outcome, words):
    summary = score(Failing(outcome))
    assert words in summary["failure"] and not summary["fatal_error"]
    scored = scoring.merge([summary])
    assert np.isnan(scored.scores).any()
    judge = scoring.ScoredJudge(
        Failing(outcome), scoring.scores_by_key(prompts(), TEXTS, scored.scores), scored.failure
    )
    (verdict,) = judge([Comparison(prompts().messages[0], prompts().rows[0], "ddd", "ddd")])
    assert verdict.p is None and words in verdict.reason


@pytest.mark.parametrize("p", ["A", 2, None, True, math.nan])
def test_comparison_of_scores_that_is_no_probability_ends_the_run(p):
    judge = Failing([2.0, 1.0])
    judge.compare_scores = lambda a, b: p
    scores = dict.fromkeys(
        (scoring.key(Candidate(prompts().messages[0], prompts().rows[0], t)) for t in ("ddd", "bb")), 1.0
    )
    with pytest.raises(JudgeError, match=r"compare_scores\(1, 1\) returned .*; return the probability"):
        scoring.ScoredJudge(judge, scores, "")(
            [Comparison(prompts().messages[0], prompts().rows[0], "ddd", "bb")]
        )
    judge.compare_scores = lambda a, b: 1
    (verdict,) = scoring.ScoredJudge(judge, scores, "")(
        [Comparison(prompts().messages[0], prompts().rows[0], "ddd", "bb")]
    )
    assert verdict.p == 1.0 and isinstance(verdict.p, float)


def test_judge_error_ends_the_run():
    summary = score(Failing(JudgeError("no key; set one")))
    with pytest.raises(JudgeError, match="no key; set one"):
        scoring.merge([summary])


def test_scored_judge_compares_by_the_scores_of_the_prompt_at_hand():
    of = prompts()
    by_key = scoring.scores_by_key(of, [["x", "x"], ["y", "y"]], np.array([[1.0, 5.0], [2.0, 4.0]]))
    judge = scoring.ScoredJudge(Scoring(), by_key, "")
    pair = [Comparison(of.messages[n], of.rows[n], "x", "y") for n in (0, 1)]
    first, second = judge(pair)
    assert (first.p, second.p) == (0.0, 1.0)
    assert first.scores == {"a": {"score": 1.0}, "b": {"score": 2.0}}


def test_merge_adds_the_shards_of_all_processes():
    one = {"scores": [[1.0, None]], "queries": 1, "failure": "", "fatal_error": "", "counts": {"calls": 1.0}}
    two = {
        "scores": [[2.0, 3.0]],
        "queries": 2,
        "failure": "late",
        "fatal_error": "",
        "counts": {"calls": 2.0},
    }
    merged = scoring.merge([one, two])
    np.testing.assert_array_equal(merged.scores, [[1, 2], [np.nan, 3]])
    assert (merged.queries, merged.failure, merged.counts) == (3, "late", {"calls": 3.0})


def test_reward_function_gives_by_scores_the_verdicts_that_it_gives_by_comparing():
    judge = RewardFunction(lambda prompt, answer: None if answer == "?" else len(answer), temperature=2.0)
    assert isinstance(judge, HasScores)
    texts = ["a", "bbb", "cc", "?"]
    scores = judge.scores([Candidate([], {}, text) for text in texts])
    assert scores == [1.0, 3.0, 2.0, None]
    for a, b in ((0, 1), (1, 2), (2, 2)):
        (verdict,) = judge([Comparison([], {}, texts[a], texts[b])])
        assert judge.compare_scores(scores[a], scores[b]) == verdict.p
