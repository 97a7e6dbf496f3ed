"""Asking a judge: every answer that the contract allows, every one that it rejects, and the order shown."""

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
from xpo_jax.judges.limits import FailureTolerance
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


def judge_batch(judge, policy, reference, *, batch=None, seed=SEED, **change):
    B = len(policy)
    flags = {
        "identical": np.zeros(B, bool),
        "policy_finished": np.ones(B, bool),
        "reference_finished": np.ones(B, bool),
    }
    pairs = ResponsePairs(
        policy, reference, **{name: change.pop(name, value) for name, value in flags.items()}
    )
    options = {"unfinished_loses": False, "both_orders": False, "hide_thinking": False, **change}
    return ask(judge, batch or prompts(B), pairs, shown_seed=seed, **options)


def texts(B, seed=0):
    """Return two lists of texts, of different lengths in each row."""
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
def test_parse_answer_of_the_contract_gives_its_probability(answer, p):
    verdict = parse(answer)
    assert verdict.p == p
    assert verdict.p is None or type(verdict.p) is float


def test_parse_verdict_keeps_reason_and_scores():
    assert parse(Verdict(0.5, "alike", {"a": 1})) == Verdict(0.5, "alike", {"a": 1})
    assert parse(Verdict(NAN, "alike", {"a": 1})) == Verdict(None, "alike", {"a": 1})
    assert parse(None).reason == "no verdict"


