"""A training state for tests of checkpoints, and its comparison bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xpo_jax.checkpointing.checkpoint import CheckpointError
from xpo_jax.values import TrainState

BITS = {2: np.uint16, 4: np.uint32}


def make_state(seed=0):
    """Return a state with values whose bits are easily lost (bfloat16, -0.0, NaNs with a payload), and optax state."""
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"q": {"kernel": jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)}},
        "norm": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
        "zeros": jnp.full((4,), -0.0),
        "nans": jnp.asarray(np.array([0x7FC00001, 0xFFC12345, 1], np.uint32).view(np.float32)),
    }
    transform = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(0.0, 1.0, 10), mu_dtype=jnp.bfloat16),
    )
    state = TrainState(jnp.int32(7), np.int32(1), params, transform.init(params))
    return state._replace(opt_state=jax.tree.map(lambda x: x + x.dtype.type(3), state.opt_state))


def abstract(state, sharding=None):
    """Return a state's ShapeDtypeStructs, on one device by default."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_bits_equal(a, b):
    """Compare structures, dtypes, shapes and bits of two states."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.array_equal(x.view(BITS[x.itemsize]), y.view(BITS[y.itemsize]))


def failure(call, *arguments):
    """Return the one line of the CheckpointError that a call raises."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
