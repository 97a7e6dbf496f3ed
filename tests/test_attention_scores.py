"""The forms that `Kernels.fuse_rows` selects, of attention over segments of keys and of norms, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_attention import arrays, packed_parts
from fake_models import TINY, random_params
from flax import nnx

from xpo_jax.models.attention_kernels import Kernels, choose
from xpo_jax.models.decoder import Decoder
from xpo_jax.models.decoder_family import unstack
from xpo_jax.models.layers import Causal, RMSNorm, Segment, attention

B, C, T, N, K, H = 2, 3, 4, 6, 2, 5


def two_segments(dtype):
    """Queries, then keys and values that candidates share and keys and values of each candidate, and their masks."""
    q, *kv = arrays((B, C, T, N, H), *[(B, K, 7, H)] * 2, *[(B, C, K, 3, H)] * 2, dtype=dtype)
    rng = np.random.default_rng(1)
    masks = rng.random((B, 1, 1, 7)) < 0.7, rng.random((1, 1, T, 3)) < 0.7
    masks[0][..., 0] = True  # no query without a key
    return (q, *kv), tuple(map(jnp.asarray, masks))


def weighted(given, masks, weights, *, fuse_rows):
    q, k, v, own_k, own_v = given
    segments = (Segment(k, v, masks[0]), Segment(own_k, own_v, masks[1]))
    return jnp.sum(attention(q, segments, fuse_rows=fuse_rows) * weights)


@pytest.mark.parametrize("fuse_rows", [False, True])
def test_attention_over_two_segments_equals_numpy(fuse_rows):
    given, masks = two_segments(np.float32)
    q, k, v, own_k, own_v = (np.asarray(x, np.float64) for x in given)
    shared = [np.broadcast_to(x[:, None], (B, C, *x.shape[1:])) for x in (k, v)]
    keys, values = (np.concatenate(pair, axis=3) for pair in zip(shared, (own_k, own_v), strict=True))
    mask = np.concatenate([np.broadcast_to(m, (B, 1, T, m.shape[-1])) for m in masks], axis=-1)
    expected = np.zeros(q.shape)
    for b, c, t, n in np.ndindex(B, C, T, N):
        scores = keys[b, c, n // (N // K)] @ q[b, c, t, n] / np.sqrt(H)
        mass = np.where(mask[b, 0, t], np.exp(scores), 0)
        expected[b, c, t, n] = mass / mass.sum() @ values[b, c, n // (N // K)]
    segments = (Segment(given[1], given[2], masks[0]), Segment(given[3], given[4], masks[1]))
    computed = jax.jit(functools.partial(attention, fuse_rows=fuse_rows))(given[0], segments)
    np.testing.assert_allclose(computed, expected, rtol=2e-5, atol=2e-6)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
def test_gradients_with_joined_scores_equal_those_without():
    given, masks = two_segments(np.float64)
    (weights,) = arrays((B, C, T, N, H), dtype=np.float64, seed=9)
    gradients = [
        jax.jit(jax.grad(functools.partial(weighted, fuse_rows=fuse_rows)))(given, masks, weights)
        for fuse_rows in (False, True)
    ]
    for computed, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(computed, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("packed", [False, True])
def test_causal_attention_with_joined_scores_equals_that_without(packed):
    q, k, v = arrays((2, 1, 30, N, H), *[(2, 1, K, 30, H)] * 2, dtype=np.float64)
    parts = packed_parts(2, 30)
    mask = (parts.attends_to(parts) & jnp.tril(jnp.ones((30, 30), bool)))[:, None] if packed else None
    computed, expected = (
        jax.jit(functools.partial(attention, fuse_rows=fuse_rows))(q, Causal(k, v, mask))
        for fuse_rows in (True, False)
    )
    np.testing.assert_allclose(computed, expected, rtol=1e-9, atol=1e-12)


def test_fused_rows_are_those_of_gpus():
    for name in ("auto", "einsum", "blocks"):
        fused = {platform: choose(name, platform).fuse_rows for platform in ("cpu", "gpu", "tpu")}
        assert fused == {"cpu": False, "gpu": True, "tpu": False}


def test_norm_with_fused_rows_equals_the_other():
    (x, scale) = arrays((3, 4, 10), (10,), dtype=np.float32)
    norms = [RMSNorm(10, epsilon=0.25, rngs=nnx.Rngs(0)) for _ in range(2)]
    for norm, fuse_rows in zip(norms, (False, True), strict=True):
        norm.scale[...], norm.fuse_rows = scale, fuse_rows
    exact = np.asarray(x, np.float64)
    expected = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 0.25) * np.asarray(scale, np.float64)
    for norm in norms:
        np.testing.assert_allclose(norm(x), expected, rtol=1e-6)
    assert norms[1](x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_model_with_fused_rows_decodes_as_without():
    params, hidden = unstack(random_params(0, TINY)), []
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 6)), jnp.int32)
    traced = []
    for fuse_rows in (False, True):
        kernels = Kernels(fuse_rows=fuse_rows)
        graphdef, _ = nnx.split(
            nnx.eval_shape(
                lambda kernels=kernels: Decoder(TINY, rngs=nnx.Rngs(0), stacked=False, kernels=kernels)
            )
        )

        def run(params, graphdef=graphdef):
            model = nnx.merge(graphdef, params)
            encoded, prompts = model.prefill(tokens)
            decoded, _ = model.decode(
                tokens[:, 0], jnp.int32(0), jnp.array([6, 4]), prompts, model.empty_caches(2, 3)
            )
            return encoded, decoded

        traced.append(str(jax.make_jaxpr(run)(params)))
        hidden.append(jax.jit(run)(params))
    assert traced[0] != traced[1]
    for computed, expected in zip(*hidden, strict=True):
        np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)
