"""What is planned: the shapes of a run, from which memory and work follow."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from xpo_jax.algorithm.batch_shapes import rows_per_shard
from xpo_jax.algorithm.logps import logits_chunk
from xpo_jax.algorithm.packing import sequence_lengths
from xpo_jax.models.attention_kernels import ONLY_EINSUM, Kernels
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.lora import OFF, LoRA

from .judge import Judge


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that memory and work depend on.

    Args:
      model: the shapes of policy and reference.
      mesh: with or without devices.
      dtype: of all computation except master weights, accumulated gradients and the optimizer.
      prompt_tokens, response_tokens: P and T, the largest buckets. buckets: of prompts; each has its own programs.
      batch_size: prompts, over all devices.
      micro_batch_rows, chunk_tokens, remat, prefill_rows: see `settings.Layout`; the first two become the numbers
        that a run has, from "auto" or where a shard has fewer pairs.
      optimizer: an optax transformation. lora: which weights are trained.
      judge: None for a judge on the host.
      reference_steps: steps whose reference samples are drawn in one call. candidates: of the policy, a prompt.
      pairs: of a prompt that are learned from. ranked: whether these are chosen by implicit rewards.
      kernels: of attention, see `attention_kernels.choose`. platform: of the devices, see `sharding.platform`.
    """

    # long: a record of the config's fields

    model: ModelConfig
    mesh: Mesh | AbstractMesh
    dtype: Any
    prompt_tokens: int
    response_tokens: int
    batch_size: int
    micro_batch_rows: Any
    chunk_tokens: Any
    remat: bool
    optimizer: optax.GradientTransformation
    lora: LoRA = OFF
    judge: Judge | None = None
    reference_steps: int = 1
    candidates: int = 1
    pairs: int = 1
    ranked: bool = False
    prefill_rows: int | None = None
    kernels: Kernels = ONLY_EINSUM
    platform: str = "cpu"
    buckets: int = 1

    def __post_init__(self) -> None:
        longest = sequence_lengths(self.prompt_tokens, self.response_tokens)[-1]
        rows = rows_per_shard(
            self.micro_batch_rows, self.batch_size, self.shards, longest=longest, platform=self.platform
        )
        chunk = logits_chunk(self.chunk_tokens, self.mesh, self.model.vocab_size, self.platform)
        object.__setattr__(self, "micro_batch_rows", rows)  # the dataclass is frozen
        object.__setattr__(self, "chunk_tokens", chunk)

    @property
    def shards(self) -> int:
        """The number of shards of a batch."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the compute dtype."""
        return np.dtype(self.dtype).itemsize
