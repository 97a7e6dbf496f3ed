"""Turn the scores of two answers into the probability that the first one is better."""

from __future__ import annotations

import math


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)), without overflow.

    Written with tanh rather than taken from scipy.special.expit: the two differ in the last bits, and every logged
    verdict was computed by this formula.
    """
    return 0.5 + 0.5 * math.tanh(x / 2)


def win_probability(a: float, b: float, temperature: float) -> float:
    """Return sigmoid((a - b) / temperature); at temperature 0 the higher score wins. Equal scores give 0.5."""
    if a == b:
        return 0.5
    if temperature == 0:
        return float(a > b)
    return sigmoid((a - b) / temperature)
