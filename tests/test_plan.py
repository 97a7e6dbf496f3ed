"""tools.plan: its bytes against arithmetic by hand and against XLA's allocations, its FLOPs and floors by hand."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from fake_models import TINY
from jax.sharding import AbstractMesh, AxisType
from tiny_run import ADAMW as RUN_ADAMW
from tiny_run import tiny_config, write_config

from tools import plan
from tools.planner import estimate, fit, saved, work
from tools.planner.fit import Source, remedies, setup
from tools.planner.hardware import DEVICES, MODELS, SIZES, size_of
from tools.planner.judge import Judge
from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.algorithm.model_spec import make_model_spec
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.packing import MIN_MEAN_SLOTS, sequence_lengths
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import Vocabulary
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.models.attention_kernels import choose
from xpo_jax.models.lora import LoRA
from xpo_jax.runtime import sharding

REPOSITORY = Path(__file__).parents[1]
CONFIG = f"--config={REPOSITORY / 'configs' / 'paraphrase.py'}"
LARGER = dataclasses.replace(
    TINY,
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    head_dim=32,
)
ADAMW = {"name": "adamw", "b1": 0.9, "b2": 0.99, "eps": 1e-8, "mu_dtype": "float32"}
ADAFACTOR = {"name": "adafactor", "b1": None, "b2": None, "eps": None, "mu_dtype": None}


def optimizer(fields=ADAMW):
    rest = {
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    return make_optimizer(**fields, **rest, steps=4)


def planned(sizes=(1, 1, 1), model=TINY, B=16, P=8, T=6, **changes):
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    options = {
        "micro_batch_rows": B // (sizes[0] * sizes[1]),
        "chunk_tokens": 512,
        "remat": False,
        "optimizer": optimizer()[0],
    } | changes
    return estimate.Setup(model, mesh, jnp.float32, P, T, B, **options)


def compiled(s, which, fields=ADAMW):
    """XLA's memory analysis of one program of a run."""
    count = s.mesh.size
    mesh = jax.make_mesh(
        tuple(s.mesh.shape.values()),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:count],
    )
    spec = make_model_spec(
        mesh,
        s.model,
        dtype=s.dtype,
        remat=s.remat,
        batch_size=s.batch_size,
        prompt_tokens=s.prompt_tokens,
        attention=s.kernels.long,
        lora=s.lora,
    )
    programs = Programs(
        spec,
        BatchShapes(
            batch_size=s.batch_size,
            prompt_buckets=(s.prompt_tokens,),
            micro_batch_rows=s.micro_batch_rows,
            chunk_tokens=s.chunk_tokens,
            prefill_rows=s.prefill_rows,
        ),
        CandidateSampling(
            max_new_tokens=s.response_tokens,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
        ),
        Vocabulary(s.model.vocab_size, (1,), 0),
        optimizer=optimizer(fields),
        loss=Sigmoid(bonus_clip=500.0),
        entropy_weight=0.0,
        seed=0,
    )
    *_, widest = (call for label, call in programs.declared_programs() if label.split()[0] == which)
    return widest().memory_analysis()


# ---- counts -------------------------------------------------------------------------------------


PUBLISHED = {
    "0.5B": (0.49, 494_032_768),
    "1.5B": (1.54, 1_543_714_304),
    "3B": (3.09, 3_085_938_688),
    "7B": (7.61, 7_615_616_512),
    "14B": (14.7, 14_770_033_664),
    "32B": (32.5, 32_763_876_352),
    "72B": (72.7, 72_706_203_648),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_all_sizes_are_the_published_ones(size):
    """The models' cards have rounded numbers, the weight files the exact ones."""
    billions, exact = PUBLISHED[size]
    assert estimate.parameters(SIZES[size]) == exact
    assert exact / 1e9 == pytest.approx(billions, rel=0.01)


# of the files on the hub
PUBLISHED_OTHERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Meta-Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct@main": 1_711_376_384,
}


@pytest.mark.parametrize("name", PUBLISHED_OTHERS)
def test_parameters_of_other_families_are_the_published_ones(name):
    assert estimate.parameters(size_of(name)) == PUBLISHED_OTHERS[name]
    assert len(PUBLISHED_OTHERS) + len(SIZES) == sum(map(len, MODELS.values()))


