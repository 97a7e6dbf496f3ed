"""The shapes of a run's batches, from which the programs of a run follow."""

from __future__ import annotations

import dataclasses
from typing import Literal

Auto = Literal["auto"]

# Slots per device of a micro-batch, with "auto". On an accelerator with FSDP a micro-batch gathers each layer's
# weights, two bytes each, in every pass, and computes two FLOPs with each of them per slot. That hides the gathering
# from FLOPs / bandwidth of the links on: 2,200 slots with 197 TFLOP/s and 90 GB/s (TPU v5e), or 990 and 450 (H100). On
# a CPU larger matmuls gain little, and caches are small: docs/performance.md.
_SLOTS = {"cpu": 768}
_SLOTS_OF_ACCELERATORS = 2560
# Rows per device of a call that draws the reference's samples for several steps, with "auto", and the most steps. With
# fewer rows, reading the weights takes most of a decoded token's time.
_REFERENCE_ROWS, _MOST_REFERENCE_STEPS = 32, 8

SAMPLERS = ("sample", "ahead", "candidates")  # the names of the sampler's programs, see `BatchShapes.sampled`


def rows_per_shard(
    micro_batch_rows: int | Auto, batch_size: int, shards: int, *, longest: int, platform: str
) -> int:
    """Return the rows of a micro-batch on each shard: no more than the shard's pairs, which take a row each at most.

    Args:
      micro_batch_rows, batch_size: see `BatchShapes`.
      shards: that the rows are divided into.
      longest: slots of the longest row.
      platform: of the devices, see `sharding.platform`.
    """
    if micro_batch_rows == "auto":
        rows = max(1, _SLOTS.get(platform, _SLOTS_OF_ACCELERATORS) // longest)
    else:
        rows = micro_batch_rows
    return min(rows, batch_size // shards)


def steps_per_call(reference_steps: int | Auto, batch_size: int, shards: int, renewed: int | None) -> int:
    """Return for how many steps one call draws the reference's samples.

    Args:
      reference_steps: see `settings.Layout`.
      batch_size, shards: prompts per step, and the shards that they are divided into.
      renewed: steps after which the policy becomes the reference, which ends a call's steps, or None.
    """
    if isinstance(reference_steps, int):
        return reference_steps
    steps = -(-_REFERENCE_ROWS * shards // batch_size)
    return max(1, min(steps, _MOST_REFERENCE_STEPS, renewed or steps))


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
    micro_batch_rows: int | Auto
    chunk_tokens: int | Auto
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
