"""Evaluation: averages within a prompt before the interval over prompts, on texts that are known."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_models import Markov, split
from fakes import Always, Broken, LongerText, Recording, silent, tied
from scipy.stats import binomtest

from xpo_jax.algorithm import logps, sampler
from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.config.evaluation import Evaluation
from xpo_jax.evaluation.evaluator import POLICY_SAMPLES, Evaluator, Opponents, same_tokens
from xpo_jax.evaluation.result import ended_by
from xpo_jax.judges.limits import FailureTolerance
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Comparison, Prompts, Samples

B, P, T = 4, 6, 8
REFERENCE, POLICY, LATER = "reference", "policy", "later"  # the fake's sampling weights are their names


def batches(*sizes):
    """Return batches of B prompts; the first `sizes[i]` of batch i are valid, and prompts are numbered from 1."""
    out, number = [], 1
    for size in sizes:
        names = [number + i if i < size else None for i in range(B)]
        number += size
        out.append(
            Prompts(
                rows=tuple({} if n is None else {"number": n} for n in names),
                messages=tuple(
                    () if n is None else ({"role": "user", "content": f"prompt {n}"},) for n in names
                ),
                tokens=np.array([[0 if n is None else n] * P for n in names], np.int32),
                lengths=np.full(B, P, np.int32),
                position=np.arange(B, dtype=np.int32),
                valid=np.array([n is not None for n in names]),
            )
        )
    return out


class Programs:
    """Stand-in for the compiled programs: responses of known lengths, log-probabilities of known values.

    lengths: (weights, candidate, prompt number) -> tokens; 0 gives a response of T that is not finished.
    ratio: nats per token by which weights other than the reference's prefer a token.
    """

    def __init__(self, lengths, ratio=0.0):
        self._lengths, self._ratio = lengths, ratio
        self.draws, self.keys = [], []

    def sample(self, weights, prompts, *, stream, step, candidate):
        self.draws.append((weights, stream, step, candidate))
        self.keys += [(stream, step, int(at), candidate) for at in prompts.position]
        wanted = [
            self._lengths(weights, candidate, int(row[0])) if valid else 1
            for row, valid in zip(prompts.tokens, prompts.valid, strict=True)
        ]
        lengths = np.array([n or T for n in wanted], np.int32)
        # the same letter everywhere: texts differ in length alone
        tokens = np.where(np.arange(T) < lengths[:, None], 7, 0).astype(np.int32)
        return Samples(tokens, lengths, np.array([n > 0 for n in wanted]))

    def fetch(self, tree):
        return tree

    def pack(self, prompts, tokens, lengths):
        return prompts, tokens, lengths

    def score(self, weights, packed):
        prompts, drawn, lengths = packed
        tokens = prompts.tokens
        assert drawn.shape[:2] == lengths.shape == (POLICY_SAMPLES, B)
        padding_nats = np.where(tokens[:, 0] == 0, 1e6, 0.0)  # absurd, so that counting one shows
        nats = -2.0 if weights == REFERENCE else -2.0 + self._ratio
        return nats * lengths + (padding_nats if weights != REFERENCE else 0.0)


def decode(samples):
    return ["x" * n for n in samples.lengths]


def evaluator(
    programs,
    prompts,
    judge=None,
    *,
    reference=REFERENCE,
    decode=decode,
    reference_samples=2,
    unfinished_loses=False,
    hide_thinking=False,
    seed=5,
    answers=None,
):
    return Evaluator(
        programs,
        judge or LongerText(),
        decode,
        Opponents(prompts, reference, reference_samples, answers),
        unfinished_loses=unfinished_loses,
        both_orders=False,
        hide_thinking=hide_thinking,
        failure_tolerance=FailureTolerance(max_failed_fraction=1.0, max_failed_batches=1),
        seed=seed,
    )


def averages(side):
    """Return the averages over answers, without the shares of distinct words."""
    return {name: value for name, value in side.items() if not name.startswith("distinct")}


def run(of, weights=POLICY, step=0):
    return of(weights, step, lambda items: items)


# ---- the same tokens ----------------------------------------------------------------------------


def test_same_tokens_looks_no_further_than_the_length():
    a = Samples(
        np.array([[5, 6, 0], [5, 6, 9], [5, 6, 0], [5, 6, 7]]), np.array([2, 2, 2, 3]), np.ones(4, bool)
    )
    b = Samples(
        np.array([[5, 6, 0], [5, 6, 0], [5, 7, 0], [5, 6, 0]]), np.array([2, 2, 2, 2]), np.ones(4, bool)
    )
    np.testing.assert_array_equal(same_tokens(a, b), [True, True, False, False])
    np.testing.assert_array_equal(same_tokens(b, a), [True, True, False, False])
    np.testing.assert_array_equal(same_tokens(a, a), [True] * 4)


# ---- the win rate -------------------------------------------------------------------------------


def wilson_ends(rate, tosses):
    """Return the roots p of (rate - p)^2 = z^2 p (1 - p) / tosses, which are the ends of Wilson's interval."""
    z = 1.959964**2 / tosses
    return sorted(np.roots([1 + z, -(2 * rate + z), rate**2]))


