"""A pair gets the verdict that was meant, or none, for ten thousand random answers of a judge."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpo_jax.io.files import to_json
from xpo_jax.judges.ask import ResponsePairs, ask, metrics, summarize_shard
from xpo_jax.judges.limits import FailureTolerance
from xpo_jax.values import Prompts, Verdict

ROWS, EXAMPLES = 40, 250  # 10,000 answers


class Hostile:
    """Raises from each of its methods."""

    def _raise(self, *_):
        raise RuntimeError("hostile\nobject")

    __repr__ = __str__ = __bool__ = __float__ = __eq__ = __len__ = __iter__ = __getitem__ = __hash__ = _raise


class HostileText(str):
    """A text that cannot be compared."""

    def __eq__(self, other):
        raise RuntimeError("hostile text")

    __hash__ = str.__hash__


probabilities = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 5e-324, math.nextafter(1, 0)])
texts = st.text() | st.sampled_from(
    ["A", "B", "tie", "a", "A ", "TIE", "A\n", "Answer A is better", "\ud800", "{}", "0.5", "nan", "None"]
)
numbers = st.floats() | st.sampled_from(
    [math.nan, math.inf, -math.inf, -0.0, 1.0000000000000002, -5e-324, 1e308]
)
numpy_floats = st.builds(
    lambda kind, x: kind(x),
    st.sampled_from([np.float16, np.float32, np.float64, np.longdouble]),
    probabilities,
)
things = st.builds(Hostile) | st.sampled_from(
    [
        HostileText("A"),
        b"A",
        [],
        ["A"],
        ("A", 0.5),
        {"p": 1.0},
        {0.5},
        object(),
        1j,
        Ellipsis,
        Verdict,
    ]
    + [np.array(0.5), np.array([0.5]), np.array([]), lambda: "A", Exception("A")]
)
scores = (
    st.dictionaries(st.sampled_from(["a", "b", "sum", 1, None]), numbers | texts | things, max_size=3)
    | st.sampled_from([{"exchanged": 3}, {"exchanged": {"a": 1}}])
    | things
)
verdict_answers = st.builds(
    Verdict, probabilities | numbers | numpy_floats | texts | things | st.none(), texts | things, scores
)
answers = probabilities | texts | numbers | numpy_floats | things | st.none() | verdict_answers
integers = st.integers() | st.booleans() | st.sampled_from([np.int8(1), np.uint64(0), np.bool_(True)])


def meant(answer):
    """Return the probability of A by the contract, or None; written independently. No integers reach this."""
    if isinstance(answer, Verdict):
        if not isinstance(answer.reason, str) or not isinstance(answer.scores, dict):
            return None
        try:
            to_json(answer.scores)
        except Exception:
            return None
        return None if isinstance(answer.p, str) else meant(answer.p)
    if type(answer) is str:
        return 1.0 if answer == "A" else 0.0 if answer == "B" else 0.5 if answer == "tie" else None
    if type(answer) is HostileText:
        return 1.0  # its characters are A
    if isinstance(answer, (float, np.floating)) and 0.0 <= float(answer) <= 1.0:
        return float(answer)
    return None


def judged(returned, *, rows=ROWS, both_orders=False):
    prompts = Prompts(
        rows=({},) * rows,
        messages=((),) * rows,
        tokens=np.zeros((rows, 1), np.int32),
        lengths=np.ones(rows, np.int32),
        position=np.arange(rows, dtype=np.int32),
        valid=np.ones(rows, bool),
    )
    pairs = ResponsePairs(
        ["x"] * rows, ["y"] * rows, np.zeros(rows, bool), np.ones(rows, bool), np.ones(rows, bool)
    )
    verdicts = ask(
        lambda comparisons: returned,
        prompts,
        pairs,
        unfinished_loses=True,
        both_orders=both_orders,
        hide_thinking=False,
        shown_seed=(1, 2, 3),
    )
    # in every case the verdicts can be logged and sent, and weights are 0 or 1
    json.loads(to_json([verdicts.reasons, verdicts.scores, summarize_shard(verdicts)]))
    assert set(verdicts.weight) <= {0.0, 1.0} and np.isfinite(verdicts.p_first).all()
    assert all(
        reason for reason, weight in zip(verdicts.reasons, verdicts.weight, strict=True) if weight == 0
    )
    assert all(
        "\n" not in reason for reason, w in zip(verdicts.reasons, verdicts.weight, strict=True) if w == 0
    )
    metrics(verdicts, prompts.valid)
    return verdicts


generously = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@generously
@given(st.lists(answers, min_size=ROWS, max_size=ROWS))
def test_ask_random_answers_give_the_verdict_meant_or_none(returned):
    verdicts = judged(returned)
    assert not verdicts.fatal_error
    for i, answer in enumerate(returned):
        p = meant(answer)
        assert verdicts.weight[i] == (p is not None), answer
        expected = 0.5 if p is None else p if verdicts.shown[i] == (0, 1) else 1 - p
        assert verdicts.p_first[i] == np.float32(expected)
    failed = sum(meant(answer) is None for answer in returned)
    assert (summarize_shard(verdicts)["pairs"], summarize_shard(verdicts)["failed"]) == (ROWS, failed)


@settings(generously, max_examples=50)
@given(st.lists(st.tuples(answers, answers), min_size=ROWS, max_size=ROWS))
def test_ask_random_answers_in_both_orders_are_merged(returned):
    verdicts = judged([answer for two in returned for answer in two], both_orders=True)
    for i, two in enumerate(returned):
        first, second = map(meant, two)
        has_verdict = first is not None and second is not None
        assert verdicts.weight[i] == has_verdict and np.isnan(verdicts.flipped[i]) == (not has_verdict)
        if has_verdict:
            second = 1 - second
            tie = first != second and {first, second} <= {0, 0.5, 1}
            p = 0.5 if tie else (first + second) / 2
            assert verdicts.p_first[i] == np.float32(p if verdicts.shown[i] == (0, 1) else 1 - p)
            assert verdicts.flipped[i] == (np.sign(first - 0.5) != np.sign(second - 0.5))


@settings(generously, max_examples=50)
@given(st.lists(answers, min_size=3, max_size=3), integers, st.integers(0, 3))
def test_ask_integer_among_the_answers_ends_the_run(returned, integer, at):
    verdicts = judged([*returned[:at], integer, *returned[at:]], rows=4)
    assert "which is refused" in verdicts.fatal_error and not verdicts.weight.any()
    with pytest.raises(ValueError, match="which is refused"):
        FailureTolerance(max_failed_fraction=1.0, max_failed_batches=1).check([summarize_shard(verdicts)])


@settings(generously, max_examples=100)
@given(things | texts | numbers | st.none() | st.lists(answers, max_size=3) | st.dictionaries(texts, answers))
def test_ask_anything_but_four_answers_fails_all_pairs(returned):
    verdicts = judged(returned, rows=4)
    assert not verdicts.weight.any() and not verdicts.fatal_error
    assert all("return a list with one answer each" in reason for reason in verdicts.reasons)


def test_ask_recursive_scores_fail_their_pair_only():
    circle: dict = {}
    circle["a"] = circle
    verdicts = judged([Verdict(1.0, "", circle), "A", "A", "A"], rows=4)
    assert list(verdicts.weight) == [0, 1, 1, 1] and "for they go into a log" in verdicts.reasons[0]
