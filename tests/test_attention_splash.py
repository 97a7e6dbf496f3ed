"""Attention by the TPU's splash kernel against the einsum, with Pallas's interpreter of TPU kernels on a CPU.

That the kernel compiles for TPUs, which the interpreter does not show, is tested by `make compile`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_attention import arrays, packed_parts, queries_keys_values
from fake_models import PACKED, TINY, random_params
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from xpo_jax.models import attention_kernels, attention_splash
from xpo_jax.models.attention_kernels import attend, check, choose, packed_mask, packed_order
from xpo_jax.models.decoder import Decoder
from xpo_jax.models.layers import Causal, Parts, Runs, attention
from xpo_jax.runtime.sharding import make_mesh


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel is interpreted, with the smallest blocks that it takes."""
    monkeypatch.setattr(attention_splash, "BLOCK", 128)
    function = functools.partial(attention_splash.attend_by_splash, interpret=True)
    monkeypatch.setattr(attention_kernels, "attend_by_splash", function)


def by_hand(*rows):
    return Parts(*(jnp.asarray([row]) for row in rows))


def permuted(x, order, axis):
    return jnp.take_along_axis(
        x, order.reshape([-1 if i == 0 else x.shape[axis] if i == axis else 1 for i in range(x.ndim)]), axis
    )


def splash(q, keys):
    """Splash attention of packed rows in their own order, as `Qwen2.packed` has it for whole passes."""
    if keys.mask is None:
        return attend("splash", q, keys)
    order = packed_order("splash", keys.mask)
    mask = packed_mask("splash", jax.tree.map(lambda x: permuted(x, order, 1), keys.mask))
    out = attend("splash", permuted(q, order, 2), Causal(*(permuted(x, order, 3) for x in keys[:2]), mask))
    return permuted(out, jnp.argsort(order, axis=1), 2)


def with_gradients(function, given, mask, valid):
    """The result, and the gradients of a weighted sum of it; slots that are not valid count as 0."""

    def weighted(q, k, v):
        out = function(q, Causal(k, v, mask)) * valid[:, None, :, None, None]
        (weights,) = arrays(out.shape, dtype=jnp.float32, seed=9)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*given)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


# ---- the runs of packed rows -----------------------------------------------------------------------

# two pairs (a prompt of 2 with responses of 2 and 1, a prompt of 1 with responses of 1 and none), and an empty slot
PART = [0, 0, 1, 1, 2, 3, 4, -1]
PROMPT = [0, 0, 0, 0, 0, 3, 3, -1]


def test_splash_order_puts_the_first_response_reversed_before_its_prompt():
    order = attention_splash.splash_order(by_hand(PART, PROMPT))
    assert order.tolist() == [[3, 2, 0, 1, 4, 6, 5, 7]]


def test_splash_runs_end_with_the_prompt_or_begin_with_it():
    order = np.array([3, 2, 0, 1, 4, 6, 5, 7])
    runs = attention_splash.splash_runs(by_hand(np.array(PART)[order], np.array(PROMPT)[order]))
    assert runs.first.tolist() == [[0, 1, 2, 2, 2, 5, 6, 7]]
    assert runs.last.tolist() == [[3, 3, 2, 3, 4, 6, 6, 7]]


@pytest.mark.parametrize("T", [1, 40, 300])
def test_splash_runs_are_the_mask_of_packed_rows(T):
    """The keys in the runs are, in their own order, those of the mask, for random rows."""
    parts = packed_parts(3, T)
    order = np.asarray(packed_order("splash", parts))
    first, last = packed_mask("splash", jax.tree.map(lambda x: permuted(x, jnp.asarray(order), 1), parts))
    slots = np.arange(T)
    within = (slots >= np.asarray(first)[..., None]) & (slots <= np.asarray(last)[..., None])
    expected = np.asarray(packed_mask("einsum", parts))[:, 0]
    for row in range(3):
        valid = np.asarray(parts.part)[row] >= 0
        mask = np.zeros((T, T), bool)
        mask[np.ix_(order[row], order[row])] = within[row]
        np.testing.assert_array_equal(mask[valid], expected[row][valid])


def test_block_size_is_the_one_that_pads_less():
    sizes = {
        tokens: attention_splash.block_size(tokens) for tokens in (1, 512, 640, 960, 1280, 1288, 10240, 36864)
    }
    assert sizes == {1: 512, 512: 512, 640: 640, 960: 512, 1280: 640, 1288: 512, 10240: 512, 36864: 512}


# ---- values and gradients -----------------------------------------------------------------------------