def test_size_of_model_names():
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-Coder-0.5B", "qwen2.5-0.5b", "Qwen/Qwen2-0.5B@main"):
        assert size_of(name) is SIZES["0.5B"]
    for name in ("Qwen2.5-0.6B", "Qwen3-0.5B", "0.5B", "embedded"):
        assert size_of(name) is None


# ---- bytes --------------------------------------------------------------------------------------


def test_memory_of_a_tiny_model_on_a_mesh_by_hand():
    """Vocabulary 40, width 16, features 24, 2 layers, 4 heads of 4 over 2 of keys; every axis of the mesh is 2."""
    phases = estimate.memory(planned((2, 2, 2)))
    layer = 2 * 16 + (64 + 8) + 2 * (32 + 4) + 64 + 3 * 96  # norms; q, k and v with biases; o; the MLP
    masters = 4 * (40 * 16 // 4 + 2 * layer + 16)
    layer = 2 * 16 + (128 + 8) + 2 * (64 + 4) + 128 + 3 * 192  # not sharded over fsdp
    copy = 4 * (40 * 16 // 2 + 2 * layer + 16)
    for phase in phases.values():
        assert phase["master weights"] == masters
        assert phase["optimizer state"] == 2 * masters + 2 * 4  # two moments, two counts
        assert phase["reference"] == copy
    assert {name for name, parts in phases.items() if "policy, for sampling" in parts} == {"sample", "score"}
    assert phases["sample"]["policy, for sampling"] == copy
    rows, a_token = 16 // 4, 2 * 2 * 1 * 4 * 4  # keys and values, layers, one head of four float32
    assert phases["sample"]["KV cache"] == rows * (8 + 6) * a_token
    prefetching = estimate.memory(planned((2, 2, 2), reference_steps=3))  # samples of three steps
    assert prefetching["sample"]["KV cache"] == 3 * phases["sample"]["KV cache"]
    assert {**prefetching, "sample": None} == {**phases, "sample": None}
    candidates = estimate.memory(
        planned((2, 2, 2), candidates=3)
    )  # from one prefill, whose caches are copied
    assert candidates["sample"]["KV cache"] == 3 * phases["sample"]["KV cache"] + rows * 8 * a_token
    assert {**candidates, "sample": None} == {**phases, "sample": None}
    assert phases["gradient"]["gradients"] == phases["apply"]["gradients"] == masters
    assert (
        estimate.memory(planned((2, 2, 2), remat=True))["gradient"]["activations"]
        >= 2 * rows * 24 * 16 * 4  # a row is 8 + 2 * 5 slots wide, in multiples of eight
    )
    separate = estimate.memory(planned((2, 2, 2), judge=Judge(TINY, 8, 32, 2)))
    assert list(separate) == ["sample", "score", "judge", "gradient", "apply"]
    assert {parts["judge"] for parts in separate.values()} == {copy}
    shared = estimate.memory(planned((2, 2, 2), judge=Judge(None, 8, 32, 1)))
    assert separate["judge"]["KV cache"] == shared["judge"]["KV cache"] == 2 * 32 * a_token
    assert all("judge" not in parts for parts in shared.values())


def test_reasoning_judge_is_planned_as_the_sampler_of_its_rows():
    """Its keys and values are those of the prompts and of what it writes; its work that of the policy's samples."""
    setup = dataclasses.replace(planned((2, 2, 2)), prompt_tokens=32, response_tokens=16, batch_size=8)
    judge = Judge(None, 8, 32, 2, new_tokens=16)
    memory = estimate.memory(dataclasses.replace(setup, judge=judge))
    assert (
        memory["judge"]["KV cache"]
        == memory["sample"]["KV cache"]
        == 2 * (32 + 16) * estimate.kv_bytes_per_token(estimate.local(TINY, setup.mesh), setup.itemsize)
    )
    assert memory["judge"]["one layer"] == memory["sample"]["one layer"]
    phases = work.flops(dataclasses.replace(setup, judge=judge))
    assert phases["judge"] == phases["sample"]  # two comparisons for each prompt, as many as candidates


def test_reasoning_judge_of_a_config_is_planned_with_its_votes_and_what_it_writes(tmp_path):
    file = tmp_path / "reasoned.py"
    judge = {"name": "reasoning", "path": None, "batch_size": 4, "buckets": (64,), "votes": 3}
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from configs.paraphrase import get_config as shipped\n\n\n"
        "def get_config(arg):\n"
        f"    config = shipped()\n    config.judge = ConfigDict({judge | {'sampling': {'max_new_tokens': 16}}!r})\n"
        "    return config\n"
    )
    planned, _ = setup(Source(str(file), (), 1, None, "cpu"))
    assert planned.judge == Judge(None, 4, 64, 3, new_tokens=16)


def batch_bytes(s):
    """The arguments of sample and accumulate besides weights: one device's shard of a batch, and scalars."""
    rows, P = s.batch_size // s.shards, s.prompt_tokens
    slots = s.micro_batch_rows * sequence_lengths(P, s.response_tokens)[-1]
    pairs = slots // MIN_MEAN_SLOTS
    scalars = (14 + 4) * 4  # the sums; rows, alpha and beta, and the policy's tokens
    update = 7 * 4 * slots + pairs * (2 * 4 + 2 * 4 + 4 + 4 + 1) + scalars
    return rows * (P + 1) * 4 + rows * (1 + 4 + 4) + 2 * 4, update


def check_arguments(s):
    phases = estimate.memory(s)
    sample, accumulate = batch_bytes(s)
    assert compiled(s, "sample").argument_size_in_bytes == phases["sample"]["policy, for sampling"] + sample
    update = phases["gradient"]["master weights"] + phases["gradient"]["gradients"] + accumulate
    assert compiled(s, "accumulate").argument_size_in_bytes == update


@pytest.mark.parametrize(("sizes", "fields"), [((2, 2, 2), ADAMW), ((1, 8, 1), ADAFACTOR)])
def test_memory_of_weights_is_that_of_the_compiled_programs(sizes, fields):
    s = planned(sizes, optimizer=optimizer(fields)[0])
    if fields is ADAMW:
        check_arguments(s)
    parts = estimate.memory(s)["apply"]
    apply = sum(parts[part] for part in ("master weights", "optimizer state", "gradients"))
    assert compiled(s, "apply", fields).argument_size_in_bytes == apply + 3 * 4  # step, skipped, loss


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4)])
def test_memory_of_7b_weights_is_that_of_the_compiled_programs(sizes):
    """Compiled from shapes alone; no array of this size is allocated."""
    check_arguments(dataclasses.replace(planned(sizes, model=SIZES["7B"], P=32, T=16), dtype=jnp.bfloat16))


