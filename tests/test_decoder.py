"""The model against transformers' logits, and its three passes against each other."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from xpo_jax.models.decoder import Decoder
from xpo_jax.models.decoder_family import unstack
from xpo_jax.models.hf import model_folder
from xpo_jax.models.qwen2 import Qwen2Config
from xpo_jax.models.registry import FAMILIES, read_model_config
from xpo_jax.models.rope import Yarn

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/logits.npz"))
TOLERANCE = 2e-5  # between two of our own passes; their sums are ordered differently


@functools.cache
def load(name):
    config = model_folder.read_config(GOLDEN / name)
    return config, model_folder.load_params(GOLDEN / name, config)


@functools.cache
def graph(config, stacked, remat=False):
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), stacked=stacked, remat=remat)))[
        0
    ]


@functools.partial(jax.jit, static_argnums=0)
def full_logits(graphdef, params, tokens):
    """f32[B P V] for i32[B P]: the plain forward pass that the others must equal."""
    model = nnx.merge(graphdef, params)
    return model.unembed(model.prefill(tokens)[0])


@functools.partial(jax.jit, static_argnums=0)
def respond_logits(graphdef, params, prompts, lengths, responses):
    """f32[B C T V] for responses i32[B C T]: a row for each prompt, with all its responses behind it."""
    model, (B, P), (_, C, T) = nnx.merge(graphdef, params), prompts.shape, responses.shape
    lead, numbers = jnp.where(jnp.arange(P) < lengths[:, None], 0, -1), 1 + jnp.arange(C)[:, None]
    joined = lambda of_prompt, of_responses: jnp.concatenate(
        [jnp.broadcast_to(of_prompt, (B, P)), jnp.broadcast_to(of_responses, (B, C, T)).reshape(B, -1)], 1
    )
    positions = joined(jnp.arange(P), lengths[:, None, None] + jnp.arange(T))
    hidden = model.packed(joined(prompts, responses), positions, joined(lead, numbers), joined(lead, 0))
    return model.unembed(hidden[:, P:].reshape(B, C, T, -1))


@functools.partial(jax.jit, static_argnums=0)
def _decode_logits(graphdef, params, prompts, lengths, response, junk):
    model = nnx.merge(graphdef, params)
    B, T = response.shape
    prompt_caches = model.prefill(prompts)[1]

    def step(caches, t):
        hidden, caches = model.decode(response[:, t], t, lengths, prompt_caches, caches)
        return caches, model.unembed(hidden)

    empty = jax.tree.map(lambda x: x + junk, model.empty_caches(B, T))
    return jax.lax.scan(step, empty, jnp.arange(T))[1].swapaxes(0, 1)


def decode_logits(graphdef, params, prompts, lengths, response, junk=0.0):
    """f32[B T V] for a response i32[B T], one token at a time; `junk` is what empty cache slots hold."""
    return _decode_logits(graphdef, params, prompts, lengths, response, junk)


def tokens(config, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(config.vocab_size, size=shape), jnp.int32)


def joined(prompts, lengths, responses):
    """Return prompt and response of each row without the gap, right-padded: i32[B P+T]."""
    out = np.zeros((len(prompts), prompts.shape[1] + responses.shape[1]), np.int32)
    for row, prompt, length, response in zip(out, prompts, lengths, responses, strict=True):
        whole = np.concatenate([prompt[:length], response])
        row[: len(whole)] = whole
    return jnp.asarray(out)


def at_responses(logits, lengths, T):
    """Return the logits [B T V] at the response positions of `joined` rows."""
    return np.stack([row[length : length + T] for row, length in zip(logits, lengths, strict=True)])


def batch(stacked, name="qwen2_tied"):
    """Model, prompts i32[3 6], lengths and responses i32[3 2 5], or i32[3 5] for decoding. One shape, for
    the sake of few compilations."""
    config, params = load(name)
    lengths, responses = jnp.array([1, 4, 6]), tokens(config, 3, 2, 5, seed=1)
    if stacked:
        return config, params, tokens(config, 3, 6), lengths, responses
    return config, unstack(params), tokens(config, 3, 6), lengths, responses[:, 0]


# Logits


def test_there_are_golden_models():
    assert len(MODELS) == 9 and {name.partition("_")[0] for name in MODELS} == {"llama", "qwen2", "qwen3"}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name):
    config, params = load(name)
    golden = np.load(GOLDEN / name / "logits.npz")
    lengths = sorted(int(key.removeprefix("ids_")) for key in golden if key.startswith("ids_"))
    padded = np.full((2 * len(lengths), lengths[-1]), 7, np.int32)  # all lengths in one right-padded batch
    for i, T in enumerate(lengths):
        padded[2 * i : 2 * i + 2, :T] = golden[f"ids_{T}"]
    ours = full_logits(graph(config, stacked=True), params, padded)
    for i, T in enumerate(lengths):
        np.testing.assert_allclose(ours[2 * i : 2 * i + 2, :T], golden[f"logits_{T}"], rtol=0, atol=1e-4)
    assert golden[f"logits_{lengths[-1]}"].std() > 1  # flat logits would prove nothing


def test_unstacked_equals_stacked():
    config, params = load("qwen2_tied")
    ids = tokens(config, 3, 11)
    stacked = full_logits(graph(config, stacked=True), params, ids)
    unrolled = full_logits(graph(config, stacked=False), unstack(params), ids)
    np.testing.assert_allclose(unrolled, stacked, rtol=0, atol=TOLERANCE)


def test_bfloat16_weights_give_bfloat16_caches_and_float32_logits():
    config, params = load("qwen2_tied")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), unstack(params))

    def run(params, prompts, token):
        model = nnx.merge(graph(config, stacked=False), params)
        encoded, caches = model.prefill(prompts)
        lengths, empty = jnp.full((3,), 5), model.empty_caches(3, 4)
        hidden, filled = model.decode(token, jnp.int32(0), lengths, caches, empty)
        return encoded, caches, hidden, filled, model.unembed(hidden)

    *inner, logits = jax.eval_shape(run, half, tokens(config, 3, 5), tokens(config, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(inner)} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32


# The three passes


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied_head_dim_f16", "qwen3_tied", "llama_untied"])
def test_decode_and_packed_equal_the_full_pass(name):
    config, params = load(name)
    _, _, prompts, lengths, responses = batch(stacked=True, name=name)
    T = responses.shape[-1]
    want = [
        at_responses(
            full_logits(graph(config, stacked=True), params, joined(prompts, lengths, responses[:, c])),
            lengths,
            T,
        )
        for c in range(2)
    ]
    packed = respond_logits(graph(config, stacked=True), params, prompts, lengths, responses)
    np.testing.assert_allclose(packed, np.stack(want, 1), rtol=0, atol=TOLERANCE)
    decoded = decode_logits(graph(config, stacked=False), unstack(params), prompts, lengths, responses[:, 0])
    np.testing.assert_allclose(decoded, want[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("run", "stacked"), [(respond_logits, True), (decode_logits, False)])
def test_buckets_padding_and_neighbours_change_nothing(run, stacked):
    config, params, prompts, lengths, responses = batch(stacked)
    before = run(graph(config, stacked), params, prompts, lengths, responses)[1]

    n, (_, *inner, T) = lengths[1], responses.shape
    wide = tokens(config, 2, 11, seed=2).at[1, :n].set(prompts[1, :n])  # a larger bucket, junk as padding
    longer = tokens(config, 2, *inner, 8, seed=3).at[1, ..., :T].set(responses[1])
    after = run(graph(config, stacked), params, wide, jnp.array([11, n]), longer)[1]
    np.testing.assert_allclose(after[..., :T, :], before, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("run", "stacked"), [(respond_logits, True), (decode_logits, False)])
def test_later_tokens_and_prompt_padding_have_no_influence(run, stacked):
    config, params, prompts, lengths, responses = batch(stacked)
    call = functools.partial(run, graph(config, stacked), params)
    before = call(prompts, lengths, responses)

    other = jnp.where(np.arange(6) >= lengths[:, None], (prompts + 1) % config.vocab_size, prompts)
    np.testing.assert_array_equal(call(other, lengths, responses), before)
    for t in (0, 2):
        other = responses.at[..., t + 1 :].set((responses[..., t + 1 :] + 1) % config.vocab_size)
        after = call(prompts, lengths, other)
        np.testing.assert_array_equal(after[..., : t + 1, :], before[..., : t + 1, :])
        assert np.abs(after - before)[..., t + 1 :, :].max() > 0.1  # the change does reach the rest


def test_slots_not_yet_filled_have_no_influence():
    config, params, *inputs = batch(stacked=False)
    call = functools.partial(decode_logits, graph(config, stacked=False), params, *inputs)
    np.testing.assert_array_equal(call(junk=1e4), call())


def test_candidates_do_not_see_each_other():
    config, params, prompts, lengths, responses = batch(stacked=True)
    call = functools.partial(respond_logits, graph(config, stacked=True), params, prompts, lengths)
    before, after = call(responses), call(responses.at[:, 1].set(0))
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    assert np.abs(after - before)[:, 1].max() > 0.1


# Gradients

TINY = Qwen2Config(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=32,
)


def tiny(dtype):
    """Return a tiny model's random parameters, and a function from parameters and remat to a scalar of its logits."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), dtype), model_folder.param_shapes(TINY)
    )
    weights = jnp.asarray(rng.normal(size=(2, 2, 4, TINY.vocab_size)), dtype)
    inputs = tokens(TINY, 2, 5), jnp.asarray([3, 5], jnp.int32), tokens(TINY, 2, 2, 4, seed=1)

    def scalar(params, remat=False):
        logits = respond_logits(graph(TINY, stacked=True, remat=remat), params, *inputs)
        return jnp.sum(weights * jax.nn.log_softmax(logits))

    return params, scalar


