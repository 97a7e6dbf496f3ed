"""A judge's answers: each that the contract knows, each that it refuses, and the order shown."""

import json
import math
import types

import numpy as np
import pytest
from fakes import Always, Broken, LongerText, Miscounting, Patchy, Recording, Slow, lost, prose, silent, tied

from xpo_jax.data import templates
from xpo_jax.judges import JUDGES
from xpo_jax.judges.answers import compare, parse
from xpo_jax.judges.ask import ResponsePairs, ask, merge_shards, metrics, summarize_shard
from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.limits import Budget, FailureTolerance
from xpo_jax.judges.paraphrase import ParaphraseJudge
from xpo_jax.values import Comparison, Prompts, Verdict

NAN = float("nan")
SEED = (3, 1, 7)


def prompts(B, valid=None, position=None):
    return Prompts(
        rows=tuple({"number": i} for i in range(B)),
        messages=tuple([{"role": "user", "content": f"prompt {i}"}] for i in range(B)),
        tokens=np.zeros((B, 4), np.int32),
        lengths=np.ones(B, np.int32),
        position=np.arange(B, dtype=np.int32) if position is None else np.asarray(position, np.int32),
        valid=np.ones(B, bool) if valid is None else np.asarray(valid),
    )


def asked(judge, policy, reference, *, batch=None, seed=SEED, **change):
    B = len(policy)
    flags = {
        "identical": np.zeros(B, bool),
        "policy_finished": np.ones(B, bool),
        "reference_finished": np.ones(B, bool),
    }
    pairs = ResponsePairs(
        policy, reference, **{name: change.pop(name, value) for name, value in flags.items()}
    )
    options = {"unfinished_loses": False, "both_orders": False, **change}
    return ask(judge, batch or prompts(B), pairs, shown_seed=seed, **options)


def texts(B, seed=0):
    """Two lists of texts, of different lengths in each row."""
    rng = np.random.default_rng(seed)
    first = rng.integers(1, 30, B)
    second = first + rng.choice([-1, 1], B)
    return ["p" * n for n in first], ["r" * n for n in second]


# ---- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "p"),
    [
        ("A", 1.0),
        ("B", 0.0),
        ("tie", 0.5),
        (None, None),
        (0.0, 0.0),
        (1.0, 1.0),
        (0.3, 0.3),
        (np.float64(0.25), 0.25),
        (np.float32(0.75), 0.75),
        (np.float16(0.5), 0.5),
        (NAN, None),
        (np.float32(NAN), None),
        (np.str_("B"), 0.0),
        (Verdict(0.7), 0.7),
        (Verdict(np.float32(0.5)), 0.5),
        (Verdict(None), None),
        (Verdict(NAN), None),
    ],
)
def test_every_answer_of_the_contract(answer, p):
    found = parse(answer)
    assert found.p == p
    assert found.p is None or type(found.p) is float


def test_reasons_and_scores_are_kept():
    assert parse(Verdict(0.5, "alike", {"a": 1})) == Verdict(0.5, "alike", {"a": 1})
    assert parse(Verdict(NAN, "alike", {"a": 1})) == Verdict(None, "alike", {"a": 1})
    assert parse(None).reason == "no verdict"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (0, "the int 0, which is refused because elsewhere 0 means that the first one won; answer 'A'"),
        (1, "the int 1, which is refused"),
        (-1, "the int -1, which is refused"),
        (True, "the bool True, which is refused"),
        (False, "the bool False, which is refused"),
        (np.int64(1), "the int64 np.int64(1), which is refused"),
        (np.uint8(0), "the uint8 np.uint8(0), which is refused"),
        (np.bool_(True), "the bool np.True_, which is refused"),
        (Verdict(1), "the int 1, which is refused"),
        (Verdict(True), "the bool True, which is refused"),
    ],
)
def test_whole_numbers_end_the_run(answer, told):
    """Nobody can know which side they mean, and a program that gives one gives more."""
    found = asked(lambda comparisons: ["A", answer], ["x", "yy"], ["y", "xx"])
    assert told in found.fatal_error and "\n" not in found.fatal_error
    np.testing.assert_array_equal(found.weight, 0)
    with pytest.raises(JudgeError, match="which is refused"):
        FailureTolerance(max_failed_fraction=1.0, max_failed_batches=9).check([summarize_shard(found)])