def adapters(rank):
    return LoRA(rank=rank, alpha=32.0, targets=(".*_proj",), rslora=False, start=None)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1)])
def test_memory_of_adapters_is_that_of_the_compiled_programs(sizes):
    """The base once, in the compute dtype, beside it the adapters; and stacked while an update runs."""
    s = planned(sizes, lora=adapters(4))
    phases, full = estimate.memory(s), estimate.memory(planned(sizes))
    sample, accumulate = batch_bytes(s)
    assert (
        phases["sample"]["reference"]
        == full["sample"]["reference"] + phases["sample"]["policy, for sampling"]
    )
    assert compiled(s, "sample").argument_size_in_bytes == phases["sample"]["reference"] + sample
    parts = phases["gradient"]
    trained, stacked = parts["master weights"] + parts["gradients"], parts["base, stacked"]
    assert compiled(s, "accumulate").argument_size_in_bytes == trained + stacked + accumulate
    memory = compiled(s, "stack")
    assert memory.argument_size_in_bytes == full["sample"]["reference"]
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= stacked + 8 * 64  # a table of pointers
    apply = sum(phases["apply"][part] for part in ("master weights", "optimizer state", "gradients"))
    assert compiled(s, "apply").argument_size_in_bytes == apply + 3 * 4  # step, skipped, loss
    a_layer = 4 * (6 * 16 + 24) + 4 * (2 * 16 + 2 * 8 + 2 * 24 + 16)  # A of seven maps, and B
    if sizes == (1, 1, 1):
        assert phases["apply"]["gradients"] == 4 * 2 * a_layer