def test_gradient_equals_finite_differences_and_remat_changes_nothing():
    with jax.enable_x64(True):
        params, scalar = tiny(jnp.float64)
        run = jax.jit(jax.value_and_grad(scalar))  # also for the values, to compile once
        value, gradient = run(params)
        remat_run = jax.jit(jax.value_and_grad(functools.partial(scalar, remat=True)))
        assert ["remat" in str(jax.make_jaxpr(f)(params)) for f in (run, remat_run)] == [False, True]
        remat_value, remat_gradient = remat_run(params)
        np.testing.assert_allclose(remat_value, value, rtol=1e-13)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), remat_gradient, gradient
        )

        flat, rng, h = traverse_util.flatten_dict(params, sep="."), np.random.default_rng(1), 1e-5
        gradient = traverse_util.flatten_dict(gradient, sep=".")
        for path, leaf in flat.items():  # a random direction in each array
            direction = rng.normal(size=leaf.shape)
            up, down = (
                run(traverse_util.unflatten_dict({**flat, path: leaf + by * direction}, sep="."))[0]
                for by in (h, -h)
            )
            assert up.dtype == jnp.float64
            analytic = np.sum(gradient[path] * direction)
            np.testing.assert_allclose(analytic, (up - down) / (2 * h), rtol=1e-6, atol=1e-7, err_msg=path)


