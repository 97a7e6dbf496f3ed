"""Batches of prompts, random access by step: `batches[step]` is a function of rows, seed, size, step.

There is no iterator state to save: a run that resumes at step k asks for `batches[k]`. All processes of a
run see the global batch, for its longest prompt chooses the bucket; each takes its slice afterwards
(distributed.py). The order of an epoch is a function from place to place, so that none is laid down for a million
rows. Left out: mixing epochs in a batch, dropping the last part batch, workers (a batch is a few copies of rows that
are tokenised already, or a few dozen that are read and tokenised).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from xpo_jax.data.rows import Prompt
from xpo_jax.data.streaming import PassingPrompts
from xpo_jax.values import Prompts


class Batches:
    """Batches over epochs without end; iterating over it gives the first epoch.

    An epoch holds each prompt once, in an order of its own where there is a seed, else in the given order.
    Its last batch is filled up with padding rows.
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
        passing = isinstance(prompts, PassingPrompts)
        self._prompts = prompts
        self._lengths = (
            prompts.lengths  # type: ignore[attr-defined]
            if passing
            else np.array([len(prompt.tokens) for prompt in prompts], np.int32)
        )
        if self._lengths is not None and self._lengths.max() > buckets[-1]:
            raise ValueError(
                f"buckets: a prompt has {self._lengths.max()} tokens, the last bucket holds {buckets[-1]}"
            )
        self.batch_size = batch_size
        self.buckets = tuple(buckets)
        self.pad_id = pad_id
        self._replaced: dict[int, int] = {}
        order = grain.MapDataset.source(range(len(prompts)))
        if seed is not None:
            # each epoch anew: grain adds the epoch's number to the seed
            order = order.seed(seed).shuffle()
        self._order = order.batch(batch_size, drop_remainder=False, batch_fn=list).repeat()

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the last part batch included."""
        return -(-len(self._prompts) // self.batch_size)

    def __getitem__(self, step: int) -> Prompts:
        """The batch of a step from 0; the epoch is step // steps_per_epoch.

        Returns:
          Prompts with NumPy arrays. A padding row has no values, no messages and one pad token.

        Raises:
          IndexError: a negative step.
        """
        prompts = self._made(step)
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
            valid=np.arange(size) < len(prompts),
        )

    def __iter__(self) -> Iterator[Prompts]:
        """The first epoch: every prompt once."""
        return (self[step] for step in range(self.steps_per_epoch))

    def buckets_of(self, steps: int) -> tuple[int, ...]:
        """The buckets that the first so many steps take, rising: what has to be compiled ahead.

        Where the lengths are not known before the rows are read, all of them.
        """
        if self._lengths is None:
            return self.buckets
        # The longest of k rows is at least the k-th shortest of all: no bucket below that one's can occur.
        fewest = len(self._lengths) % self.batch_size or self.batch_size
        possible = {self._bucket(length) for length in set(np.sort(self._lengths)[fewest - 1 :].tolist())}
        seen: set[int] = set()
        for step in range(steps):
            seen.add(self._bucket(int(self._lengths[self._places(step)].max())))
            if seen == possible:  # most runs are done here after a few steps
                break
        return tuple(sorted(seen))

    def metrics(self, step: int) -> dict[str, float]:
        """How many rows of a step's batch could not be used and were replaced, where rows are read as they pass."""
        if not isinstance(self._prompts, PassingPrompts):
            return {}
        if step not in self._replaced:
            self._made(step)
        return {"data/replaced_rows": self._replaced[step]}

    def _places(self, step: int) -> list[int]:
        if step < 0:
            raise IndexError(f"step {step} is negative")
        return self._order[step]

    def _made(self, step: int) -> list[Prompt]:
        places = self._places(step)
        if not isinstance(self._prompts, PassingPrompts):
            return [self._prompts[place] for place in places]
        made = [self._prompts.made(place) for place in places]
        # of this step and the one before: what a run asks for after it has drawn a batch ahead
        self._replaced = {step - 1: self._replaced[step - 1]} if step - 1 in self._replaced else {}
        self._replaced[step] = sum(passed > 0 for _, passed in made)
        return [prompt for prompt, _ in made]

    def _bucket(self, length: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= length)


def _longest(prompts: Sequence[Prompt]) -> int:
    return max(len(prompt.tokens) for prompt in prompts)
