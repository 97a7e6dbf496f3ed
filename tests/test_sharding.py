"""Meshes over eight devices: what is split how, and that no number depends on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_models import TINY, graphdef, random_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as PS

from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.logps import response_logps
from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.algorithm.model_spec import make_model_spec
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.packing import Packer, sequence_lengths
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import Vocabulary, make_sampler, row_keys
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.algorithm.update import gather_pair_targets, make_accumulate, zeros
from xpo_jax.models.decoder_family import unstack
from xpo_jax.models.hf.model_folder import param_shapes
from xpo_jax.models.qwen2 import FAMILY
from xpo_jax.runtime import sharding
from xpo_jax.values import Pairs

MESHES = [
    (8, 1, 1),
    (2, 2, 2),
    *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 8, 1), (1, 1, 8))),
]
# Eight key-value heads of two queries each: eight devices can share them.
CONFIG = dataclasses.replace(TINY, num_attention_heads=16, num_key_value_heads=8, head_dim=2)
B, P, T, SEED = 16, 8, 6, 11
ENDS = (30, 31, 32, 33, 37)
VOCABULARY = Vocabulary(size=38, end_tokens=ENDS, pad_token=37)
SAMPLING = CandidateSampling(
    max_new_tokens=T, temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
)
LOSS, ENTROPY_WEIGHT, CHUNK = Sigmoid(bonus_clip=500.0), 0.01, 32
SCORING = {"temperature": 0.9, "vocab_size": 38, "chunk_tokens": 32}


def mesh_of(sizes):
    return sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))


# ---- meshes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 1, 1), (8, 1, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, -1), (1, 1, 8)),
        ((-1, 8, 1), (1, 8, 1)),
    ],
)
def test_sizes_of_a_mesh(sizes, expected):
    mesh = mesh_of(sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == expected
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 1, 1), "mesh: data 4 x fsdp 1 x tensor 1 is not the 8 device(s) here"),
        ((16, 1, 1), "mesh: data 16 x fsdp 1 x tensor 1 is not the 8 device(s) here"),
        ((-1, 3, 1), "mesh: data -1 x fsdp 3 x tensor 1 is not the 8 device(s) here"),
        ((-1, -1, 1), "mesh: sizes are positive and at most one is -1"),
        ((8, 0, 1), "mesh: sizes are positive and at most one is -1"),
        ((-2, 2, 2), "mesh: sizes are positive and at most one is -1"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError) as raised:
        mesh_of(sizes)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


# ---- rules --------------------------------------------------------------------------------------


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_the_first_rule_whose_pattern_is_found_counts():
    mesh = mesh_of((2, 2, 2))
    rules = [(r"head\.kernel", ("tensor", None)), (r"kernel", (None, "fsdp")), (r".", (None,))]
    tree = {
        "head": {"kernel": leaf(4, 6)},
        "layers": {0: {"kernel": leaf(4, 6)}},
        "bias": leaf(3),
        "n": leaf(),
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(mesh, tree, rules))
    assert specs == {
        "head": {"kernel": PS("tensor", None)},
        "layers": {0: {"kernel": PS(None, "fsdp")}},
        "bias": PS(None),
        "n": PS(),
    }


def test_a_leaf_with_fewer_axes_takes_the_last_ones_and_axes_can_be_left_out():
    mesh = mesh_of((2, 2, 2))
    rules = [(r"w", (None, "fsdp", "tensor"))]
    split = lambda shape, **options: sharding.shardings(mesh, {"w": leaf(*shape)}, rules, **options)["w"].spec
    assert split((3, 4, 4)) == PS(None, "fsdp", "tensor")
    assert split((4, 4)) == PS("fsdp", "tensor")
    assert split((4, 4), leave_out=("fsdp",)) == PS(None, "tensor")
    assert split((3, 4), leave_out=("fsdp",)) == PS(None, "tensor")  # three rows need not be divisible


def test_shardings_list_every_leaf_without_a_rule_and_every_axis_that_does_not_divide():
    mesh = mesh_of((2, 2, 2))
    rules = [(r"kernel", ("fsdp", "tensor")), (r"embedding", ("tensor", "fsdp"))]
    tree = {"q": {"kernel": leaf(3, 5)}, "norm": {"scale": leaf(4)}, "bias": leaf(2), "embedding": leaf(4, 7)}
    tree["deep"] = {"kernel": leaf(2, 2, 2)}
    with pytest.raises(ValueError) as raised:
        sharding.shardings(mesh, tree, rules)
    assert set(str(raised.value).split("; ")) == {
        "q.kernel: 3 is not divisible by mesh.fsdp=2",
        "q.kernel: 5 is not divisible by mesh.tensor=2",
        "no sharding rule covers norm.scale (4,)",
        "no sharding rule covers bias (2,)",
        "embedding: 7 is not divisible by mesh.fsdp=2",
        "deep.kernel: its rule has 2 axes, it has 3",
        "sizes that would work on 8 devices: mesh.fsdp 1, mesh.tensor 1",
    }
    many = {f"w{i}": leaf(2) for i in range(12)}
    with pytest.raises(ValueError, match=r"; and 4 more$"):
        sharding.shardings(mesh, many, rules)


def test_rules_of_qwen2_cover_tied_and_untied_models_and_their_optimizer_state():
    for tied in (True, False):
        params = param_shapes(dataclasses.replace(TINY, tie_word_embeddings=tied))
        state = jax.eval_shape(optax.adamw(1e-3).init, params)
        split = sharding.shardings(mesh_of((2, 2, 2)), (params, state), FAMILY.sharding)
        specs = jax.tree.map(lambda s: s.spec, split)
        assert specs[0] == specs[1][0].mu == specs[1][0].nu
        assert ("lm_head" in params) is not tied


# ---- programs on meshes ---------------------------------------------------------------------------


@functools.cache
def optimizer():
    return make_optimizer(
        name="adamw",
        learning_rate=1e-2,
        schedule="constant",
        warmup_steps=0,
        b1=0.9,
        b2=0.99,
        eps=1e-4,  # so that rounding does not turn into whole steps where a gradient is near zero
        mu_dtype="float32",
        weight_decay=0.0,
        clip_norm=1.0,
        steps=4,
    )


@functools.cache
def master():
    """Return the parameters, on the host."""
    return random_params(0, CONFIG)


@functools.cache
def batch():
    """Return pairs with verdicts, two of which failed, and two padding rows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 36, (B, P)).astype(np.int32)
    prompt_lengths = rng.integers(2, P + 1, B).astype(np.int32)
    drawn = rng.integers(0, 36, (2, B, T)).astype(np.int32)
    lengths = rng.integers(1, T + 1, (2, B)).astype(np.int32)
    ref_logps = rng.normal(-20, 3, (2, B)).astype(np.float32)
    p_first = np.array([1, 0, 1, 0.5, 0.7, 0, 1, 1] * 2, np.float32)
    weight, valid = np.array([1, 1, 0, 1, 1, 1, 1, 1] * 2, np.float32), np.arange(B) < 14
    return Pairs(tokens, prompt_lengths, drawn, lengths, ref_logps, p_first, weight, valid)


