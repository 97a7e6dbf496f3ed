"""Adapters: their gradient and update in closed form, the reference inside the policy, their shards, and PEFT files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_models import TINY, random_adapter, random_params
from fake_programs import tiny_programs
from flax import traverse_util
from jax.sharding import PartitionSpec as PS
from safetensors.numpy import load_file, save_file

from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.algorithm.packing import Packer
from xpo_jax.algorithm.update import gather_pair_targets, make_accumulate, summarise, zeros
from xpo_jax.models import lora, registry
from xpo_jax.models.decoder_family import unstack
from xpo_jax.models.hf import adapter
from xpo_jax.models.lora import LoRA
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Pairs, Prompts

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = LoRA(rank=4, alpha=6.0, targets=ALL, rslora=False, start=None)
B, P, T = 8, 8, 8


def flat(tree):
    return traverse_util.flatten_dict(tree)


@functools.cache
def pairs():
    """Return pairs with verdicts, and reference log-probabilities that make the gradient of z nonzero."""
    rng = np.random.default_rng(0)
    return Pairs(
        rng.integers(3, 36, (B, P)).astype(np.int32),
        rng.integers(2, P + 1, B).astype(np.int32),
        rng.integers(3, 36, (2, B, T)).astype(np.int32),
        rng.integers(1, T + 1, (2, B)).astype(np.int32),
        rng.normal(-20, 3, (2, B)).astype(np.float32),
        np.float32([1, 0, 1, 0.5, 0.7, 0, 1, 1]),
        np.ones(B, np.float32),
        np.arange(B) < 7,
    )


def numbers(alpha=0.01, beta=0.1):
    batch = pairs()
    tokens = batch.lengths[0][batch.valid].sum()
    return [np.float32(x) for x in (batch.valid.sum(), tokens, alpha, beta)]


@functools.cache
def gradient_of(adapters):
    """Return (params, frozen) -> the gradient of the pairs' loss with respect to `params`, in float64."""
    graphdef, _ = registry.abstract_model(TINY, stacked=True, adapters=adapters)
    accumulate = make_accumulate(
        graphdef,
        Sigmoid(bonus_clip=500.0),
        entropy_weight=0.01,
        dtype=jnp.float64,
        temperature=0.8,
        vocab_size=36,
        chunk_tokens=32,
        table_gradient=not adapters.rank,
    )
    ((packed, index),) = Packer(B, (2 * T + P,), shards=1)(*pairs()[:4], pairs().valid)
    targets = gather_pair_targets(pairs(), index)

    def gradient(params, frozen):
        return accumulate(params, frozen, *zeros(params), packed, targets, *map(np.float64, numbers()))[0]

    def in_float64(*trees):
        with jax.enable_x64(True):
            return jax.device_get(jax.jit(gradient)(*jax.tree.map(np.float64, trees)))

    return in_float64


