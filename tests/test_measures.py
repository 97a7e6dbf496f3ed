"""Win rates, their intervals and variety: by hand, against scipy, and in simulations whose truth is known."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import binomtest

from xpo_jax.evaluation.statistics import (
    LENGTH_PENALTY,
    distinct,
    length_controlled,
    mean_interval,
    reward,
    win_rate,
    win_share,
)

# ---- the interval -------------------------------------------------------------------------------


def test_mean_interval_by_hand():
    mean, half = mean_interval(np.array([0.0, 0.5, 1.0, 1.0, 0.25]))
    assert mean == 0.55
    variance = (0.55**2 + 0.05**2 + 2 * 0.45**2 + 0.3**2) / 4
    assert half == pytest.approx(NormalDist().inv_cdf(0.975) * math.sqrt(variance / 5), rel=1e-4)


def test_mean_interval_leaves_out_what_was_not_judged():
    assert mean_interval(np.array([0.0, math.nan, 1.0, math.nan])) == mean_interval(np.array([0.0, 1.0]))
    mean, half = mean_interval(np.array([0.25, math.nan]))
    assert mean == 0.25 and math.isnan(half)
    assert all(math.isnan(x) for x in mean_interval(np.array([math.nan])))
    assert all(math.isnan(x) for x in mean_interval(np.array([])))


def test_a_share_is_of_what_was_judged():
    assert win_share(np.array([[1.0, 0.0], [0.5, math.nan]])) == 0.5
    assert math.isnan(win_share(np.array([math.nan])))


def drawn(rng, prompts, gap=1.0):
    """Draw wins by Bradley-Terry verdicts on a reward difference that varies by prompt, and a KL that goes with it."""
    difference = gap + rng.normal(0, 0.1, prompts)
    wins = (rng.random((prompts, 2, 4)) < expit(difference)[:, None, None]).astype(float)
    return wins, 3.0 + 4.0 * (wins.mean((1, 2)) - 0.5) + rng.normal(0, 2.0, prompts)


def test_objective_by_hand():
    wins = [np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([0.5, math.nan]), np.array([math.nan])]
    value = reward(wins, np.array([1.0, 2.0, 3.0, 6.0]))
    rate = (0.5 + 1 + 0.5 + 0.5) / 4
    assert value.mean == pytest.approx(math.log(rate / (1 - rate)))
    slope = 0.75 / (rate * (1 - rate))
    assert value.variance == pytest.approx(slope**2 * (1 / 12) / 3)
    assert value.kl_variance == pytest.approx(np.var([1, 2, 3, 6], ddof=1) / 4)
    assert value.covariance == pytest.approx(slope * np.cov([0.5, 1, 0.5], [1, 2, 3])[0, 1] / 4)
    objective = value.objective(3.0, 0.2)
    assert objective.mean == pytest.approx(value.mean - 0.6)
    variance = value.variance - 0.4 * value.covariance + 0.04 * value.kl_variance
    assert objective.high - objective.low == pytest.approx(2 * 1.96 * math.sqrt(variance))
    assert all(math.isnan(x) for x in reward([np.array([1.0])], np.array([1.0])).objective(1.0, 0.1))
    won = reward([np.array([1.0])] * 10, np.ones(10))
    assert won.mean == pytest.approx(math.log(21)) and won.variance > 0


@pytest.mark.parametrize(("prompts", "beta"), [(100, 0.1), (300, 0.5)])
def test_objective_interval_contains_the_truth_and_counts_the_covariance(prompts, beta):
    rng, covered, without, times = np.random.default_rng(0), 0, 0, 1000
    wins, kl = drawn(rng, 200_000)
    rate = wins.mean()
    truth = math.log(rate / (1 - rate)) - beta * kl.mean()
    for _ in range(times):
        wins, kl = drawn(rng, prompts)
        value = reward(list(wins), kl)
        low, high = value.objective(float(kl.mean()), beta)[1:]
        covered += low <= truth <= high
        low, high = value._replace(covariance=0.0).objective(float(kl.mean()), beta)[1:]
        without += low <= truth <= high
    assert 0.93 <= covered / times <= 0.97
    assert without > covered  # too wide: policies that win more also move further
    difference = 1.0  # the reward that the verdicts were drawn from, which hardly varies
    assert math.log(rate / (1 - rate)) == pytest.approx(difference, abs=0.02)


def coverage(gap, prompts, times=1000, spread=0.7):
    """Return the truth, and how often two intervals hold it: that of `win_rate`, and one for independent comparisons.

    Two samples that share their prompt's difficulty meet four others, and are better than these by `gap` on average.
    The better one wins.
    """
    rng = np.random.default_rng(0)
    truth = NormalDist().cdf(gap / math.sqrt(2 + spread**2))
    covered = naive = 0
    for _ in range(times):
        first = gap + rng.normal(0, spread, (prompts, 1)) + rng.normal(size=(prompts, 2))
        wins = (first[:, :, None] > rng.normal(size=(prompts, 1, 4))).astype(float)
        rate = win_rate(list(wins))
        assert rate.mean == pytest.approx(wins.mean())
        covered += rate.low <= truth <= rate.high
        naive += abs(wins.mean() - truth) <= 1.96 * wins.std() / math.sqrt(wins.size)
    return truth, covered / times, naive / times


@pytest.mark.parametrize(("gap", "rate"), [(0.0, 0.5), (1.0, 0.737)])
def test_the_interval_covers_the_truth_95_times_in_100(gap, rate):
    """There are 100 prompts; an interval over the 800 comparisons holds the truth only three times in four."""
    truth, covered, naive = coverage(gap, 100)
    assert truth == pytest.approx(rate, abs=0.001)
    assert 0.93 < covered < 0.97 and naive < 0.8


@pytest.mark.parametrize(("gap", "rate"), [(2.5, 0.943), (4.0, 0.994)])
@pytest.mark.parametrize("prompts", [10, 30, 300])
def test_the_interval_of_a_rate_near_one_covers_the_truth(gap, rate, prompts):
    """A normal interval has no width there, because all or nearly all comparisons were won."""
    truth, covered, _ = coverage(gap, prompts)
    assert truth == pytest.approx(rate, abs=0.001) and 0.92 < covered < 0.98


def test_the_interval_of_nothing_but_wins_has_a_width():
    """It is scipy's, of as many tosses as prompts; two prompts decide nothing."""
    for prompts in (2, 30):
        rate = win_rate([np.ones((2, 4))] * prompts)
        expected = binomtest(prompts, prompts).proportion_ci(0.95, "wilson")
        assert rate == pytest.approx((1.0, expected.low, 1.0), rel=1e-4)
    assert win_rate([np.ones((2, 4))] * 2).low < 0.5
    assert all(map(math.isnan, win_rate([np.ones((2, 4))])[1:]))