def numbers():
    pairs = batch()
    policy_tokens = pairs.lengths[0][pairs.valid].sum()
    return [np.float32(x) for x in (pairs.valid.sum(), policy_tokens, 0.01, 0.1)]


@functools.cache
def on(sizes):
    """Return all programs of a run, declared and compiled for one shape."""
    spec = make_model_spec(
        mesh_of(sizes), CONFIG, dtype=jnp.float32, remat=False, batch_size=B, prompt_tokens=P
    )
    programs = Programs(
        spec,
        BatchShapes(batch_size=B, prompt_buckets=(P,), micro_batch_rows=1, chunk_tokens=CHUNK),
        SAMPLING,
        VOCABULARY,
        optimizer=optimizer(),
        loss=LOSS,
        entropy_weight=ENTROPY_WEIGHT,
        seed=SEED,
    )
    for _, compile_program in programs.declared_programs():
        compile_program()
    return programs


def step_5():
    """Return stream, step of each row, and candidates."""
    return np.int32(1), np.full(B, 5, np.int32), np.int32([0])


@functools.cache
def results(sizes):
    """Return everything that one step computes."""
    programs, pairs = on(sizes), batch()
    params = jax.device_put(master(), programs.model.params_sharding)
    weights = programs.for_sampling(params)
    prompts = (pairs.prompt_tokens, pairs.prompt_lengths)
    sample = programs.sample_rows(weights, *prompts, pairs.valid, np.arange(B, dtype=np.int32), *step_5())
    packed = programs.pack_pairs(pairs)
    logps = programs.score(weights, packed)
    state = programs.init(jax.device_put(master(), programs.model.params_sharding))  # it is donated
    grads, sums = programs.zeros(state.params)
    for slots, index in packed:
        targets = gather_pair_targets(pairs, index)
        grads, sums = programs.accumulate(state.params, {}, grads, sums, slots, targets, *numbers())
    grads_on_host = jax.device_get(grads)
    new, applied = programs.apply(state, grads, sums["loss"])
    return {
        "params": params,
        "weights": weights,
        "sample": sample,
        "logps": logps,
        "grads": grads_on_host,
        "grads_sharding": jax.tree.map(lambda x: x.sharding, grads),
        "sums": jax.device_get(sums),
        "state": new,
        "applied": jax.device_get(applied),
    }