# The tables


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_its_rows_and_every_row_a_parameter(family, tied):
    fields = {**dataclasses.asdict(TINY), "tie_word_embeddings": tied}
    shapes = traverse_util.flatten_dict(model_folder.param_shapes(family.config(**fields)), sep=".")
    names = [path for path, _, _ in family.tensors]
    assert len(set(names)) == len(names) and len({hf_name for _, hf_name, _ in family.tensors}) == len(names)
    assert set(names) - set(shapes) == ({"lm_head.kernel"} if tied else set())
    assert not set(shapes) - set(names)
    used = set()
    for path, leaf in shapes.items():
        pattern, spec = next((pattern, spec) for pattern, spec in family.sharding if re.search(pattern, path))
        assert len(spec) == len(leaf.shape), path
        used.add(pattern)
    assert {pattern for pattern, _ in family.sharding} - used == ({r"lm_head\.kernel"} if tied else set())


def test_unstack_gives_the_unrolled_models_tree():
    state = nnx.state(nnx.eval_shape(lambda: Decoder(TINY, rngs=nnx.Rngs(0), stacked=False)), nnx.Param)
    ours = unstack(jax.tree.map(lambda s: np.zeros(s.shape), model_folder.param_shapes(TINY)))
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, nnx.to_pure_dict(state))


