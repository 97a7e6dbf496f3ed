"""The second candidate of each step, sampled before its step and for several steps at a time.

The reference is frozen, so its samples for the prompts to come can be drawn early, and one call of the sampler for many
rows costs less than one call per step. Steps are divided into groups, starting at the step where the reference was last
updated. A group depends on its steps alone, so a resumed run samples the same groups in the same shapes. Random keys
are those of a row's own step and position: grouping changes no draw, except through rounding.

Left out on purpose: groups that span an update of the reference or the last step (padding rows fill them up).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from xpo_jax.algorithm.programs import Programs
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Params, Prompts, Samples


class Batches(Protocol):
    """The prompts of a run by step, see data/batches.py."""

    def __getitem__(self, step: int, /) -> Prompts: ...


class ReferencePrefetcher:
    """The samples of one group of `prefetch_depth` steps.

    Args:
      programs, batches: of the run.
      steps: number of steps of the run.
      reference_step: see `settings.Model`.
      stream, candidate: of the random keys.
    """

    def __init__(
        self,
        programs: Programs,
        batches: Batches,
        steps: int,
        reference_step: Callable[[int], int],
        *,
        stream: Stream,
        candidate: int,
    ):
        self._programs, self._batches, self._steps = programs, batches, steps
        self._reference_step, self._stream, self._candidate = reference_step, stream, candidate
        self._group = range(0)
        self._sampled: Samples | None = None
        self._fetched: Samples | None = None

    def group(self, step: int) -> range:
        """Return the steps that are sampled in one call with this one."""
        depth, since = self._programs.shapes.prefetch_depth, self._reference_step(step)
        first = since + (step - since) // depth * depth
        same_reference = [
            s for s in range(first, first + depth) if s < self._steps and self._reference_step(s) == since
        ]
        return range(first, first + len(same_reference))

    def dispatch(self, weights: Params, step: int) -> None:
        """Dispatch the sampler for the step's group, unless that was done or there is no such step; does not wait.

        Args:
          weights: of the model that samples the second candidate at that step.
        """
        if step in self._group or step >= self._steps:
            return
        self._group = self.group(step)
        prompts = [self._batches[s] for s in self._group]
        padding = prompts[-1]._replace(valid=np.zeros_like(prompts[-1].valid))
        prompts += [padding] * (self._programs.shapes.prefetch_depth - len(prompts))
        steps = np.repeat(self._group.start + np.arange(len(prompts)), len(padding.valid))
        self._sampled = self._programs.sample(
            weights, concat_batches(prompts), stream=self._stream, step=steps, candidate=self._candidate
        )
        self._fetched = None

    def take(self, step: int) -> Samples:
        """Wait for the group of a dispatched step, and return the step's samples on the host."""
        if self._fetched is None:
            assert self._sampled is not None
            self._fetched, self._sampled = self._programs.fetch(self._sampled), None
        B = self._programs.shapes.batch_size
        first = self._group.index(step) * B
        return Samples(*(x[first : first + B] for x in self._fetched))


def concat_batches(prompts: list[Prompts]) -> Prompts:
    """Concatenate batches of prompts, padded to the longest."""
    width = max(batch.tokens.shape[1] for batch in prompts)
    # tokens beyond a prompt's length are never read
    tokens = [np.pad(batch.tokens, ((0, 0), (0, width - batch.tokens.shape[1]))) for batch in prompts]
    return Prompts(
        rows=tuple(row for batch in prompts for row in batch.rows),
        messages=tuple(messages for batch in prompts for messages in batch.messages),
        tokens=np.concatenate(tokens),
        lengths=np.concatenate([batch.lengths for batch in prompts]),
        position=np.concatenate([batch.position for batch in prompts]),
        valid=np.concatenate([batch.valid for batch in prompts]),
    )
