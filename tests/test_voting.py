"""Votes and panels: what several opinions amount to, how far they disagree, and how many queries they cost."""

import collections
import itertools
import json
from typing import Any

import numpy as np
import pytest
from fakes import Counting
from tiny_run import changed_config, read_metrics, run_name

from xpo_jax.experiment.judge_factory import make_judge
from xpo_jax.judges import voting
from xpo_jax.judges.answers import compare
from xpo_jax.judges.ask import ResponsePairs, ask, summarize_call
from xpo_jax.judges.combine import Combination
from xpo_jax.judges.contract import queries_per_comparison
from xpo_jax.judges.outcomes import metrics
from xpo_jax.values import Comparison, Prompts, Verdict

pytestmark = pytest.mark.usefixtures("shared_programs", "one_device")

ASKED = Comparison((), {}, "x", "y")


def always(answer: Any) -> Any:
    return lambda comparisons: [answer] * len(comparisons)


def panel(kind: str, *members: tuple[float, Any]) -> Combination:
    return Combination({f"j{i}": (w, always(answer)) for i, (w, answer) in enumerate(members)}, kind)


# ---- pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("votes", list(itertools.product("AB=", repeat=3)))
def test_majority_and_disagreement_equal_a_count(votes):
    """Every way in which three can answer, against a Counter."""
    ps, counts = [{"A": 1.0, "B": 0.0, "=": 0.5}[vote] for vote in votes], collections.Counter(votes)
    expected = 0.5 if counts["A"] == counts["B"] else float(counts["A"] > counts["B"])
    assert voting.majority(ps, [1.0] * 3) == expected
    assert voting.disagreement(ps, [1.0] * 3) == pytest.approx(1 - max(counts.values()) / 3)
    assert voting.mean(ps, [1.0] * 3) == pytest.approx((counts["A"] + counts["="] / 2) / 3)


def test_majority_counts_preferences_by_weight_not_their_certainty():
    assert voting.majority([0.51, 0.51, 0.0], [1.0, 1.0, 1.0]) == 1.0
    assert voting.majority([0.51, 0.51, 0.0], [1.0, 1.0, 3.0]) == 0.0
    assert voting.majority([0.9, 0.9, 0.1], [0.1, 0.2, 0.3]) == 0.5  # 0.1 + 0.2 is not 0.3 in floating point
    assert voting.disagreement([0.9, 0.6, 0.7], [0.1, 0.2, 0.3]) == 0.0
    assert voting.disagreement([0.9, 0.4], [3.0, 1.0]) == pytest.approx(0.25)


def test_combine_part_without_verdicts_is_doubted_once_with_its_name():
    """The others decide alone, and nothing else would say so."""
    judge = panel("mean", (1.0, "A"), (1.0, Verdict(None, "down")))
    assert judge.doubt() == ""  # nothing was asked
    judge([Comparison((), {}, "x", "y")] * 3)
    assert judge.doubt() == (
        "j1: no verdict on 3 of the latest 3 comparisons, so the other judges decide alone; its reasons are in"
        " pairs.jsonl"
    )
    assert judge.doubt() == ""


def test_combine_majority_is_hard_and_leaves_out_who_has_no_verdict():
    three = (1.0, "A"), (1.0, 0.2), (1.0, 0.6)
    assert panel("majority", *three)([ASKED])[0].p == 1.0
    assert panel("mean", *three)([ASKED])[0].p == pytest.approx(0.6)
    assert panel("majority", (1.0, "A"), (5.0, None), (1.0, "B"))([ASKED])[0].p == 0.5
    assert panel("majority", (1.0, None))([ASKED])[0].p is None
    assert panel("majority", (1.0, 0.7))([ASKED])[0].p == 1.0  # of one: its preference
    (verdict,) = panel("majority", *three)([ASKED])
    assert verdict.scores["disagreement"] == pytest.approx(1 / 3) and verdict.scores["queries"] == 3
    assert "disagreement" not in panel("mean", (1.0, "A"), (1.0, None))([ASKED])[0].scores


# ---- votes ----------------------------------------------------------------------------------------


