"""95 % intervals over seeds: of medians and their ratios by the bootstrap, and of means by the t-distribution.

The bootstrap takes censored runs, which never reached the goal, into account.

Left out on purpose: other levels, and corrections for the number of arms that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 1000


class Censored(NamedTuple):
    """Bounds on the queries of each seed: at_least f64[n]; at_most f64[n], inf if the run never reached the goal."""

    at_least: np.ndarray
    at_most: np.ndarray


class Estimate(NamedTuple):
    """A median or a ratio of medians with its interval. Without censoring, at_least and at_most are equal."""

    at_least: float
    at_most: float
    low: float
    high: float

    def __str__(self) -> str:
        def form(x: float) -> str:
            return f"{x:.0f}" if x >= 100 else f"{x:.2g}" if x < 10 else f"{x:.3g}"

        if self.at_least == self.at_most:
            text = form(self.at_most)
        elif np.isfinite(self.at_most):
            text = f"< {form(self.at_most)}"
        else:
            text = f"> {form(self.at_least)}" if self.at_least else "-"
        return f"{text} [{form(self.low)}, {form(self.high)}]"


class Mean(NamedTuple):
    """A mean over seeds with the bounds of its interval; they are None for a single seed."""

    mean: float
    low: float | None
    high: float | None


def t_interval(values: Sequence[float]) -> Mean:
    """Return the mean with Student's interval: mean -+ t * s / sqrt(n), with t of n - 1 degrees of freedom.

    For differences between runs of the same seeds this is the paired interval. It assumes that the values are roughly
    normal, which win rates over hundreds of prompts are.

    Args:
      values: at least one, independent of each other.
    """
    x = np.asarray(values, float)
    if len(x) < 2:
        return Mean(float(x.mean()), None, None)
    half = float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / np.sqrt(len(x)))
    return Mean(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def reached(at_goal: np.ndarray, queries: np.ndarray, *, sustained: bool) -> Censored:
    """Return the queries until each run reaches the goal.

    Args:
      at_goal: bool[n rounds], whether the run is at the goal after each round.
      queries: i[n rounds], made by then.
      sustained: count until the run stays at the goal to the end, instead of until it first reaches it.
    """
    if sustained:
        at_goal = np.logical_and.accumulate(at_goal[:, ::-1], axis=1)[:, ::-1]
    at = queries[np.arange(len(at_goal)), at_goal.argmax(axis=1)].astype(float)
    ever = at_goal.any(axis=1)
    return Censored(np.where(ever, at, queries[:, -1]), np.where(ever, at, np.inf))


def median(x: Censored) -> Estimate:
    """Return the median over seeds with its percentile bootstrap interval."""
    return _estimate(lambda i: (np.median(x.at_least[i], -1), np.median(x.at_most[i], -1)), len(x.at_least))


def ratio(base: Censored, other: Censored) -> Estimate:
    """Return median(base) / median(other) with its interval; both have the same seeds.

    Where a median is censored, the least and the greatest possible ratio differ.
    """

    def medians(i: np.ndarray) -> tuple[Any, Any]:
        least = np.median(base.at_least[i], -1) / np.median(other.at_most[i], -1)
        return least, np.median(base.at_most[i], -1) / np.median(other.at_least[i], -1)

    return _estimate(medians, len(base.at_least))


def _estimate(bounds: Callable[[np.ndarray], tuple[Any, Any]], n: int) -> Estimate:
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    least, most = bounds(np.arange(n))
    lows, highs = bounds(drawn)
    low = np.quantile(lows, 0.025, method="lower")  # these methods never interpolate towards inf
    return Estimate(*map(float, (least, most, low, np.quantile(highs, 0.975, method="higher"))))