def test_plan_of_7b_with_adapters_fits_one_gpu_of_80_gb(capsys):
    """Batches of 64 prompts of 1,024 tokens and responses of 128, rank 16, with the judge of the config."""
    config = "--config=paraphrase:Qwen/Qwen2.5-7B-Instruct"
    arguments = [config, "--devices=1", "--device=h100-80gb"]
    assert plan.main([*arguments, "--config.lora.rank=16"]) == 0
    out = capsys.readouterr().out
    assert "64 prompts of 1024 tokens, responses of 128" in out and "LoRA of rank 16" in out
    assert "fits: 46.54 of 74.51 GiB at the peak (sample)" in out
    assert plan.main([*arguments]) == 1


BLOCKS = choose("blocks", "cpu")
WHOLE_RUN = ("master weights", "optimizer state", "reference", "policy, for sampling", "gradients")
WHOLE_RUN += ("base, stacked",)
PHASES = {"sample": "sample", "score": "score", "accumulate": "gradient", "apply": "apply"}


def working(s, program):
    """The bytes of a phase besides what exists during the whole run."""
    return sum(size for part, size in estimate.memory(s)[PHASES[program]].items() if part not in WHOLE_RUN)


SHAPES = [(8, 64, 64), (8, 64, 128), (8, 128, 64), (4, 256, 32), (4, 32, 256)]


@pytest.mark.parametrize(
    ("program", "remat", "B", "P", "T"),
    [
        ("sample", False, 8, 64, 64),
        ("score", False, 8, 64, 64),
        ("accumulate", True, 2, 16, 16),  # mostly gradients of weights
        ("accumulate", True, 8, 64, 128),
        *[
            pytest.param(program, remat, *shape, marks=pytest.mark.slow)
            for shape in SHAPES
            for program, remat in (
                ("sample", False),
                ("score", False),
                ("accumulate", False),
                ("accumulate", True),
            )
        ],
        *[
            pytest.param("accumulate", True, *shape, marks=pytest.mark.slow)
            for shape in SHAPES
            if shape != (8, 64, 128)
        ],
        pytest.param("apply", False, 8, 64, 64, marks=pytest.mark.slow),
    ],
)
def test_memory_of_temporaries_is_what_xla_allocates(program, remat, B, P, T):
    s = planned(model=LARGER, B=B, P=P, T=T, remat=remat)
    assert 0.8 < working(s, program) / compiled(s, program).temp_size_in_bytes < 1.25


@pytest.mark.parametrize(
    ("program", "remat", "B", "P", "T"),
    [
        ("accumulate", True, 8, 64, 128),
        pytest.param("sample", False, 8, 64, 64, marks=pytest.mark.slow),
        pytest.param("score", False, 8, 64, 64, marks=pytest.mark.slow),
        pytest.param("accumulate", False, 8, 64, 128, marks=pytest.mark.slow),
        pytest.param("accumulate", True, 4, 256, 32, marks=pytest.mark.slow),
    ],
)
def test_memory_of_temporaries_with_adapters_is_what_xla_allocates(program, remat, B, P, T):
    s = planned(model=LARGER, B=B, P=P, T=T, remat=remat, lora=adapters(16))
    assert 0.8 < working(s, program) / compiled(s, program).temp_size_in_bytes < 1.25


@pytest.mark.parametrize(
    ("program", "remat", "B", "P", "prefill_rows"),
    [
        ("sample", False, 4, 512, 1),
        pytest.param("sample", False, 8, 1024, 2, marks=pytest.mark.slow),
        pytest.param("sample", False, 2, 1024, None, marks=pytest.mark.slow),
        pytest.param("score", False, 2, 1024, None, marks=pytest.mark.slow),
        pytest.param("accumulate", False, 2, 1024, None, marks=pytest.mark.slow),
        pytest.param("accumulate", True, 2, 1024, None, marks=pytest.mark.slow),
    ],
)
def test_memory_of_blocks_and_sub_batches_is_what_xla_allocates(program, remat, B, P, prefill_rows):
    s = planned(model=LARGER, B=B, P=P, T=32, remat=remat, prefill_rows=prefill_rows, kernels=BLOCKS)
    assert 0.8 < working(s, program) / compiled(s, program).temp_size_in_bytes < 1.25