@functools.cache
def on_one_device():
    """Return the results of the same functions under plain jax.jit, without mesh or shardings."""
    stacked, unstacked = graphdef(CONFIG, stacked=True), graphdef(CONFIG, stacked=False)
    params, pairs, (transformation, _) = master(), batch(), optimizer()
    prompts = (pairs.prompt_tokens, pairs.prompt_lengths)
    draw = make_sampler(unstacked, SAMPLING, vocab_size=38, end_tokens=ENDS, pad_token=37)
    keys = row_keys(SEED, 1, 5, np.arange(B), 0)
    sample = jax.jit(draw)(unstack(params), *prompts, pairs.valid, keys)
    logps = jax.jit(functools.partial(response_logps, stacked, **SCORING))(
        params, *prompts, pairs.tokens, pairs.lengths
    ).logps
    accumulate = make_accumulate(stacked, LOSS, entropy_weight=ENTROPY_WEIGHT, dtype=jnp.float32, **SCORING)

    # a row for every pair: one micro-batch
    ((packed, index),) = Packer(B, sequence_lengths(P, T)[-1:], shards=1)(*pairs[:4], pairs.valid)

    @jax.jit
    def step(params):
        grads, sums = accumulate(
            params, {}, *zeros(params), packed, gather_pair_targets(pairs, index), *numbers()
        )
        updates, _ = transformation.update(grads, transformation.init(params), params)
        return grads, sums, optax.apply_updates(params, updates)

    grads, sums, new = step(params)
    assert all(x.sharding.num_devices == 1 for x in jax.tree.leaves((sample, logps, grads, new)))
    return jax.device_get((sample, logps, grads, sums, new))


