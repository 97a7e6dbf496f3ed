"""Every program of a run is traced without implicit promotion: no array is widened in rank or dtype unnoticed."""

import jax
import jax.numpy as jnp
import pytest
from fake_programs import PLAIN, tiny_programs
from tiny_run import ADAFACTOR, ADAMW

from xpo_jax.algorithm.losses import IPO, Sigmoid
from xpo_jax.algorithm.optimizer import make_optimizer

TRUNCATED = PLAIN | {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("dtype", "loss", "sampling", "optimizer"),
    [
        (jnp.float32, Sigmoid, PLAIN, ADAMW | {"mu_dtype": "bfloat16"}),
        (jnp.bfloat16, IPO, TRUNCATED, ADAFACTOR),
    ],
)
def test_programs_are_traced_without_implicit_promotion(dtype, loss, sampling, optimizer):
    programs = tiny_programs(
        dtype=dtype,
        remat=True,
        sampling=sampling,
        optimizer=make_optimizer(**optimizer, steps=4),
        loss=loss(bonus_clip=5.0),
        entropy_weight=0.1,
    )
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        lowered = [declared.program.lower(*declared.arguments) for declared in programs._declared()]
    assert len(lowered) == len(programs.declared_programs())
