"""The programs of a run of the tiny model, declared and not compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from fake_models import TINY
from tiny_run import ADAMW

from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.losses import LossFn, Sigmoid
from xpo_jax.algorithm.model_spec import make_model_spec
from xpo_jax.algorithm.optimizer import Optimizer, make_optimizer
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import Vocabulary
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.models.lora import OFF, LoRA
from xpo_jax.runtime import sharding

PLAIN = {
    "max_new_tokens": 8,
    "temperature": 0.9,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


def tiny_programs(
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    sampling: Mapping[str, Any] = PLAIN,
    optimizer: Optimizer | None = None,
    loss: LossFn | None = None,
    entropy_weight: float = 0.0,
    lora: LoRA = OFF,
    sizes: tuple[int, int, int] = (2, 2, 2),
) -> Programs:
    """Return the programs of a run with batches of eight and prompts of eight tokens, on the first devices."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.mesh_over(devices, **dict(zip(sharding.AXES, sizes, strict=True)))
    return Programs(
        make_model_spec(mesh, TINY, dtype=dtype, remat=remat, batch_size=8, prompt_tokens=8, lora=lora),
        BatchShapes(batch_size=8, prompt_buckets=(8,), micro_batch_rows=1, chunk_tokens=32, prefetch_depth=2),
        CandidateSampling(**sampling),
        Vocabulary(36, (1, 2), 0),
        optimizer=optimizer or make_optimizer(**ADAMW, steps=4),
        loss=loss or Sigmoid(bonus_clip=5.0),
        entropy_weight=entropy_weight,
        seed=0,
    )