# ---- at equal lengths -----------------------------------------------------------------------------


def planted(rng, theta, phi, longer, prompts=100, spread=0.0):
    """Return wins and differences in length, where the judge prefers length by phi and the answer itself by theta.

    spread: of theta between prompts.
    """
    differences = 30 * rng.normal(longer, 1, (prompts, 2, 4))
    preference = theta + spread * rng.normal(size=(prompts, 1, 1))
    chance = expit(preference + phi * np.tanh(differences / 30))
    return list((rng.random(chance.shape) < chance).astype(float)), list(differences)


@pytest.mark.parametrize(
    ("theta", "phi", "longer", "spread", "raw"),
    [
        (0.0, 1.5, 0.8, 0.0, 0.651),
        (0.7, 1.5, 0.8, 0.0, 0.773),
        (-0.5, 2.0, -0.5, 0.0, 0.296),
        (0.7, 0.0, 0.8, 1.5, 0.617),  # prompts differ: an interval over comparisons would be too narrow
    ],
)
def test_a_planted_effect_of_length_is_taken_out(theta, phi, longer, spread, raw):
    """The estimate is the planted rate, and its interval holds it 95 times in 100; the win rate shows `raw`."""
    rng = np.random.default_rng(1)
    rates, plain = [], []
    for _ in range(400):
        wins, differences = planted(rng, theta, phi, longer, spread=spread)
        rates.append(length_controlled(wins, differences))
        plain.append(win_rate(wins).mean)
    truth = float(np.mean(expit(theta + spread * rng.normal(size=10**6))))
    assert np.mean(plain) == pytest.approx(raw, abs=0.005)
    assert np.mean([rate.mean for rate in rates]) == pytest.approx(truth, abs=0.005)
    assert 0.93 <= np.mean([rate.low <= truth <= rate.high for rate in rates]) <= 0.97


def test_the_fit_is_scipys():
    wins, differences = planted(np.random.default_rng(2), 0.4, 1.0, 0.5, prompts=40)
    wins[3], differences[3] = np.array([0.5, math.nan, 1.0]), np.array([10.0, -500.0, -10.0])
    wins[5], differences[5] = np.array([math.nan]), np.array([900.0])
    flat = [
        (w, d, 1 / np.isfinite(w_).sum())
        for w_, d_ in zip(wins, differences, strict=True)
        for w, d in zip(w_.ravel(), d_.ravel(), strict=True)
        if not math.isnan(w)
    ]
    won, d, weight = map(np.array, zip(*flat, strict=True))
    x = np.tanh(d / d.std())

    def loss(b):
        z = b[0] + b[1] * x
        return -weight @ (won * log_expit(z) + (1 - won) * log_expit(-z)) + LENGTH_PENALTY * b[1] ** 2 / 2

    expected = expit(minimize(loss, [0.0, 0.0], method="BFGS", tol=1e-12).x[0])
    assert length_controlled(wins, differences).mean == pytest.approx(expected, abs=1e-6)


def test_where_there_is_no_length_to_control():
    rng = np.random.default_rng(3)
    wins = list(rng.integers(0, 2, (60, 2, 4)).astype(float))
    same = length_controlled(wins, [np.zeros((2, 4))] * 60)
    raw = win_rate(wins)
    assert same == pytest.approx(raw, abs=2e-3) and same.mean == pytest.approx(raw.mean, abs=1e-9)
    won = [np.ones((2, 4))] * 60
    assert length_controlled(won, list(rng.normal(size=(60, 2, 4)))) == win_rate(won)
    nothing = length_controlled([np.full(3, math.nan)] * 2, [np.zeros(3)] * 2)
    assert all(map(math.isnan, nothing))


def test_length_controlled_stays_finite_where_length_decides_everything():
    """The longer answer always wins, and the first is usually longer."""
    d = np.random.default_rng(4).normal(20, 20, (200, 8))
    wins = list((d > 0).astype(float))
    rate = length_controlled(wins, list(d))
    assert win_rate(wins).low > 0.8
    assert rate.mean == pytest.approx(0.5, abs=0.1) and rate.low < 0.5 < rate.high


# ---- variety --------------------------------------------------------------------------------------


def test_distinct():
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3  # "a b", "b a", "a b"
    assert distinct(["a b", "b a"], 2) == 1.0  # not across texts
    assert math.isnan(distinct(["a", ""], 2))