def test_ask_judge_error_ends_the_run_and_other_errors_cost_one_call():
    """What counts is the exception's class, not the file it is raised in: a judge may call code of ours that raises."""

    def ends(comparisons):
        raise JudgeError("judge.path: gone;\nname another")

    def fails_in_our_code(comparisons):
        return JUDGES["paraphrase"]()  # a TypeError from within the package

    ended = asked(ends, ["x"], ["y"])
    assert ended.fatal_error == "judge.path: gone; name another"
    failed = asked(fails_in_our_code, ["x"], ["y"])
    assert failed.fatal_error == "" and "TypeError" in failed.reasons[0]
    raised = asked(lambda comparisons: templates.check("no column"), ["x"], ["y"])  # a ValueError of ours
    assert raised.fatal_error == "" and "ValueError" in raised.reasons[0]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (1.5, "the judge answered 1.5; a float is the probability that A is better, from 0 to 1"),
        (-0.01, "the judge answered -0.01; a float is the probability"),
        (float("inf"), "the judge answered inf; a float is the probability"),
        (np.float32(1.25), "the judge answered np.float32(1.25); a float is the probability"),
        ("a", "the judge answered 'a'; a text answer is 'A', 'B' or 'tie'"),
        ("A.", "the judge answered 'A.'; a text answer"),
        ("Tie", "the judge answered 'Tie'; a text answer"),
        ("", "the judge answered ''; a text answer"),
        ("Answer A is better because " * 9, "the judge answered 'Answer A is better because Answer A"),
        ([0.5], "the judge answered [0.5]; answer 'A', 'B', 'tie', None, a float or a Verdict"),
        ({"p": 1.0}, "the judge answered {'p': 1.0}; answer 'A'"),
        (Verdict(1.5), "the judge answered 1.5; a float"),
        (Verdict("A"), "the judge answered a Verdict with p 'A'; p is a float"),
        (
            Verdict(0.5, scores=[0.1, 0.2]),
            "the judge answered a Verdict with scores [0.1, 0.2]; scores are a mapping",
        ),
        (Verdict(0.5, scores=None), "a Verdict with scores None; scores are a mapping"),
        (Verdict(0.5, reason=None), "a Verdict with the reason None; a reason is text"),
    ],
)
def test_every_other_answer_is_a_failure_of_its_pair_told_in_one_line(answer, told):
    found = asked(lambda comparisons: [0.25, answer, 0.25], ["x"] * 3, ["y"] * 3)
    np.testing.assert_array_equal(found.weight, [1, 0, 1])
    assert found.p_first[1] == 0.5 and not found.fatal_error
    assert told in found.reasons[1]
    assert "\n" not in found.reasons[1] and len(found.reasons[1]) < 250


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (["A"], "1 answers"),
        (["A"] * 3, "3 answers"),
        ([], "0 answers"),
        ("AB", "str"),
        (b"AB", "bytes"),
        (None, "NoneType"),
        (("A" for _ in range(2)), "generator"),
        ({"A", "B"}, "set"),
        ({0.1: "first", 0.2: "second"}, "dict"),
        (np.float32(0.5), "float32"),
        (np.array(0.5), "ndarray"),
        (np.full((2, 1), 0.5), "ndarray"),
    ],
)
def test_anything_but_one_answer_each_in_order_is_no_verdict_on_any(returned, found):
    told = asked(lambda comparisons: returned, ["x", "y"], ["yy", "xx"])
    np.testing.assert_array_equal(told.weight, 0)
    line = (
        f"the judge was asked 2 comparisons and returned {found};"
        " return a list with one answer each, in order"
    )
    assert told.reasons == (line, line)


def test_one_answer_too_few():
    told = asked(Miscounting(), *texts(4))
    assert "asked 4 comparisons and returned 3 answers" in told.reasons[0] and not told.weight.any()


@pytest.mark.parametrize(
    "returned",
    [["A", "B"], ("A", "B"), np.array([1.0, 0.0]), np.array([1, 0], np.float32), np.array(["A", "B"])],
)
def test_lists_tuples_and_arrays_serve(returned):
    found = asked(lambda comparisons: returned, ["x", "y"], ["yy", "xx"])
    first_shown = [order[0] for order in found.shown]
    # the first answer says that A won, the second that B did
    np.testing.assert_array_equal(found.p_first, [first_shown[0] == 0, first_shown[1] == 1])