def test_memory_of_cudnn_is_that_of_blocks_with_a_copy_of_the_prompts_and_masks_of_packed_rows():
    """It has no scores at all; what it needs on a GPU beside that has not been measured."""
    blocks, cudnn = (
        planned(model=LARGER, B=4, P=512, T=32, remat=True, kernels=choose(name, "gpu"))
        for name in ("blocks", "cudnn")
    )
    fewer, more = estimate.memory(blocks), estimate.memory(cudnn)
    prompts = 4 * 512 * estimate.kv_bytes_per_token(LARGER, 4)
    assert more["sample"]["KV cache"] - fewer["sample"]["KV cache"] == prompts
    assert more["gradient"] == fewer["gradient"] and more["apply"] == fewer["apply"]
    of_rows, of_prompts = (
        [estimate._score_bytes(s, LARGER, 4, 512, queries, 2) for s in (cudnn, blocks)]
        for queries in (128, 512)
    )
    assert of_rows[0] - of_rows[1] == 4 * 512 * 512 * 3 and of_prompts[0] == of_prompts[1]


@pytest.mark.parametrize(
    ("devices", "kernel"),
    [
        (["--device=h100-80gb"], "cudnn"),
        (["--topology=h200x1"], "cudnn"),
        (["--device=tpu-v5e"], "splash"),
        (["--topology=v5e-1"], "splash"),
        ([], "cudnn"),
        (["--device=h200", "--config.model.dtype=float32"], "blocks"),
    ],
)
def test_plan_of_auto_attention_is_that_of_the_devices(devices, kernel):
    source, *_ = plan.parse([CONFIG, *devices])
    assert setup(source)[0].kernels.at(8192) == kernel


@pytest.mark.slow
@pytest.mark.parametrize("program", ["sample", "score", "accumulate"])
def test_memory_of_long_prompts_is_linear_in_their_length(program, capsys):
    """XLA's temporaries for one prompt of 2,048, 4,096 and 8,192 tokens."""
    lengths = (2048, 4096, 8192)
    setups = [planned(model=LARGER, B=1, P=P, T=32, remat=True, kernels=BLOCKS) for P in lengths]
    sizes = [compiled(s, program).temp_size_in_bytes for s in setups]
    with capsys.disabled():
        print(f"\n{program}: {', '.join(f'{size / 2**20:.1f}' for size in sizes)} MiB at {lengths} tokens")
    # not twice from the first to the second, because XLA lays 2,048 tokens out in less; quadratic would be 4 and 16
    assert sizes[2] < 2.1 * sizes[1] and sizes[2] < 5.2 * sizes[0]
    for s, size in zip(setups, sizes, strict=True):
        assert 0.75 < working(s, program) / size < 1.35


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("remat", [False, True])
def test_memory_of_the_update_on_a_mesh_is_what_xla_allocates(sizes, remat):
    s = planned(sizes, model=LARGER, B=64, P=64, T=64, remat=remat, chunk_tokens=2048)
    assert 0.8 < working(s, "accumulate") / compiled(s, "accumulate").temp_size_in_bytes < 1.35


@pytest.mark.slow
def test_saved_bytes_of_more_pairs_are_what_xla_allocates_for_them():
    """The peak is in the layers' backward pass: 8 more pairs need what they save, and the gradients in their MLP."""
    few, many = (planned(model=LARGER, B=B, P=64, T=64) for B in (8, 16))
    more = compiled(many, "accumulate").temp_size_in_bytes - compiled(few, "accumulate").temp_size_in_bytes
    width = sequence_lengths(64, 64)[-1]
    residuals = 8 * saved.saved_bytes(LARGER, width, jnp.float32, False)
    assert residuals + 8 * saved.mlp_gradients(LARGER, width, 4) == pytest.approx(more, rel=0.01)


# ---- work ---------------------------------------------------------------------------------------


