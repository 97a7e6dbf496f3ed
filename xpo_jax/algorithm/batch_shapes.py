"""The shapes of a run's batches, from which the programs of a run follow."""

from __future__ import annotations

import dataclasses

SAMPLERS = ("sample", "ahead", "candidates")  # the names of the sampler's programs, see `BatchShapes.sampled`


def rows_per_shard(micro_batch_rows: int, batch_size: int, shards: int) -> int:
    """Return the rows of a micro-batch on each shard: no more than the shard's pairs, which take a row each at most."""
    return min(micro_batch_rows, batch_size // shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShapes:
    """The shapes that a run's programs are compiled for.

    Args:
      batch_size: B, prompts per step, over all devices.
      prompt_buckets: the lengths P that prompts are padded to, increasing.
      micro_batch_rows, chunk_tokens, prefill_rows: see `settings.Layout`.
      prefetch_depth: batches that one call of the sampler may take, besides single ones, see prefetch.py.
      candidates: samples of a prompt that one call of the sampler may draw, besides single ones, see pairing.py.
    """

    batch_size: int
    prompt_buckets: tuple[int, ...]
    micro_batch_rows: int
    chunk_tokens: int
    prefetch_depth: int = 1
    prefill_rows: int | None = None
    candidates: int = 1

    @property
    def sampled(self) -> dict[str, tuple[int, int]]:
        """Prompts and candidates of a call, by the name of each program of the sampler."""
        calls = {"sample": (self.batch_size, 1)}
        if self.prefetch_depth > 1:
            calls["ahead"] = (self.batch_size * self.prefetch_depth, 1)
        if self.candidates > 1:
            calls["candidates"] = (self.batch_size, self.candidates)
        return calls
