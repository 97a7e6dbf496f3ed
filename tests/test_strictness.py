"""No array is widened in rank or dtype unnoticed, or moved between host and devices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_programs import PLAIN, tiny_programs
from tiny_run import ADAFACTOR, ADAMW, changed_config, run_name

from xpo_jax.algorithm.losses import IPO, Sigmoid
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.experiment import startup

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


def test_a_pass_over_unrolled_layers_is_traced_and_lowered_once_for_all_of_them():
    """What a start takes depends on it: 30 s instead of 9 at the shapes of Qwen2.5-0.5B."""
    declared = {d.label.split()[0]: d for d in tiny_programs()._declared()}
    for name, stages in (("score", 1), ("sample", 2)):  # prefill, and a decode loop per number of rows
        program = declared[name]
        text = program.program.lower(*program.arguments).as_text()
        assert text.count("func.func private @layer") == stages, name


def test_loop_transfers_nothing_implicitly(one_device, tmp_path, monkeypatch):
    """With replayed updates, evaluations and checkpoints: only `distributed.put` and fetches move arrays."""
    open_session = startup.open_session

    @contextlib.contextmanager
    def open_guarded(*args, **options):
        with open_session(*args, **options) as session, jax.transfer_guard("disallow"):
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                jnp.sin(np.ones(3))
            yield session

    monkeypatch.setattr(startup, "open_session", open_guarded)
    often = {"evaluation__every_steps": 1, "checkpoint__every_steps": 1, "replay__updates": 2}
    status, _, err = run_name(tmp_path, "run", changed_config(tmp_path, steps=2, **often))
    assert status == 0, err