def test_what_a_judge_raises_is_told_in_one_line_with_its_place():
    judge = Broken(at=1)
    asked(judge, *texts(3))
    found = asked(judge, *texts(3))
    line = Broken.__call__.__code__.co_firstlineno + 3
    reason = f"the judge failed: KeyError: 'the\\nserver is gone' (fakes.py, line {line})"
    assert found.reasons == (reason,) * 3 and not found.fatal_error
    np.testing.assert_array_equal(found.weight, 0)


def test_an_interrupt_passes():
    def judge(comparisons):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(judge, *texts(3))


def test_what_our_own_judges_say_ends_the_run():
    judge = ParaphraseJudge(lambda source, answer: "", {"distance": 1.0}, 0.0, "in", "out")
    assert asked(judge, *texts(3)).fatal_error.startswith(
        "paraphrase judge: the last user turn has no text between <in> and"
    )


def test_prose_is_no_verdict():
    found = asked(prose(), *texts(3))
    assert all("a text answer is 'A', 'B' or 'tie'" in reason for reason in found.reasons)
    np.testing.assert_array_equal(found.weight, 0)


# ---- the order shown ----------------------------------------------------------------------------


def test_a_judge_that_always_says_A_wins_half():
    B = 2000
    found = asked(Always(answer="A"), *texts(B))
    # four standard deviations of a fair coin
    assert abs(found.p_first.mean() - 0.5) < 4 * 0.5 / np.sqrt(B)
    assert set(found.p_first) == {0.0, 1.0}
    for p, order in zip(found.p_first, found.shown, strict=True):
        assert order == ((0, 1) if p == 1 else (1, 0))  # it names the one shown first


def test_the_longer_text_wins_whatever_the_order():
    policy, reference = texts(200)
    found = asked(LongerText(), policy, reference)
    longer = [len(a) > len(b) for a, b in zip(policy, reference, strict=True)]
    np.testing.assert_array_equal(found.p_first, longer)
    assert 60 < sum(order == (1, 0) for order in found.shown) < 140
    np.testing.assert_array_equal(found.weight, np.ones(200))
    assert found.weight.dtype == found.p_first.dtype == np.float32


def test_probabilities_are_swapped_back():
    found = asked(Always(answer=0.8), *texts(50))
    expected = [0.8 if order == (0, 1) else 0.2 for order in found.shown]
    np.testing.assert_allclose(found.p_first, expected, rtol=1e-6)


def test_the_judge_sees_prompt_row_and_both_texts_in_the_order_told():
    Recording.calls.clear()
    policy, reference = texts(40)
    batch = prompts(40)
    found = asked(Recording(), policy, reference, batch=batch)
    (shown,) = Recording.calls
    for i, comparison in enumerate(shown):
        pair = (policy[i], reference[i])
        assert comparison == Comparison(batch.messages[i], batch.rows[i], *(pair[c] for c in found.shown[i]))


def test_the_order_is_drawn_from_the_seed():
    orders = {
        seed: asked(tied(), *texts(64), seed=seed).shown
        for seed in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]
    }
    assert len(set(orders.values())) == 4
    assert asked(tied(), *texts(64), seed=(0, 1, 1)).shown == orders[0, 1, 1]


def test_the_order_does_not_depend_on_the_split_of_the_batch():
    policy, reference = texts(24)
    whole = asked(LongerText(), policy, reference)
    for part in ([0, 1, 2], list(range(8, 24)), [23], list(range(23, -1, -2))):
        some = asked(
            LongerText(),
            [policy[i] for i in part],
            [reference[i] for i in part],
            batch=prompts(len(part), position=part),
        )
        assert some.shown == tuple(whole.shown[i] for i in part)
        np.testing.assert_array_equal(some.p_first, whole.p_first[part])