def test_win_rates_average_within_a_prompt_first():
    """Two policy samples meet two reference samples, and length decides; prompt 3 has one win in four."""
    table = {  # prompt: (policy's, reference's)
        1: ((3, 3), (2, 2)),  # 4 of 4
        2: ((2, 3), (3, 2)),  # tie, loss, win, tie: 2 of 4
        3: ((1, 3), (3, 2)),  # loss, loss, tie, win: 1.5 of 4
    }
    lengths = lambda weights, candidate, n: table[n][weights == REFERENCE][candidate % 2]
    prompts = batches(3)
    evaluation = run(evaluator(Programs(lengths), prompts))
    shares = np.array([1.0, 0.5, 0.375])
    assert evaluation.win_rate == pytest.approx(shares.mean())
    tosses = (
        3 * shares.mean() * (1 - shares.mean()) / shares.var(ddof=1)
    )  # of three prompts, not twelve comparisons
    assert [evaluation.low, evaluation.high] == pytest.approx(wilson_ends(shares.mean(), tosses), rel=1e-4)
    assert [row["win_share"] for row in evaluation.samples] == list(shares)
    assert [row["prompt"] for row in evaluation.samples] == ["prompt 1", "prompt 2", "prompt 3"]
    assert [row["policy"] for row in evaluation.samples] == ["xxx", "xx", "x"]  # the first of each side
    assert [row["reference"] for row in evaluation.samples] == ["xx", "xxx", "xxx"]


def test_a_rate_near_one_has_an_interval_within_0_and_1():
    """Three prompts of four are won in all comparisons, one in three of four."""
    lengths = lambda weights, candidate, n: 3 if weights == REFERENCE else 4 - (n == 1 and candidate == 0)
    evaluation = run(evaluator(Programs(lengths), batches(4)))
    assert evaluation.win_rate == 0.9375
    tosses = 4 * 0.9375 * 0.0625 / 0.125**2
    assert [evaluation.low, evaluation.high] == pytest.approx(wilson_ends(0.9375, tosses), rel=1e-4)
    assert 0.6 < evaluation.low < 0.9375 < evaluation.high < 1.0


def test_comparisons_without_verdict_leave_the_prompt_to_the_others():
    """The judge has no verdict where the policy's text has two characters."""

    def judge(comparisons: list[Comparison]):
        return [None if {len(c.a), len(c.b)} & {2} else "tie" for c in comparisons]

    table = {1: (2, 3), 2: (2, 2), 3: (1, 3)}
    lengths = lambda weights, candidate, n: 5 if weights == REFERENCE else table[n][candidate]
    prompts = batches(3)
    evaluation = run(evaluator(Programs(lengths), prompts, judge))
    assert evaluation.win_rate == 0.5
    assert math.isnan(evaluation.samples[1]["win_share"])
    assert [evaluation.low, evaluation.high] == pytest.approx(
        wilson_ends(0.5, 2), rel=1e-4
    )  # two prompts with a verdict
    nothing = run(evaluator(Programs(lengths), prompts, silent()))
    assert math.isnan(nothing.win_rate) and nothing.queries == 12


