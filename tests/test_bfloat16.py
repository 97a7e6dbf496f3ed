"""In bfloat16, as on accelerators: policy and reference with the same weights have the same log-probabilities."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import TINY, graphdef, random_params
from tiny_run import ADAMW, one_sequence_length

from xpo_jax.algorithm import logps
from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.algorithm.model_spec import make_model_spec
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import Vocabulary, make_sampler, row_keys
from xpo_jax.algorithm.sampling import CandidateSampling, Sampling
from xpo_jax.algorithm.update import summarise
from xpo_jax.models import layers
from xpo_jax.models.decoder_family import unstack
from xpo_jax.runtime import sharding
from xpo_jax.values import Pairs, Prompts

# The vocabulary of a real model, so that the logits of a response need several chunks.
CONFIG = dataclasses.replace(
    TINY,
    vocab_size=49_152,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)
B, P, T = 4, 40, 100


def programs_of(dtype, *, remat, attention, **sizes):
    mesh = sharding.make_mesh(**sizes)
    return Programs(
        make_model_spec(
            mesh, CONFIG, dtype=dtype, remat=remat, batch_size=B, prompt_tokens=P, attention=attention
        ),
        BatchShapes(batch_size=B, prompt_buckets=(P,), micro_batch_rows=1, chunk_tokens=64),
        CandidateSampling(
            max_new_tokens=T, temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
        ),
        Vocabulary(CONFIG.vocab_size, (1,), 0),
        optimizer=make_optimizer(**ADAMW, steps=4),
        loss=Sigmoid(bonus_clip=500.0),
        entropy_weight=0.0,
        seed=0,
    )


@pytest.mark.usefixtures("full_optimization")
@pytest.mark.parametrize(
    ("sizes", "remat", "attention"),
    [
        # where the update rematerialises, XLA fuses it most differently
        ((1, 1, 1), True, "einsum"),
        ((1, 1, 1), True, "blocks"),
        pytest.param((1, 1, 1), False, "einsum", marks=pytest.mark.slow),
        pytest.param((1, 1, 1), False, "blocks", marks=pytest.mark.slow),
        pytest.param((1, 1, 2), True, "einsum", marks=pytest.mark.slow),
        pytest.param((2, 2, 1), False, "einsum", marks=pytest.mark.slow),
        pytest.param((2, 1, 2), True, "einsum", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), True, "blocks", marks=pytest.mark.slow),
    ],
)
def test_kl_and_margins_before_the_first_update_are_exactly_zero(sizes, remat, attention):
    """The scoring program runs unrolled, the update scans and differentiates; their numbers are the same bits."""
    count = int(np.prod(sizes))
    devices = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patched, one_sequence_length():
        patched.setattr(jax, "devices", lambda *_: devices)
        patched.setattr(jax, "device_count", lambda *_: count)
        programs = programs_of(
            jnp.bfloat16,
            remat=remat,
            attention=attention,
            **dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
        )
    for label, compile_program in programs.declared_programs():
        if not label.startswith(("sample", "gather", "fingerprint")):
            compile_program()
    state = programs.init(jax.device_put(random_params(0, CONFIG, scale=0.3), programs.model.params_sharding))
    reference = programs.for_sampling(state.params)
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, CONFIG.vocab_size, (2, B, T)).astype(np.int32)
    lengths = rng.integers(60, T + 1, (2, B)).astype(np.int32)
    prompts = Prompts(
        ({},) * B,
        ((),) * B,
        rng.integers(2, CONFIG.vocab_size, (B, P)).astype(np.int32),
        np.full(B, P, np.int32),
        np.arange(B, dtype=np.int32),
        np.ones(B, bool),
    )
    packed = programs.pack(prompts, tokens, lengths)
    ref_logps = np.asarray(programs.score(reference, packed))
    assert (ref_logps < -100).all()
    pairs = Pairs(
        prompts.tokens,
        prompts.lengths,
        tokens,
        lengths,
        ref_logps,
        np.float32([1, 0, 0.5, 0.8]),
        np.ones(B, np.float32),
        prompts.valid,
    )
    _, sums, _ = programs.update(state, {}, pairs, packed, 0.01, 0.1)
    metrics = summarise(jax.device_get(sums), 0.1)
    assert metrics["objective/kl"] == 0.0
    assert metrics["rewards/margins"] == 0.0 and metrics["rewards/chosen"] == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("full_optimization")
@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 1), (1, 2, 2)])
def test_kl_and_margins_are_exactly_zero_with_words_split_over_fsdp(monkeypatch, sizes):
    """As on accelerators, see `logps.splits_vocabulary`."""
    monkeypatch.setattr("xpo_jax.algorithm.programs.splits_vocabulary", lambda *_: True)
    test_kl_and_margins_before_the_first_update_are_exactly_zero(sizes, True, "einsum")


def test_narrow_rounds_as_bfloat16_and_is_not_removed():
    x = np.float32([1.0, 1.00390625, 3.14159265, -1e-3])
    assert np.array_equal(layers.narrow(jnp.asarray(x), jnp.bfloat16), jnp.asarray(x).astype(jnp.bfloat16))
    doubled = jax.jit(lambda x: layers.narrow(x, jnp.dtype(jnp.bfloat16)).astype(jnp.float32) * 2)
    assert np.array_equal(doubled(x), np.asarray(x.astype(jnp.bfloat16)).astype(np.float32) * 2)
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(True):
            assert layers.narrow(jnp.asarray(x, dtype), jnp.dtype(dtype)).dtype == dtype


@pytest.mark.parametrize("chunks", [4, 64, 512])
def test_gradient_of_the_table_has_an_error_that_does_not_grow_with_the_chunks(chunks):
    """Against float64, of bfloat16 inputs: the sum over chunks is in float32 and rounded once, at its end."""
    U, D, V, rng = 512, 16, 64, np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((1, U, D), (V, D)))
    targets = jnp.asarray(rng.integers(0, 4, (1, U)), jnp.int32)  # few targets: one column adds up
    head = logps._Head(1.0, V, U // chunks, False, True)

    def loss(table, hidden, head):
        return logps._token_logps(head, hidden, table, targets, jnp.int32(U // head.width))[0].sum()

    gradient = jax.jit(functools.partial(jax.grad(loss), head=head))(table, hidden)
    with jax.enable_x64(True):
        exact = jax.jit(functools.partial(jax.grad(loss), head=logps._Head(1.0, V, U, False, True)))(
            jnp.asarray(table, jnp.float64), jnp.asarray(hidden, jnp.float64)
        )
    error = np.linalg.norm(np.asarray(gradient, np.float64) - np.asarray(exact)) / np.linalg.norm(exact)
    assert error < 0.004


def test_decode_loop_converts_no_norm_or_bias_and_draws_the_same(monkeypatch):
    """Norms and biases are widened before the loop; what is computed with them is float32 anyway."""
    config = dataclasses.replace(CONFIG, vocab_size=64)
    unstacked, params = graphdef(config, stacked=False), unstack(random_params(0, config, scale=0.3))
    given = (
        jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params),
        jnp.asarray(np.random.default_rng(1).integers(2, 64, (B, P)), jnp.int32),
        jnp.asarray([3, P, 7, 20]),
        jnp.ones(B, bool),
        row_keys(0, 0, 0, jnp.arange(B), 0),
    )

    def sampler():
        settings = Sampling(
            max_new_tokens=12, temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
        )
        return make_sampler(unstacked, settings, vocab_size=64, end_tokens=(1,), pad_token=0)

    def converted():
        """Return how many vectors the decode loop converts from bfloat16."""
        loops = [e for e in jax.make_jaxpr(sampler())(*given).jaxpr.eqns if e.primitive.name == "while"]
        vectors = re.findall(
            r":f32\[(?:1,)?\d+\] = convert_element_type\[.*?\] (\w+)", str(loops[0].params["body_jaxpr"])
        )
        return len(vectors)

    tokens, narrow_vectors = [jax.device_get(jax.jit(sampler())(*given)).tokens], converted()
    monkeypatch.setattr("xpo_jax.algorithm.sampler.wide", lambda dtype: dtype)
    tokens.append(jax.device_get(jax.jit(sampler())(*given)).tokens)
    assert (narrow_vectors, converted()) == (
        0,
        5 + 1,
    )  # two norms and three biases in the function of all layers; the last norm
    np.testing.assert_array_equal(*tokens)
    assert len(np.unique(tokens[0])) > 10