def close(ours, expected, rtol=1e-8):
    np.testing.assert_allclose(ours, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# ---- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_gradient_of_an_adapter_is_that_of_the_merged_weight_projected(rslora):
    """With G the gradient of W + s A B in a model without adapters: dA = s G B^T and dB = s A^T G."""
    adapters = dataclasses.replace(SMALL, rslora=rslora)
    scale = 3.0 if rslora else 1.5  # 6 / sqrt(4) and 6 / 4
    base, adapter_params = random_params(1, TINY), random_adapter(2, TINY, adapters)
    ab, merged = (flat(jax.tree.map(np.float64, tree)) for tree in (adapter_params, base))
    for path in [path for path in ab if path[-1] == "lora_a"]:
        delta = scale * ab[path] @ ab[(*path[:-1], "lora_b")]
        merged[(*path[:-1], "kernel")] = merged[(*path[:-1], "kernel")] + delta
    ours = flat(gradient_of(adapters)(adapter_params, base))
    full = flat(gradient_of(lora.OFF)(traverse_util.unflatten_dict(merged), {}))
    assert ours.keys() == ab.keys() and len(ours) == 2 * len(ALL)
    for path, gradient in ours.items():
        g = np.asarray(full[(*path[:-1], "kernel")])
        a, b = (ab[(*path[:-1], name)] for name in ("lora_a", "lora_b"))
        close(gradient, scale * (g @ b.swapaxes(1, 2) if path[-1] == "lora_a" else a.swapaxes(1, 2) @ g))


def test_update_of_an_adapter_is_the_projection_of_the_full_one_and_at_full_rank_all_of_it():
    """With A's columns orthonormal, B = 0 and scale 1, a step of gradient descent moves W by -rate A A^T G.

    A of 16 columns spans all 16 inputs of most maps, where A A^T G is G; down_proj has 24 inputs.
    """
    adapters = LoRA(rank=16, alpha=16.0, targets=ALL, rslora=False, start=None)
    base, rng = random_params(1, TINY), np.random.default_rng(3)
    start = flat(lora.initial(adapter.adapter_shapes(TINY, adapters), seed=0))
    for path, leaf in start.items():
        if path[-1] == "lora_a":
            start[path] = np.linalg.qr(rng.normal(size=leaf.shape))[0]
    params = traverse_util.unflatten_dict(start)
    descend = optax.sgd(0.5)
    updates, _ = descend.update(gradient_of(adapters)(params, base), descend.init(params), params)
    new = flat(optax.apply_updates(params, updates))
    full = flat(gradient_of(lora.OFF)(base, {}))
    for path, a in start.items():
        if path[-1] == "lora_b":
            continue
        moved = new[path] @ new[(*path[:-1], "lora_b")]  # from A 0
        step = -0.5 * np.asarray(full[(*path[:-1], "kernel")])
        close(moved, a @ a.swapaxes(1, 2) @ step, rtol=1e-6)  # optax computes in float32
        if path[-2] == "down_proj":
            assert np.abs(moved - step).max() > 0.1 * np.abs(step).max()
        else:
            close(moved, step, rtol=1e-6)


# ---- policy and reference -----------------------------------------------------------------------


def prompts():
    batch = pairs()
    rows = ({},) * B, ((),) * B
    return Prompts(
        *rows, batch.prompt_tokens, batch.prompt_lengths, np.arange(B, dtype=np.int32), batch.valid
    )


def compiled(**options):
    programs = tiny_programs(**options)
    for _, compile_program in programs.declared_programs():
        compile_program()
    return programs


def put_base(programs, params):
    """Return weights without adapters as a run holds them: unstacked, in the compute dtype, on the devices."""
    cast = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, programs.model.dtype)), unstack(params))
    return jax.device_put(cast, programs.model.model_sharding)


def put_adapter(programs, params):
    return jax.device_put(params, programs.model.params_sharding)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: np.dtype(d).name)
def test_adapter_that_is_off_is_the_reference_bit_for_bit_and_kl_is_zero(dtype):
    """A model without adapters samples and scores the same bits, and so does the update before the first step."""
    plain, adapted = compiled(dtype=dtype), compiled(dtype=dtype, lora=SMALL)
    base = random_params(1, TINY)
    first = lora.initial(adapted.model.params, seed=7)
    assert all(np.any(leaf) == (path[-1] == "lora_a") for path, leaf in flat(first).items())
    held = put_base(adapted, base)
    policy = adapted.policy(held, put_adapter(adapted, first))
    reference = put_base(plain, base)
    ours = adapted.sample(policy, prompts(), stream=Stream.TRAINING, step=0, candidate=0)
    expected = plain.sample(reference, prompts(), stream=Stream.TRAINING, step=0, candidate=0)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    packed = plain.pack_pairs(pairs())
    ref_logps = np.asarray(plain.score(reference, packed))
    np.testing.assert_array_equal(adapted.score(policy, packed), ref_logps)
    assert len(np.unique(ref_logps)) > B
    state = adapted.init(put_adapter(adapted, first))
    batch = pairs()._replace(ref_logps=ref_logps)
    _, sums, applied = adapted.update(state, adapted.for_update(held), batch, packed, 0.01, 0.1)
    metrics = summarise(jax.device_get(sums), 0.1)
    assert metrics["objective/kl"] == 0.0
    assert metrics["rewards/margins"] == 0.0 and metrics["rewards/chosen"] == 0.0
    assert float(applied["grad_norm"]) > 0


def test_policy_and_reference_share_the_arrays_of_the_base():
    programs = tiny_programs(lora=SMALL)
    programs.for_sampling.compile(programs.model.params)
    held = put_base(programs, random_params(1, TINY))
    first, second = (
        programs.policy(held, put_adapter(programs, random_adapter(seed, TINY, SMALL))) for seed in (0, 1)
    )
    for path, leaf in flat(held).items():
        assert flat(first)[path] is leaf and flat(second)[path] is leaf


