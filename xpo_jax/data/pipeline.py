"""Batches of prompts, random access by step: `batches[step]` is a function of rows, seed, size, step.

There is no iterator state to save: a run that resumes at step k asks for `batches[k]`. All processes of a
run hold all prompts and see the global batch, for its longest prompt chooses the bucket; each takes its slice
afterwards (distributed.py). Left out: mixing epochs in a batch, dropping the last part batch, workers (a batch is a few
copies of rows that are tokenised already).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from xpo_jax.data.rows import Prompt
from xpo_jax.values import Prompts


class Batches:
    """Batches over epochs without end; iterating over it gives the first epoch.

    An epoch holds each prompt once, in an order of its own where there is a seed, else in the given order.
    Its last batch is filled up with rows that are not real.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        buckets: Sequence[int],
        pad_id: int,
        seed: int | None,
    ):
        """Lays the order of the batches down; nothing is copied yet.

        Args:
          prompts: at least one, none longer than the last bucket.
          batch_size: rows of the global batch, B.
          buckets: padded lengths, tokens, rising; a batch takes the first that holds its longest prompt.
          pad_id: the token on the right of each prompt.
          seed: of the order, 0 to 2^32 - 1; None keeps the prompts' order.

        Raises:
          ValueError: no prompts, no batch size, a prompt that no bucket holds, a seed out of range.
        """
        if not prompts:
            raise ValueError("there are no prompts to make batches of")
        if batch_size < 1:
            raise ValueError(f"batch_size: at least 1 is expected, found {batch_size}")
        if seed is not None and not 0 <= seed < 2**32:
            raise ValueError(f"seed: 0 to {2**32 - 1} is expected, found {seed}")
        if _longest(prompts) > buckets[-1]:
            raise ValueError(
                f"buckets: a prompt has {_longest(prompts)} tokens, the last bucket holds {buckets[-1]}"
            )
        self.batch_size = batch_size
        self.buckets = tuple(buckets)
        self.pad_id = pad_id
        self._lengths = [len(prompt.tokens) for prompt in prompts]
        order = grain.MapDataset.source(prompts)
        if seed is not None:
            # each epoch anew: grain adds the epoch's number to the seed
            order = order.seed(seed).shuffle()
        self._rows = order.batch(batch_size, drop_remainder=False, batch_fn=list).repeat()

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the last part batch included."""
        return -(-len(self._lengths) // self.batch_size)

    def __getitem__(self, step: int) -> Prompts:
        """The batch of a step from 0; the epoch is step // steps_per_epoch.

        Returns:
          Prompts with NumPy arrays. A row that is not real has no values, no messages and one pad token.

        Raises:
          IndexError: a negative step.
        """
        prompts = self._step(step)
        size, bucket = self.batch_size, self._bucket(_longest(prompts))
        tokens = np.full((size, bucket), self.pad_id, np.int32)
        lengths = np.ones(size, np.int32)  # one pad token: an empty prompt would have no last position
        for i, prompt in enumerate(prompts):
            lengths[i] = len(prompt.tokens)
            tokens[i, : lengths[i]] = prompt.tokens
        unreal = size - len(prompts)
        return Prompts(
            rows=tuple(prompt.row.values for prompt in prompts) + ({},) * unreal,
            messages=tuple(prompt.messages for prompt in prompts) + ((),) * unreal,
            tokens=tokens,
            lengths=lengths,
            position=np.arange(size, dtype=np.int32),
            real=np.arange(size) < len(prompts),
        )

    def __iter__(self) -> Iterator[Prompts]:
        """The first epoch: every prompt once."""
        return (self[step] for step in range(self.steps_per_epoch))

    def buckets_of(self, steps: int) -> tuple[int, ...]:
        """The buckets that the first so many steps take, rising: what has to be compiled ahead."""
        # The longest of k rows is at least the k-th shortest of all: no bucket below that one's can occur.
        fewest = len(self._lengths) % self.batch_size or self.batch_size
        possible = {self._bucket(length) for length in sorted(self._lengths)[fewest - 1 :]}
        seen: set[int] = set()
        for step in range(steps):
            seen.add(self._bucket(_longest(self._step(step))))
            if seen == possible:  # most runs are done here after a few steps
                break
        return tuple(sorted(seen))

    def _step(self, step: int) -> list[Prompt]:
        if step < 0:
            raise IndexError(f"step {step} is negative")
        return self._rows[step]

    def _bucket(self, length: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= length)


def _longest(prompts: Sequence[Prompt]) -> int:
    return max(len(prompt.tokens) for prompt in prompts)
