"""Whatever a judge returns, a pair gets the verdict that was meant or none: ten thousand random answers."""

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
    """Raises from whatever is done to it."""

    def _raise(self, *_):
        raise RuntimeError("hostile\nobject")

    __repr__ = __str__ = __bool__ = __float__ = __eq__ = __len__ = __iter__ = __getitem__ = __hash__ = _raise


class HostileText(str):
    """A text that denies being equal to anything."""

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
verdicts = st.builds(
    Verdict, probabilities | numbers | numpy_floats | texts | things | st.none(), texts | things, scores
)
answers = probabilities | texts | numbers | numpy_floats | things | st.none() | verdicts
integers = st.integers() | st.booleans() | st.sampled_from([np.int8(1), np.uint64(0), np.bool_(True)])


def meant(answer):
    """The contract, said another way: the probability for A, or None. No integers come here."""
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
        return 1.0  # its letters are A, whatever it says
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
    found = ask(
        lambda comparisons: returned,
        prompts,
        pairs,
        unfinished_loses=True,
        both_orders=both_orders,
        shown_seed=(1, 2, 3),
    )
    # whatever was returned: it can be logged and told, and weights are 0 or 1
    json.loads(to_json([found.reasons, found.scores, summarize_shard(found)]))
    assert set(found.weight) <= {0.0, 1.0} and np.isfinite(found.p_first).all()
    assert all(reason for reason, weight in zip(found.reasons, found.weight, strict=True) if weight == 0)
    assert all("\n" not in reason for reason, w in zip(found.reasons, found.weight, strict=True) if w == 0)
    metrics(found, prompts.valid)
    return found


generously = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@generously
@given(st.lists(answers, min_size=ROWS, max_size=ROWS))
def test_ten_thousand_answers(returned):
    found = judged(returned)
    assert not found.fatal_error
    for i, answer in enumerate(returned):
        p = meant(answer)
        assert found.weight[i] == (p is not None), answer
        expected = 0.5 if p is None else p if found.shown[i] == (0, 1) else 1 - p
        assert found.p_first[i] == np.float32(expected)
    failed = sum(meant(answer) is None for answer in returned)
    assert (summarize_shard(found)["pairs"], summarize_shard(found)["failed"]) == (ROWS, failed)


@settings(generously, max_examples=50)
@given(st.lists(st.tuples(answers, answers), min_size=ROWS, max_size=ROWS))
def test_answers_in_both_orders(returned):
    found = judged([answer for two in returned for answer in two], both_orders=True)
    for i, two in enumerate(returned):
        first, second = map(meant, two)
        there = first is not None and second is not None
        assert found.weight[i] == there and np.isnan(found.flipped[i]) == (not there)
        if there:
            second = 1 - second
            tie = first != second and {first, second} <= {0, 0.5, 1}
            p = 0.5 if tie else (first + second) / 2
            assert found.p_first[i] == np.float32(p if found.shown[i] == (0, 1) else 1 - p)
            assert found.flipped[i] == (np.sign(first - 0.5) != np.sign(second - 0.5))


@settings(generously, max_examples=50)
@given(st.lists(answers, min_size=3, max_size=3), integers, st.integers(0, 3))
def test_an_integer_among_the_answers_ends_the_run(returned, integer, at):
    found = judged([*returned[:at], integer, *returned[at:]], rows=4)
    assert "which is refused" in found.fatal_error and not found.weight.any()
    with pytest.raises(ValueError, match="which is refused"):
        FailureTolerance(max_failed_fraction=1.0, max_failed_batches=1).check([summarize_shard(found)])


@settings(generously, max_examples=100)
@given(things | texts | numbers | st.none() | st.lists(answers, max_size=3) | st.dictionaries(texts, answers))
def test_whatever_is_returned_in_place_of_four_answers(returned):
    found = judged(returned, rows=4)
    assert not found.weight.any() and not found.fatal_error
    assert all("return a list with one answer each" in reason for reason in found.reasons)


def test_scores_without_end():
    circle: dict = {}
    circle["a"] = circle
    found = judged([Verdict(1.0, "", circle), "A", "A", "A"], rows=4)
    assert list(found.weight) == [0, 1, 1, 1] and "for they go into a log" in found.reasons[0]