def tally(*answers: list[float | None]) -> tuple[list[Verdict], list[list[voting.Request]]]:
    """Vote with scripted answers, one list for each comparison; return the verdicts and the requests of each call."""
    calls = []

    def scripted(requests):
        calls.append(list(requests))
        return [Verdict(answers[index][number], f"{answers[index][number]}") for index, number in requests]

    return voting.vote(scripted, len(answers), len(answers[0])), calls


def test_vote_asks_again_only_where_the_first_two_differ():
    verdicts, calls = tally(
        [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [None, 1.0, 1.0], [0.5, 0.5, 1.0]
    )
    assert calls == [[(i, n) for i in range(5) for n in (0, 1)], [(1, 2), (3, 2)]]
    assert [v.p for v in verdicts] == [1.0, pytest.approx(1 / 3), 0.0, 1.0, 0.5]
    assert [v.scores["queries"] for v in verdicts] == [2, 3, 2, 3, 2]
    assert verdicts[1].scores["a"] == {"votes": 1} and verdicts[1].scores["b"] == {"votes": 2}
    assert [v.scores["disagreement"] for v in verdicts] == [0.0, pytest.approx(1 / 3), 0.0, 0.0, 0.0]
    assert verdicts[1].reason == "vote 1: 1.0; vote 2: 0.0; vote 3: 0.0"


def test_vote_of_three_that_stops_early_has_the_preference_of_all_three():
    for answers in itertools.product([0.0, 0.5, 1.0], repeat=3):
        (verdict,), _ = tally(list(answers))
        if answers[0] == answers[1] == 0.5:  # two ties agree, and the third is not asked
            assert verdict.p == 0.5
            continue
        assert np.sign(verdict.p - 0.5) == np.sign(np.mean(answers) - 0.5)


def test_vote_without_any_verdict_is_none_and_its_queries_count():
    (verdict, _), calls = tally([None, None, None, None], [1.0, 1.0, 1.0, 1.0])
    assert verdict.p is None and verdict.scores == {"queries": 4} and len(calls[1]) == 2
    assert tally([1.0])[0] == [Verdict(1.0, "1.0")] and tally([1.0])[1] == [[(0, 0)]]
    two, calls = tally([1.0, 0.0])
    assert two[0].p == 0.5 and len(calls) == 1
    assert voting.vote(lambda requests: [], 0, 3) == []


# ---- queries and metrics --------------------------------------------------------------------------


class Voting:
    """Give the answers of a script, one list of votes for each text of A."""

    queries_per_comparison = 3

    def __init__(self, script):
        self._script = script

    def __call__(self, comparisons):
        votes = [self._script[c.a] for c in comparisons]
        return voting.vote(lambda rs: [Verdict(votes[i][n]) for i, n in rs], len(comparisons), 3)


def test_queries_of_both_orders_and_of_parts_are_summed():
    script = {"x": [1.0, 1.0, 0.0], "y": [1.0, 0.0, 0.0]}
    both = Combination({"votes": (1.0, Voting(script)), "rule": (1.0, always("A"))}, "mean")
    assert queries_per_comparison(both) == 4 and queries_per_comparison(always("A")) == 1
    (verdict,) = both([ASKED])
    assert verdict.scores["queries"] == 3 and verdict.scores["disagreement"] == 0.0
    ((merged, _),) = compare(both, [ASKED], both_orders=True)
    assert merged.scores["queries"] == 3 + 4
    failing = Combination({"votes": (1.0, Voting({"x": [1.0] * 3, "y": [None] * 3}))}, "mean")
    ((failed, _),) = compare(failing, [ASKED], both_orders=True)
    assert failed.p is None and failed.scores == {"queries": 2 + 3}
    ((plain, _),) = compare(always("A"), [ASKED], both_orders=True)
    assert plain.scores == {}  # one query for each order


@pytest.mark.parametrize("both_orders", [False, True])
def test_ask_counts_what_each_member_was_asked_and_who_disagreed(both_orders):
    B = 4
    prompts = Prompts(({},) * B, ((),) * B, None, None, np.arange(B), np.array([True, True, True, False]))
    texts = ["x", "y", "same", ""]
    pairs = ResponsePairs(
        texts, ["y", "x", "same", ""], np.array([False, False, True, False]), *[np.ones(B, bool)] * 2
    )
    judge = Combination(
        {"votes": (1.0, Voting({"x": [1.0] * 3, "y": [1.0, 0.0, 0.0]})), "rule": (1.0, always("A"))}, "mean"
    )
    judged = lambda seed: ask(
        judge,
        prompts,
        pairs,
        unfinished_loses=False,
        both_orders=both_orders,
        hide_thinking=False,
        shown_seed=(seed,),
    )
    for seed in range(4):
        verdicts = judged(seed)
        summary = summarize_call(verdicts)
        shown_as_a = [texts[i] if verdicts.shown[i] == (0, 1) else "xy"[texts[i] == "x"] for i in (0, 1)]
        orders = [letter for a in shown_as_a for letter in ("xy" if both_orders else a)]
        assert verdicts.queries == summary["queries"] == sum({"x": 3, "y": 4}[a] for a in orders)
        assert summary["outcomes"]["pooled"] == 2
        assert summary["outcomes"].get("disagreed", 0) == (2 if both_orders else shown_as_a.count("y"))
        rate = metrics(summary["outcomes"])["disagreement_rate"]
        assert rate == summary["outcomes"].get("disagreed", 0) / 2
    assert "disagreement_rate" not in metrics({"pairs": 3})


def test_run_with_a_panel_counts_its_members_and_resumes_to_the_same_bytes(tmp_path):
    """max_queries covers each member; a run that is stopped asks nothing twice and ends with the same files."""
    counting, longer = ({"weight": 1.0, "name": f"fakes:{name}"} for name in ("Counting", "LongerText"))
    judges = (counting, longer, {**longer, "weight": 0.5})
    changes = {"judge": {"name": "combine", "kind": "majority", "judges": judges}, "evaluation__prompts": 3}
    changes |= {
        "data__buckets": (40,),
        "steps": 2,
        "checkpoint__every_steps": 1,
        "judging__max_queries": 1000,
    }

    Counting.reset()
    status, _, err = run_name(tmp_path, "whole", changed_config(tmp_path, **changes))
    assert status == 0, err
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["judge_queries"] + result["evaluation_queries"] == 3 * len(Counting.comparisons)
    rows = read_metrics(tmp_path / "whole")
    assert all(0 <= row["judge/disagreement_rate"] <= 1 for row in rows[1:])
    assert "eval/disagreement_rate" in rows[0]
    pairs = [json.loads(line) for line in (tmp_path / "whole" / "pairs.jsonl").read_text().splitlines()]
    assert {pair["scores"]["queries"] for pair in pairs if pair["shown"]} == {3}

    least = 3 * (2 * 3 * 2 * 2 + 8)  # two evaluations of three prompts, and a step of eight
    short = changed_config(tmp_path, **{**changes, "judging__max_queries": least - 1})
    status, _, err = run_name(tmp_path, "short", short)
    assert status == 2 and f"set it to at least {least}" in err

    Counting.reset()
    Counting.signal_at = (5, 15)  # in the first step, after the four calls of an evaluation
    status, _, _ = run_name(tmp_path, "again", changed_config(tmp_path, **changes))
    assert status == 143
    Counting.signal_at = None
    status, _, err = run_name(tmp_path, "again", changed_config(tmp_path, **changes))
    assert status == 0, err
    for name in ("pairs.jsonl", "export/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_metrics(tmp_path / "again") == rows


def test_factory_panel_of_three_is_built_from_its_config():
    member = {"weight": 1.0, "name": "fakes:LongerText"}
    judge = make_judge({"name": "combine", "kind": "majority", "judges": (member,) * 3}, "judge")
    assert queries_per_comparison(judge) == 3
    with pytest.raises(ValueError, match=r"^judge\.kind: 'mean' or 'majority' or 'sum' is expected"):
        make_judge({"name": "combine", "kind": "median", "judges": (member,)}, "judge")
