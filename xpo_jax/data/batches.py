"""Batches of prompts with random access by step: `batches[step]` depends only on rows, seed, batch size and step.

There is no iterator state to save: a run that resumes at step k reads `batches[k]`. Every process of a run sees the
global batch, because its longest prompt selects the bucket; each takes its slice afterwards (runtime/distributed.py).
An epoch's order is a function from position to row, so no permutation of a million rows is ever stored.

Left out on purpose: batches that span two epochs, dropping the last partial batch, and worker processes (a batch
copies a few tokenised rows, or reads and tokenises a few dozen).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from xpo_jax.data.rows import Prompt
from xpo_jax.data.streaming import StreamingPrompts
from xpo_jax.values import Prompts

# A run reads a step's batch several times: for prefetching up to `layout.reference_steps` steps ahead, in the step, and
# for its metrics. More steps than these in one prefetch would be tokenised again.
RECENT_STEPS = 64


class Batches:
    """Batches over an endless sequence of epochs; iterating gives the first epoch.

    An epoch holds each prompt once: in an order of its own if there is a seed, otherwise in the prompts' order. Its
    last batch is filled up with padding rows.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        buckets: Sequence[int],
        pad_id: int,
        seed: int | None,
    ):
        """Set the order of the batches; nothing is copied yet.

        Args:
          prompts: at least one, none longer than the last bucket.
          batch_size: rows of the global batch, B.
          buckets: padded prompt lengths, tokens, increasing; a batch takes the first that holds its longest prompt.
          pad_id: the token that fills a prompt up on the right.
          seed: of the shuffled order, 0 to 2^32 - 1; None keeps the prompts' order.

        Raises:
          ValueError: no prompts, a batch size below 1, a prompt longer than every bucket, a seed out of range.
        """
        if not prompts:
            raise ValueError("there are no prompts to make batches of")
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        if seed is not None and not 0 <= seed < 2**32:
            raise ValueError(f"seed: must be from 0 to {2**32 - 1}, got {seed}")
        self._prompts = prompts
        self._lengths = (
            prompts.lengths
            if isinstance(prompts, StreamingPrompts)
            else np.array([len(prompt.tokens) for prompt in prompts], np.int32)
        )
        if self._lengths is not None and self._lengths.max() > buckets[-1]:
            raise ValueError(
                f"buckets: a prompt has {self._lengths.max()} tokens, the last bucket holds {buckets[-1]}"
            )
        self.batch_size = batch_size
        self.buckets = tuple(buckets)
        self.pad_id = pad_id
        self._recent: dict[int, list[tuple[Prompt, int]]] = {}  # by step, of streaming prompts
        order = grain.MapDataset.source(range(len(prompts)))
        if seed is not None:
            # grain adds the epoch's number to the seed, so each epoch is shuffled differently
            order = order.seed(seed).shuffle()
        self._order = order.batch(batch_size, drop_remainder=False, batch_fn=list).repeat()

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, including the last partial batch."""
        return -(-len(self._prompts) // self.batch_size)

    def __getitem__(self, step: int) -> Prompts:
        """Return the batch of a step, counted from 0; its epoch is step // steps_per_epoch.

        Returns:
          Prompts with NumPy arrays. A padding row has no values, no messages and one pad token.

        Raises:
          IndexError: a negative step.
          DataError: streaming prompts met a row that ends the run.
        """
        prompts = self._read(step)
        size, bucket = self.batch_size, self._bucket(max(len(prompt.tokens) for prompt in prompts))
        tokens = np.full((size, bucket), self.pad_id, np.int32)
        lengths = np.ones(size, np.int32)  # one pad token: an empty prompt would have no last position
        for i, prompt in enumerate(prompts):
            lengths[i] = len(prompt.tokens)
            tokens[i, : lengths[i]] = prompt.tokens
        padding = size - len(prompts)
        return Prompts(
            rows=tuple(prompt.row.values for prompt in prompts) + ({},) * padding,
            messages=tuple(prompt.messages for prompt in prompts) + ((),) * padding,
            tokens=tokens,
            lengths=lengths,
            position=np.arange(size, dtype=np.int32),
            valid=np.arange(size) < len(prompts),
        )

    def __iter__(self) -> Iterator[Prompts]:
        """Iterate over the first epoch: every prompt once."""
        return (self[step] for step in range(self.steps_per_epoch))

    def buckets_used(self, steps: int) -> tuple[int, ...]:
        """Return the buckets that the first `steps` batches take, increasing: these are compiled at start-up.

        Where prompt lengths are unknown until the rows are read, these are all buckets.
        """
        if self._lengths is None:
            return self.buckets
        # The longest of k rows is at least the k-th shortest of all: no smaller bucket than that one's can occur.
        fewest = len(self._lengths) % self.batch_size or self.batch_size
        possible = {self._bucket(length) for length in set(np.sort(self._lengths)[fewest - 1 :].tolist())}
        seen: set[int] = set()
        for step in range(steps):
            seen.add(self._bucket(int(self._lengths[self._indices(step)].max())))
            if seen == possible:  # most runs stop here after a few steps
                break
        return tuple(sorted(seen))

    def metrics(self, step: int) -> dict[str, float]:
        """Count the rows of a step's batch that were unusable and replaced; empty unless prompts are streamed."""
        if not isinstance(self._prompts, StreamingPrompts):
            return {}
        return {"data/replaced_rows": sum(skipped > 0 for _, skipped in self._stream(step, self._prompts))}

    def _indices(self, step: int) -> list[int]:
        if step < 0:
            raise IndexError(f"step {step} is negative")
        return self._order[step]

    def _read(self, step: int) -> list[Prompt]:
        if not isinstance(self._prompts, StreamingPrompts):
            return [self._prompts[index] for index in self._indices(step)]
        return [prompt for prompt, _ in self._stream(step, self._prompts)]

    def _stream(self, step: int, prompts: StreamingPrompts) -> list[tuple[Prompt, int]]:
        """Read and tokenise the prompts of a step, unless that was done recently; see `StreamingPrompts.read`."""
        if step not in self._recent:
            while len(self._recent) >= RECENT_STEPS:
                del self._recent[next(iter(self._recent))]  # dicts keep the order of insertion
            self._recent[step] = [prompts.read(index) for index in self._indices(step)]
        return self._recent[step]

    def _bucket(self, length: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= length)
