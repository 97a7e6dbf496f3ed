"""Log-probabilities against a float64 NumPy computation, and what must not influence them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import Markov, split, tiny
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from xpo_jax.algorithm.logps import response_logps, splits_vocabulary
from xpo_jax.runtime.sharding import AXES, make_mesh

OPTIONS = {"temperature": 0.7, "vocab_size": 38, "chunk_tokens": 12}


def score(model, prompt, prompt_lengths, tokens, lengths, **options):
    graphdef, params = model
    f = jax.jit(lambda p, *a: response_logps(graphdef, p, *a, **{**OPTIONS, **options}))
    return jax.device_get(f(params, *map(jnp.asarray, (prompt, prompt_lengths, tokens, lengths))))


def batch(seed=0, B=3, P=5, T=6, V=38):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, V, (B, P)),
        np.array([5, 2, 4]),
        rng.integers(0, V, (2, B, T)),
        np.array([[6, 1, 3], [2, 5, 6]]),
    )


def test_matches_numpy_on_a_markov_chain():
    """This covers sums up to and including the last counted token, temperature, masked vocabulary and entropy."""
    table = np.random.default_rng(3).normal(0, 2, (40, 40))
    prompt, prompt_lengths, tokens, lengths = batch()
    got = score(split(Markov(table)), prompt, prompt_lengths, tokens, lengths)
    logits = table[:, :38] / 0.7
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropy = -(np.exp(logp) * logp).sum(-1)
    for s in range(2):
        for b in range(3):
            before = [prompt[b, prompt_lengths[b] - 1], *tokens[s, b]][: lengths[s, b]]
            drawn = tokens[s, b, : lengths[s, b]]
            assert got.logps[s, b] == pytest.approx(logp[before, drawn].sum(), rel=2e-5)
            assert got.entropy[s, b] == pytest.approx(entropy[before].sum(), rel=2e-5)


@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
def test_matches_the_full_forward_pass(layout):
    """With the shared prompt and in chunks, the result is that of each prompt + response alone."""
    stacked, params, unstacked, flat = tiny()
    prompt, prompt_lengths, tokens, lengths = batch()
    model = (stacked, params) if layout == "stacked" else (unstacked, flat)
    got = score(model, prompt, prompt_lengths, tokens, lengths)
    merged = nnx.merge(stacked, params)
    for s in range(2):
        for b in range(3):
            n, m = prompt_lengths[b], lengths[s, b]
            whole = np.concatenate([prompt[b, :n], tokens[s, b, :m]])[None]
            hidden, _ = merged.prefill(jnp.asarray(whole))
            logits = np.asarray(merged.unembed(hidden)[0, n - 1 : n + m - 1, :38], np.float64) / 0.7
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            assert got.logps[s, b] == pytest.approx(logp[np.arange(m), whole[0, n:]].sum(), rel=1e-4)


def test_the_gradient_is_that_of_a_plain_log_softmax():
    """It is taken of log-probabilities and entropies, with a temperature, masked tokens and several chunks."""
    stacked, params, _, _ = tiny()
    prompt, prompt_lengths, tokens, lengths = batch()
    rng = np.random.default_rng(4)
    to_logps, to_entropy = rng.normal(size=(2, 2, 3)).astype(np.float32)

    def ours(params):
        scored = response_logps(
            stacked, params, *map(jnp.asarray, (prompt, prompt_lengths, tokens, lengths)), **OPTIONS
        )
        return jnp.sum(to_logps * scored.logps + to_entropy * scored.entropy)

    def plain(params):
        model, total = nnx.merge(stacked, params), 0.0
        for s in range(2):
            for b in range(3):
                n, m = prompt_lengths[b], lengths[s, b]
                whole = np.zeros((1, 11), np.int32)  # of one length, so that it is compiled once
                whole[0, : n + m] = np.concatenate([prompt[b, :n], tokens[s, b, :m]])
                hidden = model.prefill(jnp.asarray(whole))[0][0, n - 1 : n + m - 1]
                logp = jax.nn.log_softmax(model.unembed(hidden)[:, :38] / 0.7)
                total += to_logps[s, b] * logp[np.arange(m), whole[0, n : n + m]].sum()
                total -= to_entropy[s, b] * jnp.sum(jnp.exp(logp) * logp)
        return total

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        got, expected = jax.jit(jax.grad(ours))(params), jax.jit(jax.grad(plain))(params)
    for leaf, expected_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-6, atol=1e-6)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0.1


def test_nothing_after_the_first_end_token_or_past_the_prompt_has_influence():
    stacked, params, _, _ = tiny()
    prompt, prompt_lengths, tokens, lengths = batch()
    got = score((stacked, params), prompt, prompt_lengths, tokens, lengths)
    rng = np.random.default_rng(9)
    noise = rng.integers(0, 38, tokens.shape)
    changed = np.where(np.arange(6) < lengths[..., None], tokens, noise)
    prompt_changed = np.where(
        np.arange(5) < prompt_lengths[:, None], prompt, rng.integers(0, 38, prompt.shape)
    )
    assert (changed != tokens).any()
    assert (prompt_changed != prompt).any()
    again = score((stacked, params), prompt_changed, prompt_lengths, changed, lengths)
    np.testing.assert_array_equal(got.logps, again.logps)
    longer = np.pad(changed, ((0, 0), (0, 0), (0, 3)), constant_values=7)  # a wider bucket
    wide = score((stacked, params), np.pad(prompt_changed, ((0, 0), (0, 4))), prompt_lengths, longer, lengths)
    np.testing.assert_allclose(got.logps, wide.logps, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 13])
def test_chunks_do_not_matter(chunk_tokens):
    stacked, params, _, _ = tiny()
    whole = score((stacked, params), *batch(), chunk_tokens=36)
    got = score((stacked, params), *batch(), chunk_tokens=chunk_tokens)
    np.testing.assert_allclose(got.logps, whole.logps, rtol=1e-6)
    np.testing.assert_allclose(got.entropy, whole.entropy, rtol=1e-5)


def test_no_array_of_all_logits_exists():
    stacked, params, _, _ = tiny()
    B, T, V = 3, 6, 40
    f = lambda p, *a: jax.grad(
        lambda p: response_logps(stacked, p, *a, **{**OPTIONS, "chunk_tokens": 6}).logps.sum()
    )(p)
    text = jax.jit(f).lower(params, *map(jnp.asarray, batch())).compile().as_text()
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(np.prod(shape) for shape in shapes if V in shape) < 2 * B * T * V  # no other size is V
    assert f"f32[{B},2,{V}]" in text  # one chunk of logits


def test_split_vocabulary_changes_neither_values_nor_gradients():
    """On a mesh whose fsdp and tensor axes split 40 words four ways, and whose data axis splits the rows."""
    stacked, params, _, _ = tiny()
    prompt, prompt_lengths, tokens, lengths = batch(B=4)
    rows = (prompt, np.append(prompt_lengths, 3), tokens, np.append(lengths, [[4], [1]], axis=1))

    def scored(split_vocabulary):
        def total(params):
            options = {**OPTIONS, "split_vocabulary": split_vocabulary}
            scored = response_logps(stacked, params, *map(jnp.asarray, rows), **options)
            return jnp.sum(scored.logps) + 2 * jnp.sum(scored.entropy), scored

        with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
            return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    for by_words, expected in zip(jax.tree.leaves(scored(True)), jax.tree.leaves(scored(False)), strict=True):
        np.testing.assert_allclose(by_words, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("sizes", "words", "platform", "expected"),
    [
        ((1, 8, 1), 1024, "tpu", True),
        ((1, 8, 1), 1024, "cpu", False),
        ((8, 1, 1), 1024, "tpu", False),
        ((1, 4, 2), 1028, "gpu", False),
    ],
)
def test_splits_vocabulary_over_fsdp_if_it_divides_the_words(sizes, words, platform, expected):
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    assert splits_vocabulary(mesh, words, platform) is expected