# The config


def golden_config(**changes):
    config = json.loads((GOLDEN / "qwen2_tied" / "config.json").read_text())
    return {key: value for key, value in {**config, **changes}.items() if value != "absent"}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": "absent", "rope_theta": 5e5},
        {"rope_parameters": "absent", "rope_theta": 500000, "rope_scaling": None},
    ],
)
def test_both_spellings_of_the_rotary_base_are_read(spelling):
    config = Qwen2Config.from_hf(golden_config(**spelling))
    assert config.rope_theta == 5e5 and type(config.rope_theta) is float
    assert config.head_dim == 8 and config.tie_word_embeddings is True


def test_a_head_size_of_its_own_is_read():
    assert Qwen2Config.from_hf(golden_config(head_dim=16)).head_dim == 16


def test_untied_is_the_default():
    assert Qwen2Config.from_hf(golden_config(tie_word_embeddings="absent")).tie_word_embeddings is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": "absent"}, "lacks rope_theta"),
        ({"hidden_size": "absent", "vocab_size": None}, "lacks vocab_size, hidden_size, head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope type 'yarn' lacks factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "'yarn' has mscale"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "no positive numbers: factor is '4'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
            "a factor and an original length of at least 1",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, not 1"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "'sliding_attention'], not 'full_attention'",
        ),
        ({"layer_types": 5}, "layer_types is 5, not"),
        ({"rope_scaling": 5}, "rope_scaling is 5, not a mapping"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not a mapping"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "has rope_type ['yarn'], not a name"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear"}}, "has type 'linear' and rope_type 'yarn'"),
        ({"rope_scaling": {"factor": 4.0}}, "rope type is 'default', which has no factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("inf")}}, "factor is inf"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}}, "factor is nan"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7.0}},
            "rope_theta is stated as",
        ),
        (
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            "contradict each other; remove one of them",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "rope_theta is 0.5, not above 1"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": "absent",
                "rope_theta": 1e4,
            },
            "linear",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads does not divide num_attention_heads"),
        ({"vocab_size": "130"}, "wrong type: vocab_size is '130'"),
        ({"num_hidden_layers": 0, "rms_norm_eps": True}, "num_hidden_layers is 0, rms_norm_eps is True"),
        ({"num_attention_heads": 0}, "lacks head_dim"),
        ({"hidden_act": "gelu", "use_sliding_window": True}, "'silu'; use_sliding_window"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Qwen2Config.from_hf(golden_config(**changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias is True, a bias that no published Qwen3 has"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"vocab_size": None}, "config.json lacks vocab_size; is this a Llama model?"),
    ],
)
def test_a_family_refuses_what_it_does_not_compute(family, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_model_config(golden_config(model_type=family, **changes))


def test_defaults_of_a_family_are_those_of_transformers():
    without = golden_config(model_type="qwen3", head_dim="absent")
    assert read_model_config(without).head_dim == 128
    without = golden_config(model_type="llama", rope_parameters="absent")
    assert read_model_config(without).rope_theta == 1e4


def test_a_yarn_scaling_lengthens_the_context_that_config_json_states():
    """Qwen's instructions for 128k tokens add the scaling and leave max_position_embeddings as it was."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = read_model_config(golden_config(rope_scaling=yarn, max_position_embeddings=64))
    assert config.max_position_embeddings == 256
    assert config.rope_scaling == Yarn(factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("model_type", ["mistral", None, 3])
def test_read_model_config_unknown_family_names_those_that_are_computed(model_type):
    with pytest.raises(ValueError, match=re.escape(f"model_type is {model_type!r}") + ".*qwen2"):
        read_model_config(golden_config(model_type=model_type))