def test_a_narrow_win_is_a_win():
    """The judge is hardly certain, but always prefers the longer text: the policy's."""

    def judge(comparisons):
        return [0.5 + 0.01 * np.sign(len(c.a) - len(c.b)) for c in comparisons]

    evaluation = run(
        evaluator(Programs(lambda weights, candidate, n: 2 + (weights != REFERENCE)), batches(4), judge)
    )
    assert evaluation.win_rate == evaluation.high == 1.0
    # four prompts may all be won by a policy that wins half of the time
    assert evaluation.low == pytest.approx(binomtest(4, 4).proportion_ci(0.95, "wilson").low, rel=1e-4)


def test_a_judge_blind_to_content_gives_half():
    """It always prefers the first text shown; the order is drawn independently for every comparison."""
    lengths = lambda weights, candidate, n: 3 if weights == REFERENCE else 4
    prompts = batches(*[B] * 50)
    evaluation = run(evaluator(Programs(lengths), prompts, Always(answer="A"), reference_samples=4))
    assert evaluation.queries == 50 * B * 2 * 4
    assert abs(evaluation.win_rate - 0.5) < 4 * 0.5 / math.sqrt(evaluation.queries)
    shares = {row["win_share"] for row in evaluation.samples}
    assert len(shares) > 4  # a coin per comparison: one per prompt would give 0 and 1 only


def test_identical_responses_tie_unasked():
    evaluation = run(evaluator(Programs(lambda weights, candidate, n: 3), batches(4), Broken(at=0)))
    assert (evaluation.win_rate, evaluation.queries) == (0.5, 0)
    assert evaluation.outcomes == {"pairs": 4 * 2 * 2, "identical": 4 * 2 * 2}


@pytest.mark.parametrize(("unfinished_loses", "rate"), [(True, 0.0), (False, 1.0)])
def test_unfinished_responses_lose_where_the_config_says_so(unfinished_loses, rate):
    """The policy's response is the longer one, but it was cut off."""
    lengths = lambda weights, candidate, n: 3 if weights == REFERENCE else 0
    evaluation = run(evaluator(Programs(lengths), batches(4), unfinished_loses=unfinished_loses))
    assert evaluation.win_rate == rate
    assert evaluation.policy["unfinished"] == 1.0 and evaluation.reference["unfinished"] == 0.0
    assert evaluation.queries == (0 if unfinished_loses else 16)


@pytest.mark.parametrize("hide", [False, True])
def test_judge_measures_what_it_reads(hide):
    decode = lambda samples: ["<think>12345</think>1"] * len(samples.lengths)
    judge = LongerText()
    judge.parts = lambda messages, text: {"length": len(text)}
    programs = Programs(lambda weights, candidate, n: 3)
    evaluation = run(evaluator(programs, batches(4), judge, decode=decode, hide_thinking=hide))
    assert evaluation.policy["length"] == (1 if hide else 21)
    assert evaluation.samples[0]["policy"] == "<think>12345</think>1"


# ---- KL and lengths -----------------------------------------------------------------------------


def test_kl_per_sequence_and_per_token():
    lengths = lambda weights, candidate, n: 2 if weights == REFERENCE else (n if candidate else 1)
    programs = Programs(lengths, ratio=0.25)
    prompts = batches(3)  # policy's lengths (1, 1), (1, 2), (1, 3)
    evaluation = run(evaluator(programs, prompts))
    assert evaluation.kl == pytest.approx(0.25 * (1 + 1.5 + 2) / 3)
    assert evaluation.kl_per_token == pytest.approx(0.25)
    assert evaluation.policy["tokens"] == pytest.approx((1 + 1.5 + 2) / 3)
    assert evaluation.reference["tokens"] == 2.0