def test_flops_of_a_step_by_hand():
    """16 prompts of 8 tokens, two responses of 6 each; 1920 weights in a layer's matrices."""
    weights, scores, table = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24), 2 * 4 * 16, 2 * 16 * 40
    assert weights == 2 * 1920
    steps = sum(8 + 6 for _ in range(5))  # keys of each decoded token: all slots
    sample = 32 * (2 * weights * (8 + 5) + scores * (8 * 8 + steps) + table * 6)
    layers = 16 * (2 * weights * (8 + 2 * 5) + scores * (8 * 8 + 2 * 5 * (8 + 5)))
    logits = 32 * 6 * table
    phases = work.flops(planned())
    assert phases["sample"] == (sample, sample)
    assert phases["score"] == (layers + logits, layers + logits)
    assert phases["update"] == (3 * (layers + logits), 3 * layers + 4 * logits)
    judge = 2 * 16 * (2 * weights * 32 + scores * 32 * 32 + table)
    assert work.flops(planned(judge=Judge(TINY, 8, 32, 2)))["judge"] == (judge, judge)
    assert work.flops(planned(remat=True))["update"] == (3 * (layers + logits), 4 * (layers + logits))


def test_flops_of_more_candidates_and_pairs():
    """Four of the policy share a prefill; ten pairs of five are scored and learned from, or one that was ranked."""
    one, four = (work.flops(dataclasses.replace(planned(), candidates=K)) for K in (1, 4))
    assert four["update"] == one["update"] and four["score"] == one["score"]
    weights, scores, table = 2 * 1920, 2 * 4 * 16, 2 * 16 * 40
    answer = 2 * weights * 5 + scores * 5 * (8 + 6) + table * 6
    assert four["sample"][0] - one["sample"][0] == 3 * 16 * answer
    every = work.flops(dataclasses.replace(planned(), candidates=4, pairs=10))
    assert [every[phase][0] for phase in ("score", "update")] == [
        10 * one[phase][0] for phase in ("score", "update")
    ]
    ranked = work.flops(dataclasses.replace(planned(), candidates=4, ranked=True))
    assert ranked["score"][0] == (1 + 2 * 3) * one["score"][0]


@pytest.mark.parametrize(("size", "milliseconds"), [("0.5B", 0.21), ("1.5B", 0.64), ("7B", 2.95)])
def test_decode_bytes_give_the_floor_of_a_token(size, milliseconds):
    """Weights alone, bfloat16, at 4.8 TB/s."""
    s = dataclasses.replace(planned(model=SIZES[size], B=1), dtype=jnp.bfloat16)
    weights, cache = work.decode_bytes(s)
    assert round(1e3 * weights / DEVICES["h200"].bandwidth, 2) == milliseconds
    c = SIZES[size]
    assert cache == (8 + 6) * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2


# ---- the command --------------------------------------------------------------------------------