def test_the_same_call_gives_the_same_verdicts_however_long_the_judge_takes():
    once, again, slow = (
        asked(judge, *texts(20)) for judge in (LongerText(), LongerText(), Slow(seconds=0.05))
    )
    for other in (again, slow):
        for a, b in zip(once, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_scores_are_named_by_candidate():
    policy, reference = texts(30)
    found = asked(LongerText(), policy, reference)
    expected = [{"policy": len(a), "reference": len(b)} for a, b in zip(policy, reference, strict=True)]
    assert list(found.scores) == expected
    assert found.reasons == ("length",) * 30
    others = asked(Always(answer=Verdict(0.5, "", {"a": 1, "sum": 3})), ["x"], ["y"])
    assert others.scores[0] == {("policy" if others.shown[0] == (0, 1) else "reference"): 1, "sum": 3}


# ---- what is settled without asking ----------------------------------------------------------------


def test_identical_responses_tie_and_are_not_asked():
    Recording.calls.clear()
    policy, reference = texts(6)
    identical = np.array([True, False, True, False, False, True])
    found = asked(Recording(), policy, reference, identical=identical)
    assert [c.messages[0]["content"] for c in Recording.calls[0]] == ["prompt 1", "prompt 3", "prompt 4"]
    assert found.queries == 3
    np.testing.assert_array_equal(found.p_first[identical], 0.5)
    np.testing.assert_array_equal(found.weight, 1)
    assert [order is None for order in found.shown] == list(identical)
    assert found.reasons[0] == "identical responses"


def test_unfinished_responses_lose_unseen_where_the_config_says_so():
    Recording.calls.clear()
    policy, reference = texts(4)
    finished = {
        "policy_finished": np.array([True, True, False, False]),
        "reference_finished": np.array([True, False, True, False]),
    }
    found = asked(Recording(), policy, reference, unfinished_loses=True, **finished)
    assert len(Recording.calls[0]) == found.queries == 1
    np.testing.assert_array_equal(found.p_first[1:], [1.0, 0.0, 0.5])
    np.testing.assert_array_equal(found.weight, 1)
    assert found.reasons[1:] == ("unfinished response",) * 3
    assert found.shown[1:] == (None, None, None)
    free = asked(Recording(), policy, reference, unfinished_loses=False, **finished)
    assert free.queries == 4
    both = asked(
        Recording(), policy, reference, unfinished_loses=True, identical=np.ones(4, bool), **finished
    )
    np.testing.assert_array_equal(both.p_first, 0.5)  # the same tokens: neither is worse


def test_a_judge_with_nothing_to_do_is_not_called():
    found = asked(Broken(at=0), *texts(3), identical=np.ones(3, bool))
    assert found.queries == 0
    np.testing.assert_array_equal(found.p_first, 0.5)


def test_rows_that_are_not_real_are_neither_asked_nor_counted():
    Recording.calls.clear()
    policy, reference = texts(6)
    valid = np.array([True, True, False, True, False, False])
    options = {"identical": np.array([False, True, True, False, False, True])}
    found = asked(Recording(), policy, reference, batch=prompts(6, valid), **options)
    assert [c.row["number"] for c in Recording.calls[0]] == [0, 3]
    np.testing.assert_array_equal(found.weight, [1, 1, 0, 1, 0, 0])
    assert found.shown[2] is found.shown[4] is None


# ---- failures and metrics --------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [silent(), lost()])
def test_no_verdict_has_no_weight(judge):
    found = asked(judge, *texts(5))
    np.testing.assert_array_equal(found.weight, 0)
    assert found.queries == 5
    told = metrics(found, np.ones(5, bool))
    assert told["judge/failed_rate"] == 1.0
    assert told["judge/tie_rate"] == 0.0
    assert np.isnan(told["judge/win_rate"])


def test_failures_leave_the_other_rows_alone():
    policy, reference = texts(60)
    found, whole = asked(Patchy(), policy, reference), asked(LongerText(), policy, reference)
    failed = np.array([Patchy.fails(a, b) for a, b in zip(policy, reference, strict=True)])
    assert 5 < failed.sum() < 55
    np.testing.assert_array_equal(found.weight, ~failed)
    np.testing.assert_array_equal(found.p_first[~failed], whole.p_first[~failed])


def test_metrics_by_hand():
    answers = types.SimpleNamespace(
        p_first=np.array([1, 0.5, 0, 0.75, 1, 0.5, 1, 0.5], np.float32),
        weight=np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32),
        flipped=np.array([1, 0, 0, np.nan, np.nan, np.nan, np.nan, np.nan], np.float32),
        counts={"requests": 5.0},
    )
    valid = np.array([True] * 6 + [False] * 2)
    assert metrics(answers, valid) == {
        "judge/requests": 5.0,
        "judge/win_rate": (1 + 0.5 + 0 + 1) / 4,  # of those with a verdict: a narrow win is a win, ties half
        "judge/tie_rate": 1 / 6,  # of the valid rows; the failed ones' 0.5 is no tie
        "judge/failed_rate": 2 / 6,
        "judge/position_flip_rate": pytest.approx(1 / 3),  # of those with a verdict in both orders
    }