@pytest.mark.parametrize(
    ("answer", "expected_text"),
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
def test_ask_integer_answer_ends_the_run(answer, expected_text):
    """An integer does not state which side it means, and a program that returns one will return more."""
    verdicts = judge_batch(lambda comparisons: ["A", answer], ["x", "yy"], ["y", "xx"])
    assert expected_text in verdicts.fatal_error and "\n" not in verdicts.fatal_error
    np.testing.assert_array_equal(verdicts.weight, 0)
    with pytest.raises(JudgeError, match="which is refused"):
        FailureTolerance(max_failed_fraction=1.0, max_failed_batches=9).check([summarize_shard(verdicts)])


def test_ask_judge_error_ends_the_run_and_other_errors_cost_one_call():
    """The exception's class counts, not the file that raises it: a judge may call code of this package that raises."""

    def ends(comparisons):
        raise JudgeError("judge.path: gone;\nname another")

    def fails_in_our_code(comparisons):
        return JUDGES["paraphrase"]()  # a TypeError from within the package

    ended = judge_batch(ends, ["x"], ["y"])
    assert ended.fatal_error == "judge.path: gone; name another"
    failed = judge_batch(fails_in_our_code, ["x"], ["y"])
    assert failed.fatal_error == "" and "TypeError" in failed.reasons[0]
    raised = judge_batch(
        lambda comparisons: templates.check("no column"), ["x"], ["y"]
    )  # a ValueError of ours
    assert raised.fatal_error == "" and "ValueError" in raised.reasons[0]


@pytest.mark.parametrize(
    ("answer", "expected_text"),
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
def test_ask_invalid_answer_fails_its_pair_with_a_one_line_reason(answer, expected_text):
    verdicts = judge_batch(lambda comparisons: [0.25, answer, 0.25], ["x"] * 3, ["y"] * 3)
    np.testing.assert_array_equal(verdicts.weight, [1, 0, 1])
    assert verdicts.p_first[1] == 0.5 and not verdicts.fatal_error
    assert expected_text in verdicts.reasons[1]
    assert "\n" not in verdicts.reasons[1] and len(verdicts.reasons[1]) < 250


@pytest.mark.parametrize(
    ("returned", "described"),
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
def test_ask_anything_but_a_list_of_answers_fails_all_pairs(returned, described):
    verdicts = judge_batch(lambda comparisons: returned, ["x", "y"], ["yy", "xx"])
    np.testing.assert_array_equal(verdicts.weight, 0)
    line = (
        f"the judge was asked 2 comparisons and returned {described};"
        " return a list with one answer each, in order"
    )
    assert verdicts.reasons == (line, line)


def test_ask_missing_answer_fails_all_pairs():
    verdicts = judge_batch(Miscounting(), *texts(4))
    assert "asked 4 comparisons and returned 3 answers" in verdicts.reasons[0] and not verdicts.weight.any()


@pytest.mark.parametrize(
    "returned",
    [["A", "B"], ("A", "B"), np.array([1.0, 0.0]), np.array([1, 0], np.float32), np.array(["A", "B"])],
)
def test_ask_lists_tuples_and_arrays_are_accepted(returned):
    verdicts = judge_batch(lambda comparisons: returned, ["x", "y"], ["yy", "xx"])
    first_shown = [order[0] for order in verdicts.shown]
    # the first answer says that A won, the second that B did
    np.testing.assert_array_equal(verdicts.p_first, [first_shown[0] == 0, first_shown[1] == 1])


def test_ask_exception_becomes_a_reason_with_file_and_line():
    judge = Broken(at=1)
    judge_batch(judge, *texts(3))
    verdicts = judge_batch(judge, *texts(3))
    line = Broken.__call__.__code__.co_firstlineno + 3
    reason = f"the judge failed: KeyError: 'the\\nserver is gone' (fakes.py, line {line})"
    assert verdicts.reasons == (reason,) * 3 and not verdicts.fatal_error
    np.testing.assert_array_equal(verdicts.weight, 0)


def test_ask_keyboard_interrupt_is_not_caught():
    def judge(comparisons):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_batch(judge, *texts(3))


def test_ask_judge_error_of_a_built_in_judge_ends_the_run():
    judge = ParaphraseJudge(lambda source, answer: "", {"distance": 1.0}, 0.0, "in", "out")
    assert judge_batch(judge, *texts(3)).fatal_error.startswith(
        "paraphrase judge: the last user turn has no text between <in> and"
    )


def test_ask_prose_is_no_verdict():
    verdicts = judge_batch(prose(), *texts(3))
    assert all("a text answer is 'A', 'B' or 'tie'" in reason for reason in verdicts.reasons)
    np.testing.assert_array_equal(verdicts.weight, 0)


# ---- the order shown ----------------------------------------------------------------------------


def test_ask_judge_that_always_prefers_A_wins_half():
    B = 2000
    verdicts = judge_batch(Always(answer="A"), *texts(B))
    # four standard deviations of a fair coin
    assert abs(verdicts.p_first.mean() - 0.5) < 4 * 0.5 / np.sqrt(B)
    assert set(verdicts.p_first) == {0.0, 1.0}
    for p, order in zip(verdicts.p_first, verdicts.shown, strict=True):
        assert order == ((0, 1) if p == 1 else (1, 0))  # it always prefers the one shown first


def test_ask_longer_text_wins_in_either_order():
    policy, reference = texts(200)
    verdicts = judge_batch(LongerText(), policy, reference)
    longer = [len(a) > len(b) for a, b in zip(policy, reference, strict=True)]
    np.testing.assert_array_equal(verdicts.p_first, longer)
    assert 60 < sum(order == (1, 0) for order in verdicts.shown) < 140
    np.testing.assert_array_equal(verdicts.weight, np.ones(200))
    assert verdicts.weight.dtype == verdicts.p_first.dtype == np.float32


def test_ask_swapped_pair_swaps_the_probability_back():
    verdicts = judge_batch(Always(answer=0.8), *texts(50))
    expected = [0.8 if order == (0, 1) else 0.2 for order in verdicts.shown]
    np.testing.assert_allclose(verdicts.p_first, expected, rtol=1e-6)


def test_ask_judge_sees_prompt_row_and_texts_in_the_order_shown():
    Recording.calls.clear()
    policy, reference = texts(40)
    batch = prompts(40)
    verdicts = judge_batch(Recording(), policy, reference, batch=batch)
    (shown,) = Recording.calls
    for i, comparison in enumerate(shown):
        pair = (policy[i], reference[i])
        assert comparison == Comparison(
            batch.messages[i], batch.rows[i], *(pair[c] for c in verdicts.shown[i])
        )


def test_ask_order_depends_on_the_seed_only():
    orders = {
        seed: judge_batch(tied(), *texts(64), seed=seed).shown
        for seed in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]
    }
    assert len(set(orders.values())) == 4
    assert judge_batch(tied(), *texts(64), seed=(0, 1, 1)).shown == orders[0, 1, 1]


def test_ask_order_does_not_depend_on_the_split_of_the_batch():
    policy, reference = texts(24)
    whole = judge_batch(LongerText(), policy, reference)
    for part in ([0, 1, 2], list(range(8, 24)), [23], list(range(23, -1, -2))):
        partial = judge_batch(
            LongerText(),
            [policy[i] for i in part],
            [reference[i] for i in part],
            batch=prompts(len(part), position=part),
        )
        assert partial.shown == tuple(whole.shown[i] for i in part)
        np.testing.assert_array_equal(partial.p_first, whole.p_first[part])


def test_ask_slow_judge_gives_the_same_verdicts():
    once, again, slow = (
        judge_batch(judge, *texts(20)) for judge in (LongerText(), LongerText(), Slow(seconds=0.05))
    )
    for other in (again, slow):
        for a, b in zip(once, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ask_scores_are_renamed_to_policy_and_reference():
    policy, reference = texts(30)
    verdicts = judge_batch(LongerText(), policy, reference)
    expected = [{"policy": len(a), "reference": len(b)} for a, b in zip(policy, reference, strict=True)]
    assert list(verdicts.scores) == expected
    assert verdicts.reasons == ("length",) * 30
    others = judge_batch(Always(answer=Verdict(0.5, "", {"a": 1, "sum": 3})), ["x"], ["y"])
    assert others.scores[0] == {("policy" if others.shown[0] == (0, 1) else "reference"): 1, "sum": 3}


# ---- decided without the judge ----------------------------------------------------------------


def test_ask_identical_responses_tie_without_the_judge():
    Recording.calls.clear()
    policy, reference = texts(6)
    identical = np.array([True, False, True, False, False, True])
    verdicts = judge_batch(Recording(), policy, reference, identical=identical)
    assert [c.messages[0]["content"] for c in Recording.calls[0]] == ["prompt 1", "prompt 3", "prompt 4"]
    assert verdicts.queries == 3
    np.testing.assert_array_equal(verdicts.p_first[identical], 0.5)
    np.testing.assert_array_equal(verdicts.weight, 1)
    assert [order is None for order in verdicts.shown] == list(identical)
    assert verdicts.reasons[0] == "identical responses"


def test_ask_unfinished_response_loses_without_the_judge_if_configured():
    Recording.calls.clear()
    policy, reference = texts(4)
    finished = {
        "policy_finished": np.array([True, True, False, False]),
        "reference_finished": np.array([True, False, True, False]),
    }
    verdicts = judge_batch(Recording(), policy, reference, unfinished_loses=True, **finished)
    assert len(Recording.calls[0]) == verdicts.queries == 1
    np.testing.assert_array_equal(verdicts.p_first[1:], [1.0, 0.0, 0.5])
    np.testing.assert_array_equal(verdicts.weight, 1)
    assert verdicts.reasons[1:] == ("unfinished response",) * 3
    assert verdicts.shown[1:] == (None, None, None)
    free = judge_batch(Recording(), policy, reference, unfinished_loses=False, **finished)
    assert free.queries == 4
    both = judge_batch(
        Recording(), policy, reference, unfinished_loses=True, identical=np.ones(4, bool), **finished
    )
    np.testing.assert_array_equal(both.p_first, 0.5)  # the same tokens: neither is worse
    assert both.reasons == ("identical responses",) * 3 + ("identical unfinished responses",)


def test_ask_nothing_to_judge_does_not_call_the_judge():
    verdicts = judge_batch(Broken(at=0), *texts(3), identical=np.ones(3, bool))
    assert verdicts.queries == 0
    np.testing.assert_array_equal(verdicts.p_first, 0.5)


def test_ask_padding_rows_are_not_judged_or_counted():
    Recording.calls.clear()
    policy, reference = texts(6)
    valid = np.array([True, True, False, True, False, False])
    options = {"identical": np.array([False, True, True, False, False, True])}
    verdicts = judge_batch(Recording(), policy, reference, batch=prompts(6, valid), **options)
    assert [c.row["number"] for c in Recording.calls[0]] == [0, 3]
    np.testing.assert_array_equal(verdicts.weight, [1, 1, 0, 1, 0, 0])
    assert verdicts.shown[2] is verdicts.shown[4] is None


# ---- failures and metrics --------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [silent(), lost()])
def test_ask_no_verdict_has_weight_zero(judge):
    verdicts = judge_batch(judge, *texts(5))
    np.testing.assert_array_equal(verdicts.weight, 0)
    assert verdicts.queries == 5
    batch_metrics = metrics(verdicts, np.ones(5, bool))
    assert batch_metrics["judge/failed_rate"] == 1.0
    assert batch_metrics["judge/tie_rate"] == 0.0
    assert np.isnan(batch_metrics["judge/win_rate"])


def test_ask_failed_pair_leaves_other_rows_unchanged():
    policy, reference = texts(60)
    verdicts, whole = judge_batch(Patchy(), policy, reference), judge_batch(LongerText(), policy, reference)
    failed = np.array([Patchy.fails(a, b) for a, b in zip(policy, reference, strict=True)])
    assert 5 < failed.sum() < 55
    np.testing.assert_array_equal(verdicts.weight, ~failed)
    np.testing.assert_array_equal(verdicts.p_first[~failed], whole.p_first[~failed])


def test_metrics_match_values_computed_by_hand():
    answers = types.SimpleNamespace(
        p_first=np.array([1, 0.5, 0, 0.75, 1, 0.5, 1, 0.5], np.float32),
        weight=np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32),
        flipped=np.array([1, 0, 0, np.nan, np.nan, np.nan, np.nan, np.nan], np.float32),
        counts={"requests": 5.0},
    )
    valid = np.array([True] * 6 + [False] * 2)
    assert metrics(answers, valid) == {
        "judge/requests": 5.0,
        "judge/win_rate": (1 + 0.5 + 0 + 1)
        / 4,  # of those with a verdict: a narrow win counts as a win, a tie as half
        "judge/tie_rate": 1 / 6,  # of the valid rows; the 0.5 of a failed one is no tie
        "judge/failed_rate": 2 / 6,
        "judge/position_flip_rate": pytest.approx(1 / 3),  # of those with a verdict in both orders
    }


class Counting:
    """Counts the comparisons that it gets; `make_stats` turns the count into stats."""

    def __init__(self, make_stats=lambda count: {"requests": count}):
        self.count, self.make_stats = 7, make_stats

    def __call__(self, comparisons):
        self.count += len(comparisons)
        return ["A"] * len(comparisons)

    def stats(self):
        return self.make_stats(self.count)


def test_ask_counts_are_of_the_batch_and_summed_over_processes():
    judge = Counting()
    verdicts = judge_batch(judge, *texts(3))
    assert verdicts.counts == {"requests": 3} and judge_batch(judge, *texts(3), both_orders=True).counts == {
        "requests": 6
    }
    other = {**summarize_shard(verdicts), "counts": {"requests": 2.0, "retries": 1.0}}
    assert merge_shards(verdicts, [summarize_shard(verdicts), other]).counts == {"requests": 5, "retries": 1}
    assert judge_batch(LongerText(), *texts(3)).counts == {}


@pytest.mark.parametrize(
    "make_stats", [lambda n: None, lambda n: {"x": "y"}, lambda n: {"x": math.nan}, lambda n: 1 / 0]
)
def test_ask_stats_that_are_not_numbers_end_the_run(make_stats):
    verdicts = judge_batch(Counting(make_stats), *texts(3))
    assert verdicts.fatal_error.startswith(
        "the judge's stats() must return finite numbers by name ("
    ) and not any(verdicts.weight)


# ---- both orders ------------------------------------------------------------------------------------


def one_by_one(*answers):
    """Return a judge that gives these answers to its comparisons, in order."""
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
def test_compare_both_orders_averages_soft_and_ties_differing_hard_verdicts(first, second, p, flipped):
    ((verdict, flip),) = compare(one_by_one(first, second), [Comparison((), {}, "x", "y")], both_orders=True)
    assert (verdict.p, flip) == (p, flipped)


def test_ask_both_orders_are_adjacent_in_one_call():
    Recording.calls.clear()
    policy, reference = texts(40)
    verdicts = judge_batch(Recording(), policy, reference, both_orders=True)
    (shown,) = Recording.calls
    assert verdicts.queries == len(shown) == 80
    for i in range(40):
        pair = (policy[i], reference[i])
        first, second = (pair[c] for c in verdicts.shown[i])
        assert [(c.a, c.b) for c in shown[2 * i : 2 * i + 2]] == [(first, second), (second, first)]
    np.testing.assert_array_equal(verdicts.p_first, judge_batch(LongerText(), policy, reference).p_first)
    np.testing.assert_array_equal(verdicts.flipped, 0)
    for i, scores in enumerate(verdicts.scores):  # both orders' scores, named by candidate
        lengths = {"policy": len(policy[i]), "reference": len(reference[i])}
        assert scores == {**lengths, "exchanged": lengths}
    first = verdicts.p_first[0] if verdicts.shown[0] == (0, 1) else 1 - verdicts.p_first[0]
    assert verdicts.reasons[0] == f"{first:.3f} for A, {first:.3f} when exchanged; length; exchanged: length"


def test_ask_judge_that_always_prefers_A_ties_in_both_orders():
    verdicts = judge_batch(Always(answer="A"), *texts(50), both_orders=True)
    np.testing.assert_array_equal(verdicts.p_first, 0.5)
    np.testing.assert_array_equal(verdicts.weight, 1)
    assert metrics(verdicts, np.ones(50, bool))["judge/position_flip_rate"] == 1.0
    once = metrics(judge_batch(Always(answer="A"), *texts(50)), np.ones(50, bool))
    assert np.isnan(once["judge/position_flip_rate"])  # only one order was asked


def test_merge_shards_of_two_processes_equals_one_process(monkeypatch):
    """Two processes judge half of the rows each; merged through JSON, the result is that of one process."""
    import jax

    from xpo_jax.io.files import to_json

    policy, reference = texts(10)
    alone = judge_batch(Patchy(), policy, reference, both_orders=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    summaries = []
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        local = judge_batch(
            Patchy(),
            policy,
            reference,
            both_orders=True,
            batch=prompts(10, [i // 5 == number for i in range(10)]),
        )
        summaries.append(json.loads(to_json(summarize_shard(local))))
    verdicts = merge_shards(local, summaries)
    for name in ("p_first", "weight", "flipped"):
        np.testing.assert_array_equal(getattr(verdicts, name), getattr(alone, name))
    assert verdicts.queries == alone.queries == 20
    failed = int((alone.weight == 0).sum())
    assert 0 < failed < 10 and sum(summary["failed"] for summary in summaries) == failed
    assert {summary["first_failure"] for summary in summaries} <= {"no verdict", "the judge answered nan", ""}
