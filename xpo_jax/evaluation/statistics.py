"""The statistics of an evaluation: win rates with their intervals, and the variety of texts.

A prompt's comparisons share its samples and its difficulty, so they are one observation: every interval here is over
prompts.

The sigmoid and the Newton iteration are written out although SciPy has both (`expit`, `optimize.minimize`): theirs
differ in the last digits, and the results of this module are compared byte for byte between versions of the project.
tests/test_measures.py holds them to SciPy's.

Left out on purpose: what a prompt is, who judged, and exact intervals for a handful of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NORMAL = 1.96  # standard errors on either side that hold 95 %
# On the squared coefficient of length: keeps it finite where lengths alone decide the comparisons.
LENGTH_PENALTY = 0.01


class Rate(NamedTuple):
    """A win rate with the ends of its 95 % interval; nan if there are no comparisons to compute it from."""

    mean: float
    low: float
    high: float


class Reward(NamedTuple):
    """The mean reward of the policy over the reference's, as the win rate implies it, and how sure it is.

    mean: logit of the win rate, nats. With Bradley-Terry verdicts, P(win) = sigmoid(r - r'), it is the mean difference
      of the rewards if that hardly varies between comparisons, and closer to 0 if it does. It is finite where every
      comparison was won: half a prompt is added to the wins, and half a one to the losses.
    variance, kl_variance, covariance: of it, of the mean KL and of both, over prompts.
    """

    mean: float
    variance: float
    kl_variance: float
    covariance: float

    def objective(self, kl: float, beta: float) -> Rate:
        """Return E[r] - beta KL, nats, over the reference's, with its 95 % interval (delta method).

        Both parts come from the same samples, so their covariance counts.

        Args:
          kl: mean KL, nats per sequence. beta: of the loss.
        """
        value = self.mean - beta * kl
        variance = self.variance - 2 * beta * self.covariance + beta**2 * self.kl_variance
        half = NORMAL * math.sqrt(max(variance, 0.0))
        return Rate(value, value - half, value + half)


def reward(wins: Sequence[np.ndarray], kl: np.ndarray) -> Reward:
    """Return the reward that the win rate implies, see `Reward`; nan for fewer than two prompts with a verdict.

    Args:
      wins: per prompt f64[...], as for `win_rate`. kl: f64[n], of the same prompts.
    """
    shares = np.array([win_share(prompt) for prompt in wins])
    judged = ~np.isnan(shares)
    n, prompts = int(judged.sum()), len(shares)
    if n < 2:
        return Reward(math.nan, math.nan, math.nan, math.nan)
    rate = (float(shares[judged].sum()) + 0.5) / (n + 1)
    slope = n / (n + 1) / (rate * (1 - rate))
    spread = float(shares[judged].var(ddof=1))
    variance = (
        spread / n if spread else rate * (1 - rate) / n
    )  # where all are equal, that of as many coin tosses
    shared = float(np.cov(shares[judged], kl[judged])[0, 1]) / prompts
    return Reward(
        math.log(rate / (1 - rate)), slope**2 * variance, float(kl.var(ddof=1)) / prompts, slope * shared
    )


def mean_interval(per_prompt: np.ndarray) -> tuple[float, float]:
    """Return the mean of f64[n] and the half width of its 95 % interval (normal approximation); nan if empty."""
    values = per_prompt[~np.isnan(per_prompt)]
    if len(values) < 2:
        return (float(values.mean()) if len(values) else math.nan), math.nan
    return float(values.mean()), NORMAL * float(values.std(ddof=1)) / math.sqrt(len(values))


def win_share(wins: np.ndarray) -> float:
    """Return one prompt's share of comparisons won, from f64[...] with 1, 0, 0.5 a tie and nan for no verdict."""
    judged = wins[~np.isnan(wins)]
    return float(judged.mean()) if judged.size else math.nan


def win_rate(wins: Sequence[np.ndarray]) -> Rate:
    """Return the mean over prompts of their `win_share`, with Wilson's interval.

    The normal interval has no width where every comparison was won. Wilson's, of n draws from a coin, has; here n is
    the number of coin tosses that have the variance of the prompts' shares, at least the number of prompts.

    References:
      Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    shares = np.array([win_share(prompt) for prompt in wins])
    shares = shares[~np.isnan(shares)]
    n, rate = len(shares), float(shares.mean()) if len(shares) else math.nan
    if n < 2:
        return Rate(rate, math.nan, math.nan)
    variance = float(shares.var(ddof=1))
    tosses = max(n, n * rate * (1 - rate) / variance) if variance else n
    square = NORMAL**2 / tosses
    center = (rate + square / 2) / (1 + square)
    half = NORMAL * math.sqrt((rate * (1 - rate) + square / 4) / tosses) / (1 + square)
    return Rate(rate, max(center - half, 0.0), min(center + half, 1.0))


def length_controlled(wins: Sequence[np.ndarray], differences: Sequence[np.ndarray]) -> Rate:
    """Return the win rate at equal lengths, by the logistic regression of AlpacaEval 2.

    P(win) = logistic(theta + phi * tanh(d / std(d))), d the difference of the two answers' lengths; the rate is
    logistic(theta), the probability of a win at d = 0. A prompt's comparisons share a weight of one.

    Two things differ from the source. Its third term, the difficulty of each instruction, is left out, because it is
    estimated from other models' results on a fixed set of prompts. And the interval is our own: the sandwich estimate
    of theta's variance, clustered by prompt, symmetric on the scale of theta.

    Args:
      wins: per prompt f64[...], 1, 0, 0.5 a tie, nan for no verdict.
      differences: per prompt, of the same shape: characters of the first answer minus those of the second.

    Returns:
      The rate. Where all comparisons were won, or all lost, the fit does not exist, and the result is `win_rate`'s;
      where lengths never differ it is `win_rate`'s, except for the interval's shape.

    References:
      Dubois, Galambosi, Liang and Hashimoto, Length-Controlled AlpacaEval, arXiv 2404.04475, section 3.
    """
    judged = [
        (w[~np.isnan(w)], d[~np.isnan(w)])
        for w, d in zip(wins, differences, strict=True)
        if not np.isnan(w).all()
    ]
    if len(judged) < 2:
        return win_rate(wins)
    prompt = np.repeat(np.arange(len(judged)), [w.size for w, _ in judged])
    weight = 1.0 / np.array([w.size for w, _ in judged])[prompt]
    won, d = (np.concatenate(arrays) for arrays in zip(*judged, strict=True))
    if won.min() == won.max() != 0.5:
        return win_rate(wins)
    spread = d.std()
    x = np.stack([np.ones(len(d)), np.tanh(d / spread) if spread > 0 else np.zeros(len(d))], axis=-1)
    penalty = np.diag([0.0, LENGTH_PENALTY])
    beta = _minimum(x, won, weight, penalty)
    p = _logistic(x @ beta)
    curvature = (x * (weight * p * (1 - p))[:, None]).T @ x + penalty
    scores = np.zeros((len(judged), 2))
    np.add.at(scores, prompt, x * (weight * (won - p))[:, None])
    inverse = np.linalg.inv(curvature if spread > 0 else curvature + np.diag([0.0, 1.0]))
    variance = (inverse @ (scores.T @ scores) @ inverse)[0, 0] * len(judged) / (len(judged) - 1)
    half = NORMAL * math.sqrt(variance)
    return Rate(*(float(_logistic(beta[0] + at)) for at in (0.0, -half, half)))


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the number of distinct n-grams of words over that of all n-grams; nan if there are none.

    It decreases with the number of texts, so compare equally many: Li et al., arXiv 1510.03055.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def _logistic(x: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow


def _minimum(x: np.ndarray, won: np.ndarray, weight: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Minimise sum(weight * cross entropy) + b penalty b / 2, which is convex, by Newton's method with halved steps."""
    ridge = 1e-9 * np.eye(x.shape[1])  # where a column is all zeros

    def loss(b: np.ndarray) -> float:
        logits = x @ b
        return float(weight @ (np.logaddexp(0, logits) - won * logits) + b @ penalty @ b / 2)

    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = _logistic(x @ beta)
        gradient = x.T @ (weight * (p - won)) + penalty @ beta
        curvature = (x * (weight * p * (1 - p))[:, None]).T @ x + penalty + ridge
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and loss(beta - size * step) > loss(beta):
            size /= 2
        beta = beta - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    return beta
