"""What seeds say together, with intervals of 95 %: medians and their ratios by the bootstrap, which takes runs that
never got there for what they are; and means of a few seeds by the t-distribution.

Left out: other levels, and intervals that are corrected for how many arms are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 1000


class Censored(NamedTuple):
    """Queries of each seed: at_least f64[n]; at_most f64[n], inf for a run that never got there."""

    at_least: np.ndarray
    at_most: np.ndarray


class Estimate(NamedTuple):
    """A median or a ratio of medians with its interval. Without censoring at_least and at_most are the same."""

    at_least: float
    at_most: float
    low: float
    high: float

    def __str__(self) -> str:
        form = lambda x: f"{x:.0f}" if x >= 100 else f"{x:.2g}" if x < 10 else f"{x:.3g}"  # noqa: E731
        if self.at_least == self.at_most:
            text = form(self.at_most)
        elif np.isfinite(self.at_most):
            text = f"< {form(self.at_most)}"
        else:
            text = f"> {form(self.at_least)}" if self.at_least else "-"
        return f"{text} [{form(self.low)}, {form(self.high)}]"


class Mean(NamedTuple):
    """A mean over seeds with the ends of its interval, which a single seed does not have."""

    mean: float
    low: float | None
    high: float | None


def t_interval(values: Sequence[float]) -> Mean:
    """The mean with Student's interval: mean -+ t * s / sqrt(n), t of n - 1 degrees of freedom.

    Of differences between runs of the same seeds it is the paired interval. It takes the values to be about normal,
    which win rates over hundreds of prompts are.

    Args:
      values: at least one, independent of each other.
    """
    x = np.asarray(values, float)
    if len(x) < 2:
        return Mean(float(x.mean()), None, None)
    half = float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / np.sqrt(len(x)))
    return Mean(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def reached(there: np.ndarray, queries: np.ndarray, *, sustained: bool) -> Censored:
    """Queries until a run is there.

    Args:
      there: bool[n rounds], whether it is after each round.
      queries: i[n rounds], made by then.
      sustained: from when on it is there to the end, and not for the first time.
    """
    if sustained:
        there = np.logical_and.accumulate(there[:, ::-1], axis=1)[:, ::-1]
    at = queries[np.arange(len(there)), there.argmax(axis=1)].astype(float)
    ever = there.any(axis=1)
    return Censored(np.where(ever, at, queries[:, -1]), np.where(ever, at, np.inf))


def median(x: Censored) -> Estimate:
    """The median over seeds with its percentile bootstrap interval."""
    return _estimate(lambda i: (np.median(x.at_least[i], -1), np.median(x.at_most[i], -1)), len(x.at_least))


def ratio(base: Censored, other: Censored) -> Estimate:
    """median(base) / median(other) with its interval, of the same seeds in both.

    Where a median is censored, the least and the most that the ratio can be are kept apart.
    """

    def medians(i: np.ndarray) -> tuple[Any, Any]:
        least = np.median(base.at_least[i], -1) / np.median(other.at_most[i], -1)
        return least, np.median(base.at_most[i], -1) / np.median(other.at_least[i], -1)

    return _estimate(medians, len(base.at_least))


def _estimate(of: Callable[[np.ndarray], tuple[Any, Any]], n: int) -> Estimate:
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    least, most = of(np.arange(n))
    lows, highs = of(drawn)
    low = np.quantile(lows, 0.025, method="lower")  # these methods never interpolate towards inf
    return Estimate(*map(float, (least, most, low, np.quantile(highs, 0.975, method="higher"))))