def close(ours, expected, rtol=1e-5):
    """Assert that every leaf is within rtol of its own largest value."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("sizes", MESHES)
def test_a_step_gives_the_same_numbers_on_every_mesh(sizes):
    got, (sample, logps, grads, sums, params) = results(sizes), on_one_device()
    for array, expected_array in zip(jax.device_get(got["sample"]), sample, strict=True):
        np.testing.assert_array_equal(array, expected_array)
    assert len(np.unique(sample.lengths)) > 2 and 0 < sample.finished.sum() < B
    close(got["logps"], np.where(batch().valid, logps, 0))  # padding rows are not scored
    close(got["sums"], sums)  # half as many rows as on one device, with two pairs in some
    close(got["grads"], grads, rtol=3e-5)
    close(got["state"].params, params, rtol=1e-4)
    assert got["applied"]["finite"]
    assert got["applied"]["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    moved = optax.tree.norm(jax.tree.map(np.subtract, params, master()))
    assert float(moved) > 0.1


# How a (2, 2, 2) mesh splits the master weights; the sampling weights have no fsdp and no layer axis.
MASTER = {
    "embed_tokens.embedding": PS("tensor", "fsdp"),
    "layers.input_layernorm.scale": PS(None, None),
    "layers.mlp.down_proj.kernel": PS(None, "tensor", "fsdp"),
    "layers.mlp.gate_proj.kernel": PS(None, "fsdp", "tensor"),
    "layers.mlp.up_proj.kernel": PS(None, "fsdp", "tensor"),
    "layers.post_attention_layernorm.scale": PS(None, None),
    "layers.self_attn.k_proj.bias": PS(None, "tensor"),
    "layers.self_attn.k_proj.kernel": PS(None, "fsdp", "tensor"),
    "layers.self_attn.o_proj.kernel": PS(None, "tensor", "fsdp"),
    "layers.self_attn.q_proj.bias": PS(None, "tensor"),
    "layers.self_attn.q_proj.kernel": PS(None, "fsdp", "tensor"),
    "layers.self_attn.v_proj.bias": PS(None, "tensor"),
    "layers.self_attn.v_proj.kernel": PS(None, "fsdp", "tensor"),
    "norm.scale": PS(None),
}


def named(tree):
    return dict(zip(jax.tree.leaves(sharding.paths(tree)), jax.tree.leaves(tree), strict=True))


@pytest.mark.parametrize("sizes", MESHES)
def test_master_weights_gradients_and_optimizer_are_split_alike_in_and_out(sizes):
    got, mesh = results(sizes), mesh_of(sizes)
    state = got["state"]
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)
    adam = next(filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam)))
    for name, expected in MASTER.items():
        wanted = NamedSharding(mesh, expected)
        for tree in (got["params"], state.params, adam.mu, adam.nu):
            array = named(tree)[name]
            assert array.sharding.is_equivalent_to(wanted, array.ndim), name
            shards = {shard.data.shape for shard in array.addressable_shards}
            split = [1 if axis is None else mesh.shape[axis] for axis in expected]
            assert shards == {tuple(size // by for size, by in zip(array.shape, split, strict=True))}
        assert named(got["grads_sharding"])[name].is_equivalent_to(wanted, len(expected))
    assert set(named(state.params)) == set(MASTER)
    assert state.step.sharding.is_fully_replicated


@pytest.mark.parametrize("sizes", MESHES)
def test_sampling_weights_are_split_over_tensor_alone_and_the_batch_over_data_and_fsdp(sizes):
    got, mesh = results(sizes), mesh_of(sizes)
    data, fsdp, tensor = sizes
    for name, array in named(got["weights"]).items():
        parts = name.split(".")
        unstacked = parts[0] == "layers"
        master = MASTER[".".join(parts[:1] + parts[2:]) if unstacked else name]
        spec = PS(*(None if axis == "fsdp" else axis for axis in (master[1:] if unstacked else master)))
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), name
        pieces = tensor if "tensor" in spec else 1
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // pieces}
    for array in got["sample"]:
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {B // (data * fsdp)}
    assert got["logps"].sharding.is_fully_replicated  # for the host, which shards it again


def test_a_shape_that_was_not_declared_is_refused():
    programs, pairs = on((8, 1, 1)), batch()
    weights = results((8, 1, 1))["weights"]
    with pytest.raises(RuntimeError, match="program 'sample' was not compiled for shapes"):
        programs.sample_rows(
            weights, pairs.prompt_tokens[:, :4], pairs.prompt_lengths, pairs.valid, np.arange(B), *step_5()
        )


def test_each_declared_program_is_one_compilation():
    labels = [label for label, _ in on((8, 1, 1)).declared_programs()]
    assert labels == [
        "init",
        "for_sampling",
        "fingerprint",
        "zeros",
        "apply",
        "sample P=8",
        "score W=16",
        "accumulate W=16",
        "score W=24",
        "accumulate W=24",
    ]
