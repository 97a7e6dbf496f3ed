"""Settings of the layout that are "auto": the rule, and the same result in a run, its plan and the bench."""

import jax
import pytest
from ml_collections import ConfigDict
from tiny_run import one_device, tiny_config, write_config

from tools.planner.fit import Source, setup
from xpo_jax.algorithm.batch_shapes import rows_per_shard, steps_per_call
from xpo_jax.algorithm.logps import logits_chunk
from xpo_jax.config import loader
from xpo_jax.experiment.setup import prepare
from xpo_jax.runtime import sharding

CONFIG = "configs/paraphrase.py"


@pytest.mark.parametrize(
    ("setting", "longest", "batch_size", "platform", "rows"),
    [
        ("auto", 1280, 64, "tpu", 2),  # 2,560 slots
        ("auto", 384, 64, "gpu", 6),
        ("auto", 8192 + 2048, 64, "tpu", 1),  # one pair always fits
        ("auto", 104, 64, "cpu", 7),  # 768 slots
        ("auto", 104, 8, "cpu", 4),  # a shard has four pairs
        (3, 104, 64, "cpu", 3),
        (30, 104, 8, "tpu", 4),
    ],
)
def test_rows_of_a_micro_batch(setting, longest, batch_size, platform, rows):
    assert rows_per_shard(setting, batch_size, 2, longest=longest, platform=platform) == rows


@pytest.mark.parametrize(
    ("setting", "mesh", "vocab_size", "platform", "tokens"),
    [
        (
            "auto",
            (1, 8, 1),
            151_936,
            "tpu",
            1024,
        ),  # fsdp splits the vocabulary: all devices have all of a chunk
        ("auto", (2, 4, 1), 151_936, "tpu", 2048),
        (
            "auto",
            (1, 8, 1),
            151_937,
            "gpu",
            8 * 1024,
        ),  # it does not divide: each device has a part of a chunk
        ("auto", (1, 1, 1), 49_152, "gpu", 2048),
        ("auto", (1, 1, 1), 49_152, "cpu", 256),  # 64 MiB are 341 tokens
        ("auto", (1, 2, 1), 49_152, "cpu", 512),
        ("auto", (1, 1, 1), 300, "cpu", 4096),
        ("auto", (1, 1, 1), 10**9, "cpu", 1),
        (77, (1, 8, 1), 151_936, "tpu", 77),
    ],
)
def test_tokens_of_a_chunk_of_logits(setting, mesh, vocab_size, platform, tokens):
    axes = jax.sharding.AbstractMesh(mesh, sharding.AXES)
    assert logits_chunk(setting, axes, vocab_size, platform) == tokens


@pytest.mark.parametrize(
    ("setting", "batch_size", "shards", "renewed", "steps"),
    [
        ("auto", 64, 1, None, 1),
        ("auto", 32, 1, None, 1),
        ("auto", 31, 1, None, 2),
        ("auto", 64, 8, None, 4),  # 32 rows on each device
        ("auto", 1, 1, None, 8),
        ("auto", 1, 1, 5, 5),  # the reference changes after five steps
        ("auto", 64, 1, 5, 1),
        (3, 64, 1, None, 3),
    ],
)
def test_steps_whose_reference_samples_are_drawn_together(setting, batch_size, shards, renewed, steps):
    assert steps_per_call(setting, batch_size, shards, renewed) == steps


def test_the_command_line_turns_auto_into_a_number_and_back():
    def layout(*overrides):
        return loader.load(CONFIG, [f"layout.{override}" for override in overrides]).layout

    assert layout().micro_batch_rows == "auto"
    assert layout("micro_batch_rows=3", "chunk_tokens=5").micro_batch_rows == 3
    assert layout("micro_batch_rows=3", "micro_batch_rows=auto").micro_batch_rows == "auto"


def test_a_run_has_the_shapes_of_its_plan(tmp_path):
    """Eight prompts on one device: four steps of the reference's samples, rows of up to 28 slots, a tiny vocabulary."""
    config = tiny_config(tmp_path)
    config.layout = ConfigDict(dict.fromkeys(("micro_batch_rows", "chunk_tokens", "reference_steps"), "auto"))
    config.layout.update({"remat": True, "prefill_rows": None})
    mesh = ("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")
    with one_device():
        shapes = prepare(config).programs
    planned, _ = setup(Source(write_config(tmp_path / "auto.py", config), mesh, 1, None, "cpu"))
    assert shapes.packer.rows == planned.micro_batch_rows == 8
    assert shapes.shapes.prefetch_depth == planned.reference_steps == 4
    assert planned.chunk_tokens == 4096
