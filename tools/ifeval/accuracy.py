"""IFEval's two accuracies, with intervals over prompts.

Prompt-level: the fraction of prompts all of whose instructions are followed. Instruction-level: the fraction of
instructions that are followed; those of one prompt are answered by one text, so its interval is clustered by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.evaluation import statistics
from xpo_jax.evaluation.statistics import NORMAL, Rate

Followed = Sequence[Sequence[bool]]  # one entry for each instruction of each prompt


class Accuracy(NamedTuple):
    """Both accuracies of one model, strict, with their intervals of 95 %."""

    prompts: Rate
    instructions: Rate


def accuracy(runs: Sequence[Followed]) -> Accuracy:
    """Return the accuracies, means over runs of what the same prompts were answered.

    The interval of the prompts' is Wilson's, that of the instructions' the normal one; a prompt's answers in all runs
    are one observation.
    """
    prompts = [np.array([float(all(run[i])) for run in runs]) for i in range(len(runs[0]))]
    return Accuracy(statistics.win_rate(prompts), _ratio(_followed(runs), [len(row) for row in runs[0]]))


def gain(before: Followed, runs: Sequence[Followed]) -> Accuracy:
    """Return what the runs gained over the answers before, with normal intervals of the paired differences."""
    prompts = [np.mean([all(run[i]) for run in runs]) - all(row) for i, row in enumerate(before)]
    instructions = np.array(_followed(runs)) - _followed([before])
    return Accuracy(_ratio(prompts, [1] * len(before)), _ratio(instructions, [len(row) for row in before]))


def _followed(runs: Sequence[Followed]) -> list[float]:
    """Return how many of each prompt's instructions are followed, means over runs."""
    return [float(np.mean([sum(run[i]) for run in runs])) for i in range(len(runs[0]))]


def _ratio(numerators: Sequence[Any] | np.ndarray, denominators: Sequence[int]) -> Rate:
    """Return sum / sum with the normal interval of a ratio whose clusters are independent.

    References:
      Cochran, Sampling Techniques (1977), section 2.11.
    """
    x, n = np.array(numerators, float), np.array(denominators, float)
    rate = float(x.sum() / n.sum())
    residuals = x - rate * n
    half = NORMAL * math.sqrt(len(x) / (len(x) - 1) * float(residuals @ residuals)) / float(n.sum())
    return Rate(rate, rate - half, rate + half)