class MarkovPrograms(Programs):
    """The real sampler and the real log-probabilities, of models whose next token depends on the last one alone."""

    def __init__(self, temperature):
        self._graphdef, _ = split(Markov(np.zeros((V, V))))
        sampling = Sampling(
            max_new_tokens=T, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
        )
        self._sample = jax.jit(
            sampler.make_sampler(self._graphdef, sampling, vocab_size=V, end_tokens=(END,), pad_token=END)
        )
        self._scoring = {"temperature": temperature, "vocab_size": V, "chunk_tokens": 1024}

    def sample(self, weights, prompts, *, stream, step, candidate):
        keys = sampler.row_keys(0, stream, step, prompts.position, candidate)
        drawn = self._sample(weights, prompts.tokens, prompts.lengths, prompts.valid, keys)
        return Samples(*map(np.asarray, drawn))

    def score(self, weights, packed):
        prompts, *responses = packed
        scored = logps.response_logps(
            self._graphdef, weights, prompts.tokens, prompts.lengths, *responses, **self._scoring
        )
        return np.asarray(scored.logps)


V, END = 5, 4


def test_kl_and_entropy_are_those_of_the_closed_form():
    """Two Markov chains over four words and an end start in a known state; expectations are sums over states."""
    rng, temperature, start, prompts = np.random.default_rng(0), 0.8, 2, 2000
    tables = [rng.normal(size=(V, V)) for _ in range(2)]
    p, q = (np.exp(t / temperature) / np.exp(t / temperature).sum(-1, keepdims=True) for t in tables)
    alive, kl, entropy, tokens = np.eye(V)[start], 0.0, 0.0, 0.0
    for _ in range(T):
        kl += alive @ (p * np.log(p / q)).sum(-1)
        entropy -= alive @ (p * np.log(p)).sum(-1)
        tokens += alive.sum()
        alive = alive @ p
        alive[END] = 0.0
    batch = Prompts(
        ({},) * prompts,
        (({"role": "user", "content": "x"},),) * prompts,
        np.full((prompts, 1), start, np.int32),
        np.ones(prompts, np.int32),
        np.arange(prompts, dtype=np.int32),
        np.ones(prompts, bool),
    )
    policy, reference = (split(Markov(table))[1] for table in tables)
    of = evaluator(
        MarkovPrograms(temperature),
        [batch],
        tied(),
        reference=reference,
        decode=lambda samples: ["x"] * prompts,
        reference_samples=1,
    )
    evaluation = of(policy, 0, lambda items: items)
    assert evaluation.intervals["kl"] < 0.05 * kl
    assert evaluation.kl == pytest.approx(kl, abs=1.5 * evaluation.intervals["kl"])  # three standard errors
    assert evaluation.policy["tokens"] == pytest.approx(tokens, rel=0.02)
    assert evaluation.kl_per_token == pytest.approx(kl / tokens, rel=0.05)
    assert evaluation.entropy == pytest.approx(entropy / tokens, rel=0.02)
    itself = of(reference, 0, lambda items: items)
    assert (itself.kl, itself.kl_per_token) == (0.0, 0.0)


def test_padding_rows_of_partial_batches_never_count():
    """Five prompts make two batches of four: three rows are padding, and their scores are absurd."""
    lengths = lambda weights, candidate, n: 2 if weights == REFERENCE else 3
    prompts = batches(4, 1)
    programs = Programs(lengths, ratio=0.5)
    evaluation = run(evaluator(programs, prompts))
    assert len(evaluation.samples) == 5 and evaluation.queries == 5 * 4
    assert evaluation.win_rate == 1.0 and evaluation.kl == pytest.approx(1.5)
    assert averages(evaluation.policy) == {"tokens": 3.0, "unfinished": 0.0, "letters": 3.0, "valid": 0.0}
    Recording.calls.clear()
    run(evaluator(programs, prompts, Recording()))
    assert [len(call) for call in Recording.calls] == [4, 4, 4, 4, 1, 1, 1, 1]


# ---- what is drawn ------------------------------------------------------------------------------