def run(capsys, *argv):
    status = plan.main([CONFIG, *argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_main_changes_that_make_it_fit_are_enough_and_all_needed(capsys):
    flags_of_mesh = ("--model_config=Qwen2.5-3B", "--devices=8", "--memory=40GiB")
    status, out, _ = run(capsys, *flags_of_mesh)
    assert status == 1 and "does not fit" in out
    flags = re.findall(r"--config\S+", out.split("fits with")[1])
    status, out, _ = run(capsys, *flags_of_mesh, *flags)
    assert status == 0 and "fits: " in out
    needed = [flag for flag in flags if not flag.startswith("--config.mesh.data")]
    assert needed
    for flag in needed:
        assert run(capsys, *flags_of_mesh, *(other for other in flags if other != flag))[0] == 1, flag


def test_remedies_revert_changes_that_a_later_one_makes_unnecessary():
    """Smaller micro-batches are tried first and help a little; the smaller optimizer is enough alone."""
    small = ("batch_size=4", "layout.micro_batch_rows=4", "layout.chunk_tokens=4096", "layout.remat=False")
    small += ("model.dtype=float32",)
    source = Source(CONFIG.removeprefix("--config="), small, 1, "Qwen2.5-0.5B", "cpu")

    def peak(change):
        return estimate.peak(estimate.memory(setup(source.changed(change))[0]))[1]

    enough = ("optimizer.mu_dtype=bfloat16",)
    assert peak(enough) < peak(("layout.micro_batch_rows=1",)) < peak(())
    changes = remedies(source, peak(enough))
    assert (changes.combined, changes.peak) == (enough, peak(enough))


def test_a_micro_batch_has_no_more_rows_than_a_shard_has_pairs():
    """Neither in the plan nor in a run: further rows would always be empty."""
    overrides = ("batch_size=4", "layout.micro_batch_rows=8", "mesh.data=2")
    planned, _ = setup(Source(CONFIG.removeprefix("--config="), overrides, 2, "Qwen2.5-0.5B", "cpu"))
    shapes = BatchShapes(batch_size=4, prompt_buckets=(8,), micro_batch_rows=8, chunk_tokens=32)
    assert planned.micro_batch_rows == 2
    model = make_model_spec(
        sharding.mesh_over(jax.devices()[:2], data=2, fsdp=1, tensor=1),
        TINY,
        dtype=jnp.float32,
        remat=False,
        batch_size=4,
        prompt_tokens=8,
    )
    programs = Programs(
        model,
        shapes,
        CandidateSampling(
            max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
        ),
        Vocabulary(36, (1, 2), 0),
        optimizer=make_optimizer(**RUN_ADAMW, steps=4),
        loss=Sigmoid(bonus_clip=5.0),
        entropy_weight=0.0,
        seed=0,
    )
    assert (programs.packer.rows, programs.packer.shards) == (4, 2)


def test_fewer_buckets_are_a_remedy_on_a_tpu_alone():
    """Each length has programs of its own, whose code lies in a TPU's memory; the largest bucket stays."""

    def changes(platform):
        overrides = ("data.buckets=128,256,512,768,1024",)
        source = Source(CONFIG.removeprefix("--config="), overrides, 1, "Qwen2.5-0.5B", platform)
        return source, dict(remedies(source, 0).single)

    source, on_tpu = changes("tpu")
    one = ("data.buckets=1024",)
    assert on_tpu[one] < estimate.peak(estimate.memory(setup(source)[0]))[1]
    assert [change for change in fit.ladders(*setup(source)) if change[-1:] == [one]] == [
        [("data.buckets=128,512,1024",), ("data.buckets=128,1024",), one]
    ]
    assert not [change for change in changes("gpu")[1] if change[0].startswith("data.buckets")]


def test_main_without_a_change_that_helps_names_enough_devices(capsys):
    status, out, _ = run(capsys, "--model_config=Qwen2.5-72B", "--device=a100-80gb", "--config.batch_size=64")
    assert status == 1
    match = re.search(r"is enough on 1 device\(s\); enough would be (--devices=\d+ .*)", out)
    assert match  # and that mesh is enough
    flags = [*match[1].split(), "--config.batch_size=64"]
    assert run(capsys, "--model_config=Qwen2.5-72B", "--device=a100-80gb", *flags)[0] == 0


def test_main_pretrained_model_is_planned_with_its_judge(capsys):
    status = plan.main([CONFIG + ":Qwen/Qwen2.5-7B-Instruct", "--devices=8", "--device=h100-80gb"])
    out, _ = capsys.readouterr()
    assert status == 0 and "7,615,616,512" in out and re.search(r"sample +score +judge +gradient +apply", out)


def test_main_sizes_prints_the_peaks_of_single_plans(capsys, monkeypatch):
    from tools.planner import sizes

    monkeypatch.setattr(sizes, "MODELS", ("Qwen2.5-0.5B", "Qwen2.5-7B"))
    monkeypatch.setattr(sizes, "TOPOLOGIES", ("h100x8", "v6e-8", "v6e-1"))
    spec = CONFIG + ":Qwen/Qwen2.5-0.5B-Instruct"
    assert plan.main([spec, "--sizes"]) == 0
    rows = {tuple(line.split()[:2]): line for line in capsys.readouterr().out.splitlines() if "Qwen" in line}
    assert len(rows) == 4
    assert plan.main([spec, "--model_config=Qwen2.5-7B", "--topology=h100x8"]) == 0
    (peak,) = re.findall(r"fits: ([\d.]+) of", capsys.readouterr().out)
    assert [cell.strip() for cell in re.split(r"  +", rows["Qwen2.5-7B", "all"])[2:]] == [
        f"{float(peak):.1f}", "29.1 *", "-"
    ]  # fmt: skip
    assert plan.main([spec, "--sizes", "--devices=8"]) == 2


def test_main_needs_no_weights_and_shows_time_only_for_a_known_device(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **dataclasses.asdict(TINY)}))
    for model in (tmp_path, tmp_path / "config.json"):
        status, out, _ = run(capsys, f"--model_config={model}")
        assert status == 0 and "s at the peak" not in out and "decode, at least" not in out
        assert f"{estimate.parameters(TINY):,}" in out
    status, out, _ = run(capsys, "--device=tpu-v5e")
    assert status == 0 and "s at the peak" in out and "decode, at least" in out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--model_config=Qwen3-9B"],
            "Qwen3-9B: not a folder, a config.json or a model of known size",
        ),
        (["--memory=much"], "--memory=much: not a size"),
        (["--devices=0"], "--devices=0: must be positive"),
        (["--devices=x"], "argument --devices: invalid int value: 'x'"),
        (["--device=abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--bandwidth=-1"], "--bandwidth=-1.0: must be positive"),
        (["--memry=3"], "argument '--memry=3' is not understood"),
        (["--config.layout.remt=True"], "layout.remt: no such field; did you mean 'layout.remat'?"),
        (["--devices=8", "--config.mesh.fsdp=3"], "mesh: data -1 x fsdp 3 x tensor 1 is not 8"),
        (["--devices=128"], "batch_size 64 is not divisible by mesh.data x mesh.fsdp = 128"),
        (["--devices=4", "--config.mesh.tensor=4"], "key_values: 2 is not divisible by mesh.tensor=4"),
        (
            ["--config.loss.candidates=2", "--config.loss.pairing=all", "--config.judging.both_orders=True"],
            "judging.both_orders is True, but with loss.pairing='all' every answer is scored by itself",
        ),
        (
            ["--config.judging.steps_behind=1", "--config.model.reference_every_steps=4"],
            "judging.steps_behind is 1, but model.reference_every_steps copies the policy",
        ),
        (["--config.layout.micro_batch_rows=0"], "layout.micro_batch_rows is 0, must be at least 1"),
    ],
)
def test_main_invalid_input_is_one_line(capsys, argv, expected):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("plan: ")
    assert expected in err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as raised:
        plan.main(["--help"])
    assert raised.value.code == 0
    assert "--device=h100-80gb" in capsys.readouterr().out


