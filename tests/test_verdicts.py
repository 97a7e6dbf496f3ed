"""A judge's answers: each that the contract knows, each that it refuses, and the order shown."""

import types

import numpy as np
import pytest
from fakes import Always, Broken, LongerText, Miscounting, Patchy, Recording, Slow, lost, prose, silent, tied

from xpo_jax.judges.paraphrase import ParaphraseJudge
from xpo_jax.values import Comparison, Prompts, Verdict
from xpo_jax.verdicts import JudgeError, ask, metrics, parse

NAN = float("nan")
SEED = (3, 1, 7)


def prompts(B, real=None, position=None):
    return Prompts(
        rows=tuple({"number": i} for i in range(B)),
        messages=tuple([{"role": "user", "content": f"prompt {i}"}] for i in range(B)),
        tokens=np.zeros((B, 4), np.int32),
        lengths=np.ones(B, np.int32),
        position=np.arange(B, dtype=np.int32) if position is None else np.asarray(position, np.int32),
        real=np.ones(B, bool) if real is None else np.asarray(real),
    )


def asked(judge, policy, reference, *, batch=None, seed=SEED, **change):
    B = len(policy)
    options = {
        "identical": np.zeros(B, bool),
        "policy_finished": np.ones(B, bool),
        "reference_finished": np.ones(B, bool),
        "unfinished_loses": False,
    }
    return ask(judge, batch or prompts(B), policy, reference, shown_seed=seed, **{**options, **change})


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
        (
            0,
            "the judge answered the int 0, which is refused because elsewhere 0 means that the first one won",
        ),
        (1, "the int 1, which is refused"),
        (-1, "the int -1, which is refused"),
        (True, "the bool True, which is refused"),
        (False, "the bool False, which is refused"),
        (np.int64(1), "the int64 np.int64(1), which is refused"),
        (np.uint8(0), "the uint8 np.uint8(0), which is refused"),
        (np.bool_(True), "the bool np.True_, which is refused"),
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
        (Verdict(1), "the int 1, which is refused"),
        (Verdict(True), "the bool True, which is refused"),
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
def test_every_other_answer_is_refused_in_one_line(answer, told):
    with pytest.raises(JudgeError) as raised:
        asked(lambda comparisons: [answer], ["x"], ["y"])
    assert told in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


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
def test_anything_but_one_answer_each_in_order_is_refused(returned, found):
    with pytest.raises(JudgeError) as raised:
        asked(lambda comparisons: returned, ["x", "y"], ["yy", "xx"])
    assert str(raised.value) == (
        f"the judge was asked 2 comparisons and returned {found};"
        " return a list with one answer each, in order"
    )


def test_one_answer_too_few():
    with pytest.raises(JudgeError, match="asked 4 comparisons and returned 3 answers"):
        asked(Miscounting(), *texts(4))


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
    with pytest.raises(JudgeError) as raised:
        asked(judge, *texts(3))
    line = Broken.__call__.__code__.co_firstlineno + 3
    assert str(raised.value) == f"the judge failed: KeyError: 'the\\nserver is gone' (fakes.py, line {line})"
    assert isinstance(raised.value.__cause__, KeyError)


def test_what_our_own_judges_say_is_passed_on():
    judge = ParaphraseJudge(lambda source, answer: "", {"distance": 1.0}, 0.0, "in", "out")
    with pytest.raises(JudgeError, match=r"^the paraphrase judge found no text between <in> and </in>"):
        asked(judge, *texts(3))


def test_prose_is_refused():
    with pytest.raises(JudgeError, match="a text answer is 'A', 'B' or 'tie'"):
        asked(prose(), *texts(3))


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
    real = np.array([True, True, False, True, False, False])
    options = {"identical": np.array([False, True, True, False, False, True])}
    found = asked(Recording(), policy, reference, batch=prompts(6, real), **options)
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
    )
    real = np.array([True] * 6 + [False] * 2)
    assert metrics(answers, real) == {
        "judge/win_rate": (1 + 0.5 + 0 + 1) / 4,  # of those with a verdict: a narrow win is a win, ties half
        "judge/tie_rate": 1 / 6,  # of the real rows; the failed ones' 0.5 is no tie
        "judge/failed_rate": 2 / 6,
    }