# B, C, T, N, K, H: blocks that are masked in part, completely and not at all; sequences that fill no block; heads that
# share keys and heads that do not
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        (True, (1, 1, 200, 2, 1, 8)),
        (False, (1, 1, 130, 2, 2, 16)),
        pytest.param(True, (2, 1, 300, 4, 2, 8), marks=pytest.mark.slow),
        pytest.param(False, (2, 2, 100, 3, 1, 8), marks=pytest.mark.slow),
    ],
)
def test_attend_by_splash_equals_the_einsum(packed, shape):
    given = queries_keys_values(*shape, np.float32)
    parts = packed_parts(shape[0], shape[2]) if packed else None
    valid = jnp.ones((shape[0], shape[2]), bool) if parts is None else parts.part >= 0
    mask = packed_mask("einsum", parts) if packed else None
    expected = with_gradients(attention, given, mask, valid)
    for computed, wanted in zip(with_gradients(splash, given, parts, valid), expected, strict=True):
        np.testing.assert_allclose(computed, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.usefixtures("interpreted")
def test_attend_by_splash_in_wider_blocks_equals_the_einsum(monkeypatch):
    monkeypatch.setattr(attention_splash, "BLOCK", 512)
    monkeypatch.setattr(attention_splash, "WIDER_BLOCK", 384)
    assert attention_splash.block_size(700) == 384
    given, parts = queries_keys_values(1, 1, 700, 2, 1, 8, np.float32), packed_parts(1, 700)
    valid = parts.part >= 0
    expected = with_gradients(attention, given, packed_mask("einsum", parts), valid)
    for computed, wanted in zip(with_gradients(splash, given, parts, valid), expected, strict=True):
        np.testing.assert_allclose(computed, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.usefixtures("interpreted")
def test_attend_by_splash_equals_the_einsum_with_a_tpus_memory_spaces(monkeypatch):
    """In the interpreter that copies between them as a TPU does, and reports races."""
    params = pltpu.InterpretParams(detect_races=True)
    function = functools.partial(attention_splash.attend_by_splash, interpret=params)
    monkeypatch.setattr(attention_kernels, "attend_by_splash", function)
    given, parts = queries_keys_values(1, 1, 100, 2, 1, 8, np.float32), packed_parts(1, 100)
    valid = parts.part >= 0
    expected = with_gradients(attention, given, packed_mask("einsum", parts), valid)
    for computed, wanted in zip(with_gradients(splash, given, parts, valid), expected, strict=True):
        np.testing.assert_allclose(computed, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.usefixtures("interpreted")
def test_attend_by_splash_in_bfloat16_is_the_same_with_and_without_a_gradient():
    """Scoring and the forward pass of the update: bit for bit. And its error is at most that of the einsum."""
    given, parts = queries_keys_values(1, 1, 150, 2, 1, 64, jnp.bfloat16), packed_parts(1, 150)
    valid = parts.part >= 0
    with_a_gradient = with_gradients(splash, given, parts, valid)
    without = jax.jit(lambda q, k, v: splash(q, Causal(k, v, parts)) * valid[:, None, :, None, None])(*given)
    np.testing.assert_array_equal(np.asarray(without, np.float64), with_a_gradient[0])
    mask = packed_mask("einsum", parts)
    exact = with_gradients(attention, [x.astype(jnp.float32) for x in given], mask, valid)
    usual = with_gradients(attention, given, mask, valid)
    for computed, einsum, expected in zip(with_a_gradient, usual, exact, strict=True):
        error, allowed = (np.sqrt(np.mean((x - expected) ** 2)) for x in (computed, einsum))
        assert error <= 1.5 * allowed


def test_attend_by_splash_holds_no_array_of_tokens_by_tokens():
    """As lowered for a TPU, forward and backward; the kernel's logarithms of sums fill a lane each."""
    B, T, N, H = 2, 4000, 2, 64
    given, parts = queries_keys_values(B, 1, T, N, 1, H, jnp.bfloat16), packed_parts(B, T)

    def call(q, k, v):
        return jnp.sum(splash(q, Causal(k, v, parts)).astype(jnp.float32))

    traced = jax.jit(jax.grad(call, argnums=(0, 1, 2))).trace(*given)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, and the gradients of queries and of keys and values
    shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
    largest = max(int(np.prod([int(n) for n in shape.split("x") if n])) for shape in shapes)
    assert largest <= B * N * 4096 * 128 < T * T


# ---- in the model -----------------------------------------------------------------------------------


def loss(graphdef, params):
    """A number that depends on every valid hidden state of a pass over prompts and of one over packed rows."""
    model, rng = nnx.merge(graphdef, params), np.random.default_rng(0)
    prompts, rows = (
        jnp.asarray(rng.integers(TINY.vocab_size, size=size), jnp.int32) for size in ((4, 9), (4, 11))
    )
    valid = jnp.asarray(PACKED[1] >= 0)[..., None]
    hidden, packed = model.prefill(prompts)[0], model.packed(rows, *PACKED) * valid
    return sum(
        jnp.sum(x * weights) for x in (hidden, packed) for weights in arrays(x.shape, dtype=jnp.float32)
    )


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("with_gradient", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_model_with_splash_has_the_einsums_loss_and_gradient_on_a_mesh(with_gradient):
    """With rows over four devices and heads over two."""
    params = random_params(0, TINY)

    def learned(attention):
        kernels = choose(attention, "tpu")
        graphdef, _ = nnx.split(
            nnx.eval_shape(lambda: Decoder(TINY, rngs=nnx.Rngs(0), stacked=True, remat=True, kernels=kernels))
        )
        with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
            function = functools.partial(loss, graphdef)
            return jax.jit(jax.value_and_grad(function) if with_gradient else function)(params)

    for computed, expected in zip(
        jax.tree.leaves(learned("splash")), jax.tree.leaves(learned("einsum")), strict=True
    ):
        np.testing.assert_allclose(computed, expected, rtol=2e-4, atol=2e-4 * float(jnp.abs(expected).max()))


# ---- where it may be used ----------------------------------------------------------------------------


def test_check_splash_without_a_tpu_is_one_line():
    with pytest.raises(
        ValueError, match=r"^model.attention 'splash' needs a TPU, and this backend is cpu; set"
    ):
        check("splash", jax.devices()[0], dtype=jnp.bfloat16, head_dim=64)


def test_attend_by_splash_of_too_many_tokens_is_one_line():
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 1, 65537, 1, 8), (1, 1, 1, 65537, 8)))
    with pytest.raises(ValueError, match=r"at most 65536 tokens, and these have 65537; set it to 'blocks'"):
        jax.eval_shape(lambda q, k, v: attend("splash", q, Causal(k, v, None)), q, k, k)


def test_packed_mask_of_splash_is_two_numbers_per_slot():
    mask = packed_mask("splash", packed_parts(2, 40))
    assert isinstance(mask, Runs) and {leaf.shape for leaf in mask} == {(2, 40)}