def test_what_is_trained_is_one_selection_for_masters_gradients_optimizer_and_checkpoint():
    programs = tiny_programs(lora=SMALL)
    model, state = programs.model, programs.state
    expected = {("layers", *path) for path in adapter_paths()}
    assert set(flat(model.params)) == set(flat(state.params)) == set(flat(model.params_sharding)) == expected
    moments = jax.tree.leaves(state.opt_state)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.params))
    assert sorted(m.shape for m in moments if m.shape) == sorted(2 * shapes)  # Adam's two moments
    assert {leaf.shape for leaf in jax.tree.leaves(programs.abstract_state)} == {*shapes, ()}
    assert not expected & set(flat(model.frozen))
    plain = tiny_programs().model
    assert set(flat(model.frozen)) == set(flat(plain.params)) and plain.frozen == {}
    assert model.parameters == plain.parameters == plain.trained_parameters
    assert model.trained_parameters == sum(np.prod(shape) for shape in shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.frozen)} == {np.dtype(np.float32)}
    assert "accumulate W=16" in dict(programs.declared_programs())


def adapter_paths():
    part = lambda name: "self_attn" if name in ALL[:4] else "mlp"
    return {(part(name), name, side) for name in ALL for side in ("lora_a", "lora_b")}


# ---- meshes -------------------------------------------------------------------------------------


def test_adapters_are_split_like_the_rows_and_columns_of_their_maps():
    model = tiny_programs(lora=SMALL).model
    spec = lambda tree, name: {path[-1]: leaf.spec for path, leaf in flat(tree).items() if path[-2] == name}
    masters, weights = model.params_sharding, model.weights_sharding
    assert spec(masters, "q_proj") == {"lora_a": PS(None, "fsdp", None), "lora_b": PS(None, None, "tensor")}
    assert spec(masters, "down_proj") == {
        "lora_a": PS(None, "tensor", None),
        "lora_b": PS(None, None, "fsdp"),
    }
    assert spec(weights["layers"][0], "up_proj") == {
        "kernel": PS(None, "tensor"),
        "lora_a": PS(None, None),
        "lora_b": PS(None, "tensor"),
    }
    assert spec(model.frozen_sharding, "o_proj") == {"kernel": PS(None, "tensor", "fsdp")}


@functools.cache
def step_on(sizes):
    """Return what one step computes on a mesh: samples, scores, and the state after an update."""
    programs = compiled(lora=SMALL, sizes=sizes)
    held = put_base(programs, random_params(1, TINY))
    params = random_adapter(2, TINY, SMALL)
    policy = programs.policy(held, put_adapter(programs, params))
    samples = programs.sample(policy, prompts(), stream=Stream.TRAINING, step=0, candidate=0)
    packed = programs.pack_pairs(pairs())
    scores = programs.score(policy, packed)
    state = programs.init(put_adapter(programs, params))
    state, sums, _ = programs.update(state, programs.for_update(held), pairs(), packed, 0.01, 0.1)
    policy = programs.policy(held, state.params)
    return jax.device_get((samples, scores, sums, state.params, lora.OFF.trained(policy)))


def test_step_on_a_mesh_of_eight_equals_the_one_on_one_device():
    (samples, *ours), (expected, *alone) = step_on((2, 2, 2)), step_on((1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, samples, expected)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-4), ours, alone)
    moved = jax.tree.map(np.subtract, alone[2], random_adapter(2, TINY, SMALL))
    assert float(optax.tree.norm(moved)) > 0.1


# ---- targets and settings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), {"q_proj"}),
        (("self_attn.q_proj", "up_proj"), {"q_proj", "up_proj"}),
        ((r"self_attn\..*",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ((".*_proj",), set(ALL)),
    ],
)
def test_targets_match_names_and_ends_of_names(targets, expected):
    shapes = adapter.adapter_shapes(TINY, dataclasses.replace(SMALL, targets=targets))
    assert {path[-2] for path in flat(shapes)} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("(",)}, r"targets: '\(' is not a regular expression"),
        ({"rank": 0, "start": "x"}, "start is set, but rank is 0"),
    ],
)
def test_settings_out_of_range_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_target_that_names_no_map_lists_those_that_there_are():
    with pytest.raises(
        ValueError, match=r"lora.targets: 'proj', 'wq' names .* mlp.down_proj, .*self_attn.v_proj"
    ):
        adapter.adapter_shapes(TINY, dataclasses.replace(SMALL, targets=("wq", "q_proj", "proj")))


def test_rank_that_no_map_can_have_is_refused():
    """TINY's layers have k_proj as their narrowest map, and others as wide as the model."""
    full = TINY.hidden_size
    adapter.adapter_shapes(TINY, dataclasses.replace(SMALL, rank=full, targets=("k_proj", "q_proj")))
    with pytest.raises(ValueError, match=rf"lora.rank is {full + 1}, .* has a rank above {full}; lower it"):
        adapter.adapter_shapes(TINY, dataclasses.replace(SMALL, rank=full + 1, targets=("q_proj", "up_proj")))


