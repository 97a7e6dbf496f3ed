"""Optimizers and learning rates against float64 NumPy, and against optax called directly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from xpo_jax.algorithm.optimizer import make_optimizer

ADAMW = {**tiny_run.ADAMW, "steps": 10}
ADAFACTOR = {**tiny_run.ADAFACTOR, "steps": 10}
# A matrix that Adafactor factors, one that is too small for that, and parameters without weight decay.
SHAPES = {"up": {"kernel": (128, 256)}, "down": {"kernel": (6, 4), "bias": (4,)}, "norm": {"scale": (5,)}}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(scale=scale, size=shape).astype(np.float32)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def trained(optimizer, gradients):
    """Return parameters and optimizer state after one update with each of the gradients."""
    params = tree(0)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("warmup", [2, 2.0, 0.2, 0.24])
@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        ("constant", 1e-2, 1e-2),
        ("linear", 5e-3, 1e-2 / 8),
        ("cosine", 5e-3, 1e-2 * (1 + np.cos(np.pi * 7 / 8)) / 2),
    ],
)
def test_learning_rates(schedule, middle, last, warmup):
    """Two steps of ten are warm-up, given as a number or as a fraction; the decay would reach 0 after the last."""
    _, rate = make_optimizer(**{**ADAMW, "schedule": schedule, "warmup_steps": warmup})
    assert [float(rate(s)) for s in (0, 1, 2, 6, 9)] == pytest.approx(
        [5e-3, 1e-2, 1e-2, middle, last], rel=1e-5
    )


def test_adamw_against_float64():
    """Three updates, one below the clipping norm and two above it, with warm-up, cosine and weight decay."""
    settings = {"schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "clip_norm": 3.0, "eps": 1e-3}
    gradients = [tree(1, 1e-3), tree(2), tree(3, 10.0)]
    params, _ = trained(make_optimizer(**{**ADAMW, **settings})[0], gradients)

    wide = lambda values: {path: np.float64(x) for path, x in jax.tree.leaves_with_path(values)}
    expected = wide(tree(0))
    mu, nu = (dict.fromkeys(expected, 0.0) for _ in range(2))
    for t, (grads, rate) in enumerate(zip(map(wide, gradients), (5e-3, 1e-2, 1e-2), strict=True), 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for path, g in grads.items():
            g = g * min(1.0, 3.0 / norm)
            mu[path] = 0.9 * mu[path] + 0.1 * g
            nu[path] = 0.99 * nu[path] + 0.01 * g**2
            step = (mu[path] / (1 - 0.9**t)) / (np.sqrt(nu[path] / (1 - 0.99**t)) + 1e-3)
            decay = 0.1 * expected[path] if path[-1].key == "kernel" else 0.0
            expected[path] = expected[path] - rate * (step + decay)
    for path, ours in wide(params).items():
        np.testing.assert_allclose(ours, expected[path], rtol=2e-6, atol=2e-6)


def test_adafactor_is_optax_adafactor():
    gradients = [tree(1, 1e-3), tree(2), tree(3, 10.0)]
    optimizer, rate = make_optimizer(**{**ADAFACTOR, "schedule": "linear", "warmup_steps": 2})
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adafactor(rate, multiply_by_parameter_scale=False)
    )
    ours, state = trained(optimizer, gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        ours,
        trained(reference, gradients)[0],
    )
    factored = optax.tree.get(state, "v_row")["up"]["kernel"], optax.tree.get(state, "v_col")["up"]["kernel"]
    assert [x.shape for x in factored] == [(128,), (256,)]
    moved = np.asarray(ours["up"]["kernel"]) - tree(0)["up"]["kernel"]
    assert 0.01 < np.sqrt((moved**2).mean()) < 0.03  # learning rates of 0.005, 0.01 and 0.01, not of 1


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s["name"])
def test_weight_decay_is_times_the_learning_rate_and_spares_biases_and_norms(settings):
    optimizer, _ = make_optimizer(**{**settings, "weight_decay": 0.5})
    params, _ = trained(optimizer, [jax.tree.map(np.zeros_like, tree(0))])
    for path, before in jax.tree.leaves_with_path(tree(0)):
        factor = 1 - 0.01 * 0.5 if path[-1].key == "kernel" else 1.0
        after = params[path[0].key][path[1].key]
        np.testing.assert_allclose(after, factor * before, rtol=1e-6)


def test_first_moments_in_bfloat16():
    gradients = [tree(1, 1e-3), tree(2), tree(3)]
    ours, state = trained(make_optimizer(**{**ADAMW, "mu_dtype": "bfloat16"})[0], gradients)
    exact, _ = trained(make_optimizer(**ADAMW)[0], gradients)
    dtypes = lambda name: {x.dtype for x in jax.tree.leaves(optax.tree.get(state, name))}
    assert (dtypes("mu"), dtypes("nu")) == ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)})
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=3 * 1e-2 * 2**-7)  # three steps of 1e-2, rounded to 8 bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_steps": 10}, "warmup_steps 10 >= steps 10: the run would end before the peak; lower it"),
        (
            {"warmup_steps": 0.96},
            "warmup_steps 0.96 >= steps 10: the run would end before the peak; lower it",
        ),
        (
            {"warmup_steps": 1.5},
            "warmup_steps is 1.5; from 1 on it must be an integer, below 1 it is a fraction of the steps",
        ),
        ({"warmup_steps": -0.5}, "warmup_steps is -0.5, must be 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, must be positive"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0, must be positive"),
        ({"b1": 1.0}, "b1 is 1.0, must be in [0, 1)"),
        ({"b2": -0.1}, "b2 is -0.1, must be in [0, 1)"),
        ({"b1": None, "mu_dtype": None}, "adamw needs b1, mu_dtype; None is for adafactor"),
        (
            {"name": "adafactor", "b1": None, "eps": None},
            "adafactor has no b2, mu_dtype; set to None what another optimizer needs",
        ),
    ],
)
def test_bad_optimizers_are_refused(change, message):
    with pytest.raises(ValueError) as raised:
        make_optimizer(**{**ADAMW, **change})
    assert str(raised.value) == message
