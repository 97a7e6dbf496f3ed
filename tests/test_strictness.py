"""Every program of a run is traced without implicit promotion: no array is widened in rank or dtype unnoticed."""

import fake_models
import jax
import jax.numpy as jnp
import pytest
from tiny_run import ADAFACTOR, ADAMW

from xpo_jax.algorithm.losses import IPO, Sigmoid
from xpo_jax.algorithm.model_spec import make_model_spec
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.programs import BatchShapes, Programs
from xpo_jax.algorithm.sampler import Sampling, Vocabulary
from xpo_jax.runtime import sharding

PLAIN = {
    "max_new_tokens": 8,
    "temperature": 0.9,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
TRUNCATED = PLAIN | {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("dtype", "loss", "sampling", "optimizer"),
    [
        (jnp.float32, Sigmoid, PLAIN, ADAMW | {"mu_dtype": "bfloat16"}),
        (jnp.bfloat16, IPO, TRUNCATED, ADAFACTOR),
    ],
)
def test_programs_are_traced_without_implicit_promotion(dtype, loss, sampling, optimizer):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spec = make_model_spec(mesh, fake_models.TINY, dtype=dtype, remat=True, batch_size=8, prompt_tokens=8)
    programs = Programs(
        spec,
        BatchShapes(batch_size=8, prompt_buckets=(8,), micro_batch_rows=1, chunk_tokens=32, prefetch_depth=2),
        Sampling(**sampling),
        Vocabulary(36, (1, 2), 0),
        optimizer=make_optimizer(**optimizer, steps=4),
        loss=loss(bonus_clip=5.0),
        entropy_weight=0.1,
        seed=0,
    )
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        lowered = [declared.program.lower(*declared.arguments) for declared in programs._declared()]
    assert len(lowered) == len(programs.declared_programs())