def test_reference_samples_are_drawn_once():
    programs = Programs(lambda weights, candidate, n: 2 + (weights != REFERENCE))
    evaluate = evaluator(programs, batches(4, 2), reference_samples=3)
    first = run(evaluate)
    assert len(programs.draws) == 2 * (2 + 3)
    second = run(evaluate, LATER, step=7)
    assert len(programs.draws) == 2 * (2 + 3) + 2 * 2
    assert {d[:1] + d[2:] for d in programs.draws} == (
        {(POLICY, 0, c) for c in (0, 1)}
        | {(LATER, 7, c) for c in (0, 1)}
        | {(REFERENCE, 0, c) for c in (2, 3, 4)}
    )
    assert {stream for _, stream, _, _ in programs.draws} == {Stream.EVALUATION}
    assert [row["reference"] for row in first.samples] == [row["reference"] for row in second.samples]
    assert first.queries == second.queries == 6 * 2 * 3


def test_no_key_is_used_twice():
    """Two prompts with the same key would have the same samples, and the interval would be too narrow."""
    programs = Programs(lambda weights, candidate, n: 2 + (weights != REFERENCE))
    evaluate = evaluator(programs, batches(4, 4, 2), reference_samples=3)
    run(evaluate)
    run(evaluate, LATER, step=7)
    assert len(set(programs.keys)) == len(programs.keys) == 3 * B * (2 + 3 + 2)


def test_the_same_evaluation_again_gives_the_same():
    lengths = lambda weights, candidate, n: 1 + (3 * n + candidate + (weights == REFERENCE)) % 5
    twice = [run(evaluator(Programs(lengths, 0.1), batches(4, 3), Always(answer="A"))) for _ in range(2)]
    assert twice[0] == twice[1]
    other = run(evaluator(Programs(lengths, 0.1), batches(4, 3), Always(answer="A"), seed=6))
    assert other.win_rate != twice[0].win_rate  # another order shown


# ---- parts --------------------------------------------------------------------------------------


def test_parts_of_a_judge_are_averaged_over_all_samples_of_a_side():
    lengths = lambda weights, candidate, n: 3 + candidate
    evaluation = run(evaluator(Programs(lengths), batches(4)))
    assert averages(evaluation.policy) == {"tokens": 3.5, "unfinished": 0.0, "letters": 3.5, "valid": 0.5}
    assert averages(evaluation.reference) == {"tokens": 5.5, "unfinished": 0.0, "letters": 5.5, "valid": 1.0}
    assert evaluation.intervals["letters"] == 0.0


def test_intervals_of_parts_are_over_prompts():
    evaluation = run(evaluator(Programs(lambda weights, candidate, n: n), batches(4)))
    half = 1.959964 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert evaluation.intervals["letters"] == pytest.approx(half, rel=1e-4)
    assert evaluation.policy["valid"] == 0.25


def test_a_judge_without_parts_still_gets_lengths():
    evaluation = run(evaluator(Programs(lambda weights, candidate, n: 2), batches(3), Always(answer="tie")))
    assert averages(evaluation.policy) == averages(evaluation.reference) == {"tokens": 2.0, "unfinished": 0.0}


def test_metrics_are_named_and_numbers():
    evaluation = run(evaluator(Programs(lambda weights, candidate, n: 3 + candidate, ratio=0.5), batches(4)))
    metrics = evaluation.metrics()
    assert metrics["eval/win_rate"] == evaluation.win_rate == 0.0
    assert metrics["eval/policy/letters"] == 3.5 and metrics["eval/reference/letters"] == 5.5
    assert (
        metrics["eval/kl"] == 0.5 * 3.5
        and metrics["eval/kl_per_token"] == 0.5
        and metrics["eval/queries"] == 16.0
    )
    assert all(isinstance(value, float) for value in metrics.values())


# ---- at equal lengths, a file of answers, early ends ------------------------------------------------