class Counting:
    """Counts what it is asked; `told` makes stats of that."""

    def __init__(self, told=lambda asked: {"requests": asked}):
        self.asked, self.told = 7, told

    def __call__(self, comparisons):
        self.asked += len(comparisons)
        return ["A"] * len(comparisons)

    def stats(self):
        return self.told(self.asked)


def test_what_a_judge_counts_is_of_the_batch_and_of_all_processes():
    judge = Counting()
    found = asked(judge, *texts(3))
    assert found.counts == {"requests": 3} and asked(judge, *texts(3), both_orders=True).counts == {
        "requests": 6
    }
    other = {**summarize_shard(found), "counts": {"requests": 2.0, "retries": 1.0}}
    assert merge_shards(found, [summarize_shard(found), other]).counts == {"requests": 5, "retries": 1}
    assert asked(LongerText(), *texts(3)).counts == {}


@pytest.mark.parametrize(
    "told", [lambda n: None, lambda n: {"x": "y"}, lambda n: {"x": math.nan}, lambda n: 1 / 0]
)
def test_stats_that_are_no_numbers_end_the_run(told):
    found = asked(Counting(told), *texts(3))
    assert found.fatal_error.startswith(
        "the judge's stats() must return finite numbers by name ("
    ) and not any(found.weight)


# ---- both orders ------------------------------------------------------------------------------------


def one_by_one(*answers):
    """A judge that gives these answers to the comparisons it is asked, in their order."""
    return lambda comparisons: list(answers[: len(comparisons)])


@pytest.mark.parametrize(
    ("first", "second", "p", "flipped"),  # the second is asked with A and B exchanged
    [
        ("A", "B", 1.0, False),
        ("B", "A", 0.0, False),
        ("A", "A", 0.5, True),
        ("B", "B", 0.5, True),
        ("tie", "tie", 0.5, False),
        ("A", "tie", 0.5, True),  # hard ones that differ tie
        ("tie", "B", 0.5, True),
        (1.0, 0.5, 0.5, True),
        (0.75, 0.5, 0.625, True),  # soft ones are averaged
        (0.75, 0.5 + 1 / 16, 0.75 / 2 + (0.5 - 1 / 16) / 2, True),
        (0.75, 0.125, 0.8125, False),
        ("A", 0.125, 0.9375, False),
        (Verdict(1.0), Verdict(1.0), 0.5, True),
        ("A", None, None, None),
        (NAN, "A", None, None),
        ("A", "prose", None, None),
    ],
)
def test_both_orders(first, second, p, flipped):
    ((verdict, flip),) = compare(one_by_one(first, second), [Comparison((), {}, "x", "y")], both_orders=True)
    assert (verdict.p, flip) == (p, flipped)


def test_both_orders_are_asked_next_to_each_other_and_in_one_list():
    Recording.calls.clear()
    policy, reference = texts(40)
    found = asked(Recording(), policy, reference, both_orders=True)
    (shown,) = Recording.calls
    assert found.queries == len(shown) == 80
    for i in range(40):
        pair = (policy[i], reference[i])
        first, second = (pair[c] for c in found.shown[i])
        assert [(c.a, c.b) for c in shown[2 * i : 2 * i + 2]] == [(first, second), (second, first)]
    np.testing.assert_array_equal(found.p_first, asked(LongerText(), policy, reference).p_first)
    np.testing.assert_array_equal(found.flipped, 0)
    for i, scores in enumerate(found.scores):  # both orders' scores, named by candidate
        lengths = {"policy": len(policy[i]), "reference": len(reference[i])}
        assert scores == {**lengths, "exchanged": lengths}
    first = found.p_first[0] if found.shown[0] == (0, 1) else 1 - found.p_first[0]
    assert found.reasons[0] == f"{first:.3f} for A, {first:.3f} when exchanged; length; exchanged: length"