# ---- a complete step -------------------------------------------------------------------------------

WRITE = """
import sys
from pathlib import Path
from unittest import mock
import fake_models
import tiny_run
from tools.planner.hardware import SIZES
from xpo_jax.models.hf import weights
folder = Path(sys.argv[1])
write = weights.write_params
def narrow(*args, **options):
    return write(*args, **{**options, "dtype": "bfloat16"})
with mock.patch.object(weights, "write_params", narrow):
    fake_models.write_model(folder / "model", config=SIZES["0.5B"])
tiny_run.write_prompts(folder)
"""
IMPORTED = "import jax, xpo_jax.train; jax.devices()"


def peak_resident(*command):
    """Peak resident bytes of a command in its own process."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
        "XLA_FLAGS": "",
    }
    watcher = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    watcher += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    argv = [sys.executable, "-c", watcher, sys.executable, *command]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.slow
def test_memory_of_a_step_at_the_shape_of_qwen_0_5b_is_what_it_holds(tmp_path):
    """A run of one step with its evaluations, batch 2, 128 new tokens, float32: 14 GB, some minutes."""
    peak_resident("-c", WRITE, str(tmp_path))
    config = tiny_config(tmp_path)
    config.steps, config.batch_size, config.model.dtype = 1, 2, "float32"
    config.data.buckets, config.data.max_prompt_tokens = (64,), 64
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 1
    config.sampling.max_new_tokens = 128
    config.layout.micro_batch_rows, config.layout.chunk_tokens, config.layout.remat = 2, 256, True
    config.optimizer.warmup_steps, config.optimizer.mu_dtype = 0, "bfloat16"
    config.evaluation.prompts, config.evaluation.reference_samples = 2, 1
    spec = write_config(tmp_path / "config.py", config)
    phase, expected = estimate.peak(estimate.memory(setup(Source(spec, (), 1, None))[0]))
    held = peak_resident("-m", "xpo_jax.main", f"--config={spec}") - peak_resident("-c", IMPORTED)
    print(f"planned {expected / 1e9:.2f} GB ({phase}), held {held / 1e9:.2f} GB")
    assert held == pytest.approx(expected, rel=0.2)
