"""Attention over blocks of queries against the einsum: values, gradients, and that no array holds all scores."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_attention import arrays, packed_parts, queries_keys_values
from fake_models import PACKED, TINY, random_params
from fake_programs import PLAIN
from flax import nnx
from tiny_run import ADAMW, one_device, one_sequence_length, tiny_config

from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.algorithm.model_spec import make_model_spec
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import Vocabulary
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.experiment.setup import prepare
from xpo_jax.models import attention_blocks, attention_kernels
from xpo_jax.models.attention_kernels import choose, packed_mask
from xpo_jax.models.decoder import Decoder
from xpo_jax.models.layers import Causal, Parts, attention
from xpo_jax.reporting.summary import attention_used
from xpo_jax.runtime import sharding
from xpo_jax.runtime.rng import Stream
from xpo_jax.runtime.sharding import make_mesh
from xpo_jax.values import Prompts


def with_gradients(function, given, mask):
    """The result, and the gradients of a weighted sum of it."""

    def weighted(q, k, v):
        out = function(q, Causal(k, v, mask))
        (weights,) = arrays(out.shape, dtype=out.dtype, seed=9)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*given)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


# queries per block, and B, C, T, N, K, H: blocks of equal and of unequal length, fewer blocks than quarters, one query,
# heads that share keys and heads that do not, and several candidates of a row
@pytest.mark.parametrize(
    ("packed", "queries", "shape", "dtype"),
    [
        (True, 64, (2, 1, 150, 6, 2, 8), np.float32),
        (True, 8, (2, 1, 75, 4, 4, 4), np.float32),
        (True, 8, (3, 1, 1, 4, 2, 8), np.float32),
        (False, 16, (1, 2, 64, 4, 1, 8), np.float32),
        (False, 8, (1, 1, 17, 2, 2, 8), np.float32),
        (True, 8, (2, 1, 75, 4, 2, 4), np.float64),
        (False, 8, (2, 1, 75, 4, 2, 4), np.float64),
    ],
)
def test_attend_in_blocks_equals_the_einsum(monkeypatch, packed, queries, shape, dtype):
    monkeypatch.setattr(attention_blocks, "QUERIES", queries)
    tolerance = 1e-5 if dtype is np.float32 else 1e-13
    with jax.enable_x64(dtype is np.float64):
        given = queries_keys_values(*shape, dtype)
        parts = packed_parts(shape[0], shape[2]) if packed else None
        mask = packed_mask("einsum", parts) if packed else None
        in_blocks = with_gradients(attention_blocks.attend_in_blocks, given, parts)
        for computed, expected in zip(in_blocks, with_gradients(attention, given, mask), strict=True):
            np.testing.assert_allclose(
                computed, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
            )


def test_attend_in_blocks_in_bfloat16_has_an_error_that_does_not_grow_with_the_blocks(monkeypatch):
    """Against the einsum in float32, with 64 blocks: the gradients of keys and values are summed in float32."""
    monkeypatch.setattr(attention_blocks, "QUERIES", 4)
    given = queries_keys_values(1, 1, 256, 2, 1, 8, jnp.bfloat16)
    exact = with_gradients(attention, [x.astype(jnp.float32) for x in given], None)
    in_blocks = with_gradients(attention_blocks.attend_in_blocks, given, None)
    for computed, usual, expected in zip(
        in_blocks, with_gradients(attention, given, None), exact, strict=True
    ):
        error, allowed = (np.sqrt(np.mean((x - expected) ** 2)) for x in (computed, usual))
        assert error <= 1.5 * allowed


def test_packed_mask_of_parts_is_the_rule_of_packed_rows():
    """Own prompt and own response, not the sibling and not another pair: by hand."""
    parts = Parts(jnp.asarray([[0, 0, 1, 2, 3, 4, -1]]), jnp.asarray([[0, 0, 0, 0, 3, 3, -1]]))
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(packed_mask("einsum", parts)[0, 0], np.array(expected, bool))
    assert packed_mask("blocks", parts) is parts


@pytest.mark.parametrize("packed", [False, True])
def test_attend_in_blocks_holds_neither_all_scores_nor_a_mask_of_all(packed):
    """The largest array of the lowered program, forward and backward, has the scores of one block."""
    B, T, N, H = 2, 1500, 2, 8
    given = queries_keys_values(B, 1, T, N, 1, H, jnp.bfloat16)
    parts = packed_parts(B, T) if packed else None

    def call(q, k, v):
        attended = attention_blocks.attend_in_blocks(q, Causal(k, v, parts))
        return jnp.sum(attended.astype(jnp.float32))

    text = jax.jit(jax.grad(call, argnums=(0, 1, 2))).lower(*given).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
    largest = max(int(np.prod([int(n) for n in shape.split("x") if n])) for shape in shapes)
    assert largest == B * N * -(-T // 24) * T  # 24 blocks of 63 queries


# ---- in the model -----------------------------------------------------------------------------------


def loss(graphdef, params):
    """A number that depends on every hidden state of a pass over prompts and of one over packed rows."""
    model, rng = nnx.merge(graphdef, params), np.random.default_rng(0)
    prompts, rows = (
        jnp.asarray(rng.integers(TINY.vocab_size, size=size), jnp.int32) for size in ((4, 9), (4, 11))
    )
    hidden, packed = model.prefill(prompts)[0], model.packed(rows, *PACKED)
    return sum(
        jnp.sum(x * weights) for x in (hidden, packed) for weights in arrays(x.shape, dtype=jnp.float32)
    )


@pytest.mark.parametrize("sizes", [pytest.param(None, marks=pytest.mark.slow), (2, 2, 2)])
def test_model_with_blocks_has_the_einsums_loss_and_gradient(monkeypatch, sizes):
    """Off a mesh, and with rows over four devices and heads over two, where no block needs another device."""
    monkeypatch.setattr(attention_blocks, "QUERIES", 4)
    params = random_params(0, TINY)

    def learned(attention):
        kernels = choose(attention, "cpu")
        graphdef, _ = nnx.split(
            nnx.eval_shape(lambda: Decoder(TINY, rngs=nnx.Rngs(0), stacked=True, remat=True, kernels=kernels))
        )
        step = jax.jit(jax.value_and_grad(functools.partial(loss, graphdef)))
        if sizes is None:
            return step(params)
        with jax.set_mesh(make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))):
            return step(params)

    for computed, expected in zip(
        jax.tree.leaves(learned("blocks")), jax.tree.leaves(learned("einsum")), strict=True
    ):
        np.testing.assert_allclose(computed, expected, rtol=2e-4, atol=2e-4 * float(jnp.abs(expected).max()))


# ---- which one is taken -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "long", "short_tokens"),
    [("cpu", "blocks", 1280), ("gpu", "cudnn", 1280), ("tpu", "splash", 511)],
)
def test_choose_auto_takes_the_einsum_for_short_sequences_only(platform, long, short_tokens):
    kernels = choose("auto", platform)
    assert [kernels.at(tokens) for tokens in (1, short_tokens, short_tokens + 1, 32768)] == (
        ["einsum", "einsum", long, long]
    )
    for name in ("einsum", "blocks", "cudnn", "splash"):
        assert {choose(name, platform).at(tokens) for tokens in (1, 32768)} == {name}


def test_choose_auto_on_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match=r"^model\.attention 'auto' .* 'neuron'; set it to 'blocks' or"):
        choose("auto", "neuron")
    assert choose("blocks", "neuron").at(9000) == "blocks"


def test_attention_used_names_the_implementation_of_each_length():
    assert attention_used(choose("auto", "cpu"), (32, 40, 104)) == "einsum"
    assert attention_used(choose("blocks", "cpu"), (40, 104)) == "blocks"
    used = attention_used(choose("auto", "cpu"), (1024, 8192, 1024, 4608))
    assert used == "einsum at 1024 tokens; blocks at 4608, 8192 tokens"


def test_prepare_passes_the_chosen_attention_to_both_layouts(tmp_path):
    config = tiny_config(tmp_path)
    for name, expected in (("auto", choose("auto", "cpu")), ("blocks", choose("blocks", "cpu"))):
        config.model.attention = name
        spec = prepare(config).programs.model
        assert spec.kernels == expected
        for graphdef, params in ((spec.stacked, spec.params), (spec.unstacked, spec.weights)):
            assert nnx.merge(graphdef, params).kernels == expected
    assert attention_kernels.Kernels() == choose("einsum", "cpu")


# ---- long prompts -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("full_optimization")
def test_programs_at_8192_tokens_score_as_the_einsum_does(capsys):
    """Two prompts of 8,192 tokens through the programs of a run: prefill of one row at a time, decoding, scoring.

    The einsum scores the same samples; its prefill would take several GB.
    """
    P, T, B, rng = 8192, 8, 2, np.random.default_rng(0)
    tokens = rng.integers(3, 36, (B, P)).astype(np.int32)
    prompts = Prompts(
        rows=({},) * B,
        messages=((),) * B,
        tokens=tokens,
        lengths=np.array([P, P - 100], np.int32),
        position=np.arange(B, dtype=np.int32),
        valid=np.ones(B, bool),
    )
    samples, results = None, {}
    with one_device(), one_sequence_length():
        for attention in ("auto", "einsum"):
            mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)  # one device, see `one_device`
            spec = make_model_spec(
                mesh, TINY, dtype=np.float32, remat=True, batch_size=B, prompt_tokens=P, attention=attention
            )
            programs = Programs(
                spec,
                BatchShapes(
                    batch_size=B, prompt_buckets=(P,), micro_batch_rows=1, chunk_tokens=64, prefill_rows=1
                ),
                CandidateSampling(**{**PLAIN, "max_new_tokens": T}),
                Vocabulary(36, (1, 2), 0),
                optimizer=make_optimizer(**ADAMW, steps=4),
                loss=Sigmoid(bonus_clip=5.0),
                entropy_weight=0.0,
                seed=0,
            )
            for label, compile_program in programs.declared_programs():
                if label.startswith(("for_sampling", "score") + (("sample",) if samples is None else ())):
                    compile_program()
            weights = programs.for_sampling(jax.device_put(random_params(0, TINY), spec.params_sharding))
            if samples is None:
                samples = programs.fetch(
                    programs.sample(weights, prompts, stream=Stream.TRAINING, step=0, candidate=0)
                )
            packed = programs.pack(prompts, np.stack([samples.tokens] * 2), np.stack([samples.lengths] * 2))
            results[attention] = np.asarray(programs.score(weights, packed))
    expected, logps = results["einsum"], results["auto"]
    with capsys.disabled():
        print(f"\n8,192 tokens: log-probabilities {expected[0]}, off by {np.abs(logps - expected).max():.1e}")
    assert (expected < -1).all()
    np.testing.assert_allclose(logps, expected, rtol=0, atol=1e-5)
