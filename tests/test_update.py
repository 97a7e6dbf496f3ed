"""The update: any split of the batch gives the same gradient; the metrics are what they are called; bad numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_models import tiny
from tiny_run import ADAMW

from xpo_jax.algorithm import losses
from xpo_jax.algorithm.logps import response_logps
from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.packing import Packer
from xpo_jax.algorithm.update import (
    PairTargets,
    _sums,
    gather_pair_targets,
    init_state,
    make_accumulate,
    make_apply,
    summarise,
    zeros,
)
from xpo_jax.values import Pairs

OPTIMIZER = {**ADAMW, "steps": 10}
STACKED, PARAMS, _, _ = tiny(scale=1.0)
SIGMOID = Sigmoid(bonus_clip=500.0)
B = 8


def pairs(seed=0, valid=(True,) * 7 + (False,), weight=(1, 1, 0, 1, 0.5, 1, 1, 1), reference_seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 40, (2, B, 6)).astype(np.int32)
    lengths = rng.integers(1, 7, (2, B)).astype(np.int32)
    prompt, prompt_lengths = (
        rng.integers(3, 40, (B, 5)).astype(np.int32),
        rng.integers(1, 6, B).astype(np.int32),
    )
    ref_logps = scorer()(tiny(seed=reference_seed, scale=1.0)[1], prompt, prompt_lengths, tokens, lengths)
    p_first = np.array([1, 0, 1, 0.5, 0.7, 0, 1, 1], np.float32)
    return Pairs(
        prompt,
        prompt_lengths,
        tokens,
        lengths,
        np.asarray(ref_logps),
        p_first,
        np.array(weight, np.float32),
        np.array(valid),
    )


@functools.cache
def accumulate_of(loss, **options):
    return jax.jit(make_accumulate(STACKED, loss, temperature=0.8, vocab_size=40, chunk_tokens=64, **options))


@functools.cache
def scorer():
    score = lambda params, *args: (
        response_logps(STACKED, params, *args, temperature=0.8, vocab_size=40, chunk_tokens=64).logps
    )
    return jax.jit(score)


def gradient(
    batch,
    *,
    rows=8,
    at=(16,),
    alpha=0.01,
    beta=0.1,
    entropy_weight=0.0,
    loss=SIGMOID,
    params=PARAMS,
    dtype=jnp.float32,
):
    accumulate = accumulate_of(loss, entropy_weight=entropy_weight, dtype=dtype)
    valid = np.asarray(batch.valid)
    numbers = [np.float32(x) for x in (valid.sum(), batch.lengths[0][valid].sum(), alpha, beta)]
    grads, sums = zeros(params)
    for packed, index in Packer(rows, at, shards=1)(*batch[:4], valid):
        grads, sums = accumulate(params, {}, grads, sums, packed, gather_pair_targets(batch, index), *numbers)
    return grads, jax.device_get(sums)


def distance(a, b):
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
    return float(difference / optax.tree.norm(b))


@functools.cache
def unpacked():
    """Return gradient and sums of a batch with one row per pair, without packing."""
    batch = pairs(reference_seed=1)
    targets = PairTargets(*batch[3:])
    scored_by = {"temperature": 0.8, "vocab_size": 40, "chunk_tokens": 64}

    def loss_of(params):
        scored = response_logps(STACKED, params, *batch[:4], **scored_by)
        terms = SIGMOID(scored.logps, batch.ref_logps, batch.p_first, beta=0.1, alpha=0.01)
        weight, valid = np.where(batch.valid, batch.weight, 0), batch.valid
        entropy = jnp.sum(jnp.where(valid, scored.entropy[0], 0))
        loss = losses.total(terms, weight, valid.sum()) - 0.1 * entropy / batch.lengths[0][valid].sum()
        return loss, _sums(terms, scored.logps, targets, weight, loss, entropy)

    return jax.device_get(jax.jit(jax.grad(loss_of, has_aux=True))(PARAMS))


@pytest.mark.parametrize(("rows", "at"), [(1, (16, 32)), (8, (16,))])
def test_any_packing_gives_the_gradient_of_the_unpacked_batch(rows, at):
    whole, sums = unpacked()
    packed, packed_sums = gradient(pairs(reference_seed=1), rows=rows, at=at, entropy_weight=0.1)
    assert distance(packed, whole) < 1e-5
    for name, value in sums.items():
        assert packed_sums[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_the_order_of_the_pairs_does_not_matter():
    batch, order = pairs(reference_seed=1), np.random.default_rng(0).permutation(B)
    other = Pairs(*(x[:, order] if len(x) == 2 else x[order] for x in batch))
    (a, sums), (b, other_sums) = gradient(batch, rows=1), gradient(other, rows=1)
    assert distance(a, b) < 1e-5
    for name, value in sums.items():
        assert other_sums[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_z_kl_and_margins_are_zero_before_the_first_update():
    _, sums = gradient(pairs(), alpha=0.01)
    metrics = summarise(sums, 0.1)
    assert abs(metrics["objective/kl"]) < 1e-5
    assert abs(metrics["rewards/margins"]) < 1e-6
    assert metrics["loss/dpo"] == pytest.approx(np.log(2) * 5.5 / 7, rel=1e-5)  # weights sum to 5.5 of 7 rows


def test_padding_rows_and_failed_verdicts_do_not_matter():
    batch = pairs(reference_seed=1)
    noise = pairs(seed=5, reference_seed=1)
    without_say = ~batch.valid | (batch.weight == 0)

    def mixed(a, b):
        axis = 1 if a.shape[0] == 2 else 0
        mask = without_say.reshape((1,) * axis + (B,) + (1,) * (a.ndim - axis - 1))
        return np.where(mask, b, a)

    other = Pairs(*(mixed(a, b) for a, b in zip(batch, noise, strict=True)))._replace(
        valid=batch.valid, weight=batch.weight
    )
    assert not np.array_equal(other.tokens, batch.tokens)
    a, b = gradient(batch)[0], gradient(other)[0]
    assert distance(a, b) < 1e-6


def test_no_verdict_at_all_gives_no_gradient():
    grads, sums = gradient(pairs(weight=(0,) * 8))
    assert float(optax.tree.norm(grads)) == 0.0
    assert sums["loss"] == 0.0


def test_gradient_matches_finite_differences_in_float64():
    """The gradient goes through model, log-probs, loss and entropy, along random directions."""
    with jax.enable_x64(True):
        to64 = lambda tree: jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if np.asarray(x).dtype == np.float32 else x, tree
        )
        params, batch = to64(PARAMS), pairs(reference_seed=1)

        def loss(params):
            return gradient(batch, alpha=0.05, beta=0.3, entropy_weight=0.2, params=params, dtype=jnp.float64)

        grads, _ = loss(params)
        for seed in range(2):
            rng = np.random.default_rng(seed)
            direction = jax.tree.map(lambda p, rng=rng: jnp.asarray(rng.normal(size=p.shape)), params)
            h = 1e-4
            moved = lambda s, d=direction: jax.tree.map(lambda p, d: p + s * d, params, d)
            slope = (float(loss(moved(h))[1]["loss"]) - float(loss(moved(-h))[1]["loss"])) / (2 * h)
            ours = sum(
                float(jnp.vdot(g, d))
                for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
            )
            assert ours == pytest.approx(slope, rel=2e-2, abs=2e-3)  # sums are float32


def test_descent_raises_the_chosen_and_lowers_the_rejected():
    optimizer, rate = make_optimizer(**OPTIMIZER)
    apply = jax.jit(make_apply(optimizer, rate))
    batch, state = pairs(), init_state(PARAMS, optimizer)
    history = []
    for _ in range(8):
        grads, sums = gradient(batch, params=state.params, alpha=0.0)
        history.append(summarise(sums, 0.1))
        state, _ = apply(state, grads, sums["loss"])
    assert history[-1]["loss/dpo"] < history[0]["loss/dpo"]
    assert history[-1]["rewards/margins"] > 0.01
    assert history[-1]["rewards/accuracies"] == 1.0
    assert int(state.step) == 8


def test_the_bonus_lowers_the_references_samples():
    """With ties only, alpha > 0 moves log pi(B) down, and alpha = 0 does not move it at z = 0."""
    optimizer, rate = make_optimizer(**{**OPTIMIZER, "learning_rate": 1e-4})
    batch = pairs()._replace(p_first=np.full(B, 0.5, np.float32), weight=np.ones(B, np.float32))
    grads, sums = gradient(batch, alpha=0.05)
    state, _ = jax.jit(make_apply(optimizer, rate))(init_state(PARAMS, optimizer), grads, sums["loss"])
    assert gradient(batch, params=state.params, alpha=0.05)[1]["bonus"] < sums["bonus"]
    assert float(optax.tree.norm(gradient(batch, alpha=0.0)[0])) < 1e-6


def test_entropy_weight_raises_the_entropy():
    optimizer, rate = make_optimizer(**OPTIMIZER)
    batch = pairs(weight=(0,) * 8)
    grads, sums = gradient(batch, entropy_weight=1.0)
    state, _ = jax.jit(make_apply(optimizer, rate))(init_state(PARAMS, optimizer), grads, sums["loss"])
    after = gradient(batch, params=state.params)[1]
    assert after["entropy"] > sums["entropy"] + 0.01


@pytest.mark.parametrize("where", ["loss", "grads"])
def test_numbers_that_are_not_finite_leave_the_state_untouched(where):
    optimizer, rate = make_optimizer(**OPTIMIZER)
    apply, state = jax.jit(make_apply(optimizer, rate)), init_state(PARAMS, optimizer)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    if where == "grads":
        grads["norm"]["scale"] = grads["norm"]["scale"].at[0].set(jnp.inf)
    new, info = apply(state, grads, jnp.float32(jnp.nan if where == "loss" else 0.0))
    assert not info["finite"]
    assert (int(new.step), int(new.skipped)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, (new.params, new.opt_state), (state.params, state.opt_state))
    good, info = apply(new, jax.tree.map(jnp.ones_like, PARAMS), jnp.float32(0.0))
    assert info["finite"]
    assert int(good.skipped) == 1
    assert distance(good.params, state.params) > 1e-4
