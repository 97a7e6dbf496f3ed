"""A judge that is a model on the devices, as the planner sees it."""

from __future__ import annotations

from typing import NamedTuple

from xpo_jax.models.family import ModelConfig


class Judge(NamedTuple):
    """The shapes of a judge's programs.

    Attributes:
      model: its shape; None if it uses the policy's initial weights, which the reference holds.
      rows, tokens: of a call, over all devices, and in the longest bucket.
      comparisons: per prompt, at most; each vote is one.
      new_tokens: that it writes before its verdict; 0 for a judge that reads probabilities.
      buckets: lengths that it is compiled for.
    """

    model: ModelConfig | None
    rows: int
    tokens: int
    comparisons: int
    new_tokens: int = 0
    buckets: int = 1