def test_first_adapter_depends_on_the_seed_and_its_name_alone():
    shapes = adapter.adapter_shapes(TINY, SMALL)
    first, again, other = (lora.initial(shapes, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    few = lora.initial(adapter.adapter_shapes(TINY, dataclasses.replace(SMALL, targets=("v_proj",))), 0)
    a = lambda tree, name="v_proj": tree["layers"]["self_attn"][name]["lora_a"]
    np.testing.assert_array_equal(a(few), a(first))
    assert not np.array_equal(a(first), a(other)) and not np.array_equal(a(first), a(first, "k_proj"))
    assert 0.9 < np.abs(a(first)).max() * np.sqrt(16) <= 1.0


# ---- PEFT's files -------------------------------------------------------------------------------


def test_peft_folder_has_pefts_names_and_shapes_and_comes_back(tmp_path):
    params = random_adapter(0, TINY, SMALL)
    adapter.save_adapter(tmp_path, params, TINY, SMALL, "owner/base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    of_map = params["layers"]["mlp"]["down_proj"]
    np.testing.assert_array_equal(stored[name.format("A")], of_map["lora_a"][1].T)
    np.testing.assert_array_equal(stored[name.format("B")], of_map["lora_b"][1].T)
    assert len(stored) == 2 * 2 * len(ALL) and stored[name.format("A")].shape == (4, 24)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base" and config["r"] == 4
    assert config["lora_alpha"] == 6 and config["target_modules"] == sorted(ALL)
    jax.tree.map(np.testing.assert_array_equal, adapter.load_adapter(tmp_path, TINY, SMALL), params)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 8, "r is 8, but lora.rank is 4; set lora.rank"),
        ("lora_alpha", 16, "lora_alpha is 16, but lora.alpha is 6.0"),
        ("use_rslora", True, "use_rslora is True, but lora.rslora is False"),
        ("use_dora", True, "use_dora True: not computed"),
        ("bias", "all", "bias is 'all', which xpo_jax does not compute; merge"),
        ("peft_type", "IA3", "peft_type is 'IA3'"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("modules_to_save", ["lm_head"], r"modules_to_save \['lm_head'\]: not computed"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern"),
        ("alpha_pattern", {"q_proj": 2}, "alpha_pattern"),
        ("layers_to_transform", [0], "layers_to_transform"),
        ("fan_in_fan_out", True, "fan_in_fan_out"),
        ("lora_bias", True, "lora_bias"),
        ("a_field_of_the_future", 1, "a_field_of_the_future 1: not computed"),
    ],
)
def test_peft_folder_that_is_not_computed_is_refused_by_field(tmp_path, field, value, message):
    adapter.save_adapter(tmp_path, random_adapter(0, TINY, SMALL), TINY, SMALL, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=message) as raised:
        adapter.check_adapter(tmp_path, TINY, SMALL)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_peft_folder_with_ignored_fields_is_read(tmp_path):
    adapter.save_adapter(tmp_path, random_adapter(0, TINY, SMALL), TINY, SMALL, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.1, "rank_pattern": {}}))
    adapter.check_adapter(tmp_path, TINY, SMALL)


def test_peft_folder_of_other_tensors_is_refused(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        adapter.save_adapter(tmp_path / name, random_adapter(0, TINY, SMALL), TINY, SMALL, "base")
    fewer = dataclasses.replace(SMALL, targets=ALL[:-1])
    with pytest.raises(ValueError, match=r"4 unexpected: .*down_proj.* Set lora.targets"):
        adapter.check_adapter(tmp_path / "a", TINY, fewer)
    with pytest.raises(ValueError, match=r"mis-shaped: .* is \(4, 16\), not \(4, 32\)"):
        adapter.check_adapter(tmp_path / "a", dataclasses.replace(TINY, hidden_size=32), SMALL)
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    removed = sorted(stored)[0]
    bad = {name: array for name, array in stored.items() if name != removed}
    save_file(bad, tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"1 missing: {removed}"):
        adapter.check_adapter(tmp_path / "b", TINY, SMALL)
    stored[removed][0, 0] = np.inf
    save_file(stored, tmp_path / "c" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{removed} holds a number that is not finite"):
        adapter.load_adapter(tmp_path / "c", TINY, SMALL)
    (tmp_path / "d" / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="damaged or truncated"):
        adapter.check_adapter(tmp_path / "d", TINY, SMALL)
    (tmp_path / "d" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors"):
        adapter.check_adapter(tmp_path / "d", TINY, SMALL)
    with pytest.raises(ValueError, match=r"lora.start: .* has no adapter_config.json"):
        adapter.check_adapter(tmp_path / "absent", TINY, SMALL)
