"""The second candidate of each step: the reference's samples, drawn before their step and for several steps at a time.

The reference is frozen, so what it answers to the prompts to come is known already, and one call of the sampler for
many rows costs less than a call for each step. The steps are told off in groups from the step at which the reference
became what it is: a group is a function of its step alone, so that a run which was interrupted draws the same groups
in the same shapes. The keys are of a row's own step and place: which steps share a call changes no draw, but for
rounding.

Left out on purpose: a group across a renewal of the reference, or past the last step (padding rows fill it).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.replay_buffer import Batches
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Params, Prompts, Samples


class ReferencePrefetcher:
    """The samples of one group of `programs.prefetch_depth` steps.

    Args:
      programs, batches: of the run.
      steps: of the run.
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
        self._drawn: Samples | None = None
        self._fetched: Samples | None = None

    def group(self, step: int) -> range:
        """The steps that are drawn together with this one."""
        k, since = self._programs.prefetch_depth, self._reference_step(step)
        first = since + (step - since) // k * k
        alike = [s for s in range(first, first + k) if s < self._steps and self._reference_step(s) == since]
        return range(first, first + len(alike))

    def dispatch(self, weights: Params, step: int) -> None:
        """Begin to draw the step's group, unless it is there or there is no such step; does not wait.

        Args:
          weights: of whoever draws the second candidate at that step.
        """
        if step in self._group or step >= self._steps:
            return
        self._group = self.group(step)
        prompts = [self._batches[s] for s in self._group]
        unreal = prompts[-1]._replace(valid=np.zeros_like(prompts[-1].valid))
        prompts += [unreal] * (self._programs.prefetch_depth - len(prompts))
        steps = np.repeat(self._group.start + np.arange(len(prompts)), len(unreal.valid))
        self._drawn = self._programs.draw(
            weights, together(prompts), stream=self._stream, step=steps, candidate=self._candidate
        )
        self._fetched = None

    def take(self, step: int) -> Samples:
        """The samples of a step whose group was dispatched, on the host; waits for the group."""
        if self._fetched is None:
            assert self._drawn is not None
            self._fetched, self._drawn = self._programs.fetch(self._drawn), None
        B = self._programs.batch_size
        first = self._group.index(step) * B
        return Samples(*(each[first : first + B] for each in self._fetched))


def together(prompts: list[Prompts]) -> Prompts:
    """Batches of prompts as one, as wide as the widest."""
    width = max(each.tokens.shape[1] for each in prompts)
    # whatever stands beyond a prompt's length is never read
    tokens = [np.pad(each.tokens, ((0, 0), (0, width - each.tokens.shape[1]))) for each in prompts]
    return Prompts(
        rows=tuple(row for each in prompts for row in each.rows),
        messages=tuple(messages for each in prompts for messages in each.messages),
        tokens=np.concatenate(tokens),
        lengths=np.concatenate([each.lengths for each in prompts]),
        position=np.concatenate([each.position for each in prompts]),
        valid=np.concatenate([each.valid for each in prompts]),
    )