def test_at_equal_lengths_a_judge_of_length_sees_no_difference():
    """The longer answer wins, and the policy's is mostly longer: 500 prompts with lengths of 1 to 8."""
    draws = np.random.default_rng(0).integers(1, 7, (501, 6))
    lengths = lambda weights, candidate, n: int(draws[n, candidate]) + (weights != REFERENCE)
    evaluation = run(evaluator(Programs(lengths), batches(*[B] * 125), reference_samples=4))
    assert evaluation.low > 0.6
    assert evaluation.controlled.mean == pytest.approx(0.5, abs=0.01)
    assert evaluation.metrics()["eval/win_rate_controlled"] == evaluation.controlled.mean


def test_a_file_of_answers_is_another_opponent():
    """Texts of three characters: identical ones tie without the judge, which decides on the rest."""
    lengths = lambda weights, candidate, n: 1 if weights == REFERENCE else (3 if candidate else 2 * n)
    prompts = batches(2)  # the policy's: (2, 3) and (4, 3) characters
    evaluation = run(evaluator(Programs(lengths), prompts, answers=[["xxx", "xxx", "", ""]]))
    assert evaluation.win_rate == 1.0
    assert evaluation.against_answers.mean == pytest.approx(((0 + 0.5) + (1 + 0.5)) / 4)
    assert evaluation.queries == 2 * 2 * 2 + 2
    assert evaluation.metrics()["eval/win_rate_answers_low"] == evaluation.against_answers.low
    without = run(evaluator(Programs(lengths), prompts))
    assert without.against_answers is None and "eval/win_rate_answers" not in without.metrics()


def test_samples_have_the_verdict_on_the_two_answers_shown():
    lengths = lambda weights, candidate, n: (2 if weights == REFERENCE else 3) + candidate % 2
    evaluation = run(evaluator(Programs(lengths), batches(4, 4)))
    assert {row["shown"] for row in evaluation.samples} == {"A", "B"}
    for row in evaluation.samples:
        assert (row["p_policy"], row["reason"]) == (1.0, "length")
        assert row["scores"] == {"policy": 3, "reference": 2}
    unasked = run(evaluator(Programs(lambda *_: 3), batches(2)))
    assert [(row["shown"], row["p_policy"]) for row in unasked.samples] == [(None, 0.5)] * 2
    silence = run(evaluator(Programs(lengths), batches(2), silent()))
    assert [row["p_policy"] for row in silence.samples] == [None] * 2


def test_the_first_limit_that_is_passed_ends_a_run():
    start = run(evaluator(Programs(lambda weights, candidate, n: 4), batches(4)))
    now = dataclasses.replace(start, kl=3.0, low=0.6, win_rate=0.7, policy={**start.policy, "valid": 0.9})
    off = {"stop_kl": None, "stop_win_rate": None, "stop_validity_drop": None}
    assert start.policy["valid"] == 1.0
    assert ended_by(start, now, **off) == ""
    for name, passed, not_yet in (
        ("stop_kl", 3.0, 3.1),
        ("stop_win_rate", 0.6, 0.65),
        ("stop_validity_drop", 0.09, 0.11),
    ):
        assert ended_by(start, now, **{**off, name: passed}) == f"evaluation.{name}"
        assert ended_by(start, now, **{**off, name: not_yet}) == ""
    mute = dataclasses.replace(start, policy={"tokens": 4.0})
    with pytest.raises(ValueError, match="^evaluation.stop_validity_drop is set, .*set it to None"):
        ended_by(mute, mute, **{**off, "stop_validity_drop": 0.1})


# ---- the page -------------------------------------------------------------------------------------


def test_evaluation_page_documents_every_field_and_metric():
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Evaluation):
        assert f'"{field.name}": ' in page
    evaluation = run(evaluator(Programs(lambda *_: 2), batches(2), answers=[["x"] * B]))
    names = {name for name in evaluation.metrics() if not re.search("_(low|high)$", name)}
    shown = {re.sub("/(policy|reference)/", "/*/", name) for name in names}
    parts = {"eval/*/letters", "eval/*/valid"}  # the parts of this judge, for which the page has NAME
    assert parts <= shown and "`eval/*/NAME`" in page
    assert {name for name in shown if f"`{name}`" not in page} == parts