def test_a_judge_that_always_says_A_never_wins_in_both_orders():
    found = asked(Always(answer="A"), *texts(50), both_orders=True)
    np.testing.assert_array_equal(found.p_first, 0.5)
    np.testing.assert_array_equal(found.weight, 1)
    assert metrics(found, np.ones(50, bool))["judge/position_flip_rate"] == 1.0
    once = metrics(asked(Always(answer="A"), *texts(50)), np.ones(50, bool))
    assert np.isnan(once["judge/position_flip_rate"])  # nobody asked


def test_what_processes_tell_each_other_is_the_whole(monkeypatch):
    """Two processes judge their halves; joined through JSON they are what one finds."""
    import jax

    from xpo_jax.io.files import to_json

    policy, reference = texts(10)
    alone = asked(Patchy(), policy, reference, both_orders=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    briefs = []
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        own = asked(
            Patchy(),
            policy,
            reference,
            both_orders=True,
            batch=prompts(10, [i // 5 == number for i in range(10)]),
        )
        briefs.append(json.loads(to_json(summarize_shard(own))))
    found = merge_shards(own, briefs)
    for name in ("p_first", "weight", "flipped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))
    assert found.queries == alone.queries == 20
    failed = int((alone.weight == 0).sum())
    assert 0 < failed < 10 and sum(each["failed"] for each in briefs) == failed
    assert {each["first_failure"] for each in briefs} <= {"no verdict", "the judge answered nan", ""}


# ---- patience and budget ----------------------------------------------------------------------------


def told(asked, failed, words="its words", refused=""):
    return {
        "pairs": asked,
        "failed": failed,
        "first_failure": words if failed else "",
        "fatal_error": refused,
    }


def test_patience_ends_where_too_much_fails_too_often():
    failure_tolerance = FailureTolerance(max_failed_fraction=0.5, max_failed_batches=2)
    # half is not past half; a batch that is all right, and only that, starts anew; nothing asked says nothing
    for batch in ([told(8, 4)], [told(8, 5)], [told(8, 4)], [told(8, 5)], [told(0, 0)]):
        failure_tolerance.check(batch)
    with pytest.raises(JudgeError, match="more than 50% of the pairs in 2 batches in a row; .*: its words$"):
        failure_tolerance.check([told(6, 3, "its words"), told(2, 2, "and others")])  # of two processes
    for _ in range(5):
        FailureTolerance(max_failed_fraction=1.0, max_failed_batches=1).check([told(4, 4)])


def test_a_first_batch_without_any_verdict_ends_the_run():
    failure_tolerance = FailureTolerance(max_failed_fraction=0.5, max_failed_batches=2)
    failure_tolerance.check([told(0, 0)])
    with pytest.raises(
        JudgeError, match="^the judge gave no verdict on any of the first 8 pairs: its words$"
    ):
        failure_tolerance.check([told(4, 4), told(4, 4)])
    failure_tolerance = FailureTolerance(max_failed_fraction=0.5, max_failed_batches=2)
    failure_tolerance.check([told(4, 3)])
    failure_tolerance.check([told(4, 0)])
    failure_tolerance.check([told(4, 4)])  # not the first


def test_a_budget_keeps_the_last_evaluation_back():
    free = Budget(None, orders=2, comparisons_per_evaluation=100, every_steps=2)
    free.check(8)
    assert free.allows(10**9, 0, 8)
    budget = Budget(1000, orders=2, comparisons_per_evaluation=100, every_steps=3)
    # 200 for the last evaluation, 16 for the step, 200 more where a periodic one follows the step
    assert budget.allows(784, 0, 8) and not budget.allows(785, 0, 8)
    assert budget.allows(584, 2, 8) and not budget.allows(585, 2, 8)
    with pytest.raises(
        ValueError,
        match=r"^judging.max_queries is 415, .* 200 queries each and a step 16: set it to at least 416",
    ):
        Budget(415, orders=2, comparisons_per_evaluation=100, every_steps=0).check(8)
    Budget(416, orders=2, comparisons_per_evaluation=100, every_steps=0).check(8)
