"""From a config to an `estimate.Setup`, and the search for changes that make it fit into memory.

Each change is an override of the config, and is loaded, checked and estimated like the config itself. Left out on
purpose: changes to the model, and a search over all combinations (changes are tried in one order, the cheapest first,
and those that turn out to be unnecessary are reverted).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from xpo_jax.algorithm.batch_shapes import steps_per_call
from xpo_jax.algorithm.pairing import REWARDED
from xpo_jax.config import loader as configs
from xpo_jax.data.prompts import load_prompts
from xpo_jax.experiment.groups import check_groups
from xpo_jax.experiment.judge_factory import check_judge, make_judge
from xpo_jax.io.user_paths import expand
from xpo_jax.models.attention_kernels import choose
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf import model_folder
from xpo_jax.models.layers import KEY_VALUES
from xpo_jax.models.lora import join, rules
from xpo_jax.models.registry import family
from xpo_jax.runtime import sharding

from . import estimate, saved
from .hardware import known_models, size_of
from .judge import Judge

MOST_DEVICES = 4096  # limit of the search for enough devices
Change = tuple[str, ...]  # overrides that are made together: ("mesh.fsdp=4", "mesh.data=-1")


class Source(NamedTuple):
    """What a plan is made from.

    spec, overrides: of the config. devices: their number. model: None for model.path.
    platform: of the devices, "tpu" or "gpu": they differ in "auto" attention and in what their compilers hold.
    """

    spec: str
    overrides: tuple[str, ...]
    devices: int
    model: str | None
    platform: str = "gpu"

    def changed(self, change: Change) -> Source:
        """Return this source with more overrides."""
        return self._replace(overrides=self.overrides + change)


def setup(source: Source) -> tuple[estimate.Setup, ConfigDict]:
    """Return the setup of a config, after those checks of a run that need no files.

    Raises:
      ValueError: an invalid config, sizes that do not divide, or a model with unknown shapes.
    """
    config = configs.load(source.spec, source.overrides)
    checked = check_groups(config)
    groups = checked.groups
    top, model, loss, layout, lora = groups.top, groups.model, groups.loss, groups.layout, groups.lora
    configs.check(load_prompts, config.data, "data", provided=("tokenizer", "max_new_tokens", "check"))
    mesh = configs.build(_mesh, config.mesh, "mesh", devices=source.devices)
    shapes = model_shapes(source.model or model.path)
    if loss.pairing is not None or groups.judging.steps_behind:
        # only then is the judge made, which may be the user's code
        made = make_judge(config.judge, "judge")
        check_judge(made, groups.judging, loss, offline=groups.offline, renewed=groups.renewed)
    judge = _judge(config.judge, orders=1 + config.judging.both_orders)
    sharding.check_rows(
        mesh, batch_size=top.batch_size, **({"judge.batch_size": judge.rows} if judge else {})
    )  # type: ignore[arg-type]
    heads = (top.batch_size, shapes.num_key_value_heads, config.data.buckets[-1], shapes.head_dim)
    weights = join(estimate.param_shapes(shapes), saved.trained_shapes(shapes, lora))
    tree = {**weights, "key_values": jax.ShapeDtypeStruct(heads, np.float32)}
    sharding.shardings(mesh, tree, (("key_values", KEY_VALUES), *rules(family(shapes).sharding)))  # type: ignore[arg-type]
    # "auto" is bfloat16 on accelerators
    dtype: Any = np.float32 if model.dtype == "float32" else ml_dtypes.bfloat16
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    planned = estimate.Setup(
        model=shapes,
        mesh=mesh,
        dtype=dtype,
        prompt_tokens=config.data.buckets[-1],
        response_tokens=groups.sampling.max_new_tokens,
        batch_size=top.batch_size,
        micro_batch_rows=layout.micro_batch_rows,
        chunk_tokens=layout.chunk_tokens,
        remat=layout.remat,
        optimizer=checked.optimizer.transformation,
        lora=lora,
        judge=judge,
        reference_steps=steps_per_call(
            layout.reference_steps, top.batch_size, shards, model.reference_every_steps
        )
        if loss.second_candidate == "reference" and not groups.offline
        else 1,
        candidates=1 if groups.offline else loss.candidates,
        pairs=loss.pairs_per_prompt,
        ranked=loss.pairing in REWARDED,
        prefill_rows=layout.prefill_rows,
        kernels=choose(model.attention, source.platform, dtype=dtype, head_dim=shapes.head_dim),
        platform=source.platform,
        buckets=len(config.data.buckets),
    )
    return planned, config


def model_shapes(name: str) -> ModelConfig:
    """Return the shapes of a model: a config.json, a folder with one, "embedded", or the name of a published one.

    Raises:
      ValueError: none of these.
    """
    path = Path(expand(name))
    if path.suffix == ".json" and path.is_file():
        if path.name != "config.json":
            raise ValueError(f"{path}: give a model's config.json, or the folder that holds it")
        return model_folder.read_config(path.parent)
    if name == "embedded" or path.is_dir():
        return model_folder.read_config(path if path.is_dir() else name)
    known = size_of(name)
    if known is None:
        raise ValueError(
            f"{name}: not a folder, a config.json or a model of known size; give --model_config=FOLDER or a name"
            f" ({known_models()})"
        )
    return known


def _mesh(*, data: int, fsdp: int, tensor: int, devices: int) -> AbstractMesh:
    """Return the mesh of `sharding.make_mesh` over devices that need not exist."""
    sizes = [data, fsdp, tensor]
    known = 1
    for size in sizes:
        known *= 1 if size == -1 else size
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"sizes must be positive, and at most one may be -1, not {dict(zip(sharding.AXES, sizes, strict=True))}"
        )
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)], known = devices // known, devices
    if -1 in sizes or known != devices:
        raise ValueError(
            f"data {data} x fsdp {fsdp} x tensor {tensor} is not {devices}, the number in --devices"
        )
    return AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def _judge(group: ConfigDict, orders: int) -> Judge | None:
    """Return the config's judge if it runs a model on the devices, else None."""
    if group.name not in ("llm", "reasoning"):
        return None
    model = None if group.path is None else model_shapes(group.path)
    votes, written = (group.votes, group.sampling.max_new_tokens) if group.name == "reasoning" else (1, 0)
    return Judge(model, group.batch_size, group.buckets[-1], orders * votes, written, len(group.buckets))


# ---- the search for changes ----------------------------------------------------------------------


def ladders(planned: estimate.Setup, config: ConfigDict) -> Iterator[list[Change]]:
    """Yield what can be changed to save memory, the cheapest first: each time a list of increasingly strong changes."""
    devices, shape = planned.mesh.size, planned.mesh.shape

    def doubled(axis: str, others: int, *rest: str) -> list[Change]:
        sizes = [shape[axis] * 2**i for i in range(1, 14)]
        return [(f"mesh.{axis}={n}", *rest) for n in sizes if devices % (n * others) == 0]

    def halved(name: str, value: int, least: int) -> list[Change]:
        return [(f"{name}={value >> i}",) for i in range(1, 20) if value % 2**i == 0 and value >> i >= least]

    def thinned(name: str, sizes: Sequence[int]) -> list[Change]:
        """Drop every second size repeatedly; the largest stays."""
        left = [sizes[::-1][:: 2**i][::-1] for i in range(1, len(sizes).bit_length() + 1)]
        texts = [",".join(map(str, fewer)) for fewer in left if len(fewer) < len(sizes)]
        return [(f"{name}={text}",) for text in dict.fromkeys(texts)]

    yield doubled("fsdp", shape["tensor"], "mesh.data=-1")
    yield halved("layout.reference_steps", planned.reference_steps, 1)
    encoded = planned.reference_steps * planned.batch_size // planned.shards
    yield halved("layout.prefill_rows", min(encoded, planned.prefill_rows or encoded), 1)
    yield halved("layout.micro_batch_rows", planned.micro_batch_rows, 1)
    yield [] if planned.remat else [("layout.remat=True",)]
    yield halved("layout.chunk_tokens", planned.chunk_tokens, 128)
    yield [("optimizer.mu_dtype=bfloat16",)] if config.optimizer.get("mu_dtype") == "float32" else []
    if planned.platform == "tpu":  # each has programs of its own, whose code lies in the memory
        yield thinned("data.buckets", config.data.buckets)
    yield halved("judge.batch_size", planned.judge.rows, planned.shards) if planned.judge else []
    yield doubled("tensor", 1, "mesh.data=1", "mesh.fsdp=-1")
    yield halved("batch_size", planned.batch_size, planned.shards)


class Remedies(NamedTuple):
    """Single changes, each with its peak in bytes, and a combination of changes that fits, if there is one."""

    single: list[tuple[Change, int]]
    combined: Change
    peak: int | None


def remedies(source: Source, limit: float) -> Remedies:
    """Try the changes of `ladders`, alone and combined."""
    planned, config = setup(source)

    def tried(change: Change) -> int | None:
        try:
            return estimate.peak(estimate.memory(setup(source.changed(change))[0]))[1]
        except ValueError:
            return None  # incompatible sizes

    single: list[tuple[Change, int]] = []
    chosen: list[Change] = []
    combined: Change = ()
    best = estimate.peak(estimate.memory(planned))[1]
    for ladder in ladders(planned, config):
        alone = [(change, peak) for change in ladder if (peak := tried(change)) is not None]
        if alone:
            fits = (pair for pair in alone if pair[1] <= limit)
            single.append(next(fits, min(alone, key=lambda pair: pair[1])))
        if best <= limit:
            continue
        for change in ladder:  # in addition to the changes chosen so far, no stronger than needed
            peak = tried(combined + change)
            if peak is not None and peak < best:
                best, chosen = peak, [c for c in chosen if c not in ladder] + [change]
                if peak <= limit:
                    break
        combined = tuple(override for change in chosen for override in change)
    if best > limit:
        return Remedies(single, combined, None)
    for change in list(chosen):  # some may be unnecessary by now
        rest = tuple(override for other in chosen if other != change for override in other)
        peak = tried(rest)
        if peak is not None and peak <= limit:
            chosen.remove(change)
            best, combined = peak, rest
    return Remedies(single, combined, best)


def enough_devices(source: Source, limit: float) -> tuple[int, Change] | None:
    """Return the smallest number of devices, doubling, on which some mesh fits without further changes; and that mesh.

    The tensor axis is as small as possible, because it communicates in every layer.
    """
    devices = source.devices * 2
    while devices <= MOST_DEVICES:
        for tensor in (1, 2, 4, 8):
            mesh = ("mesh.data=1", "mesh.fsdp=-1", f"mesh.tensor={tensor}")
            try:
                planned, _ = setup(source._replace(devices=devices).changed(mesh))
            except ValueError:
                continue  # sizes that do not divide, or more shards than rows
            if estimate.peak(estimate.memory(planned))[1] <= limit:
                return devices, mesh
        devices *= 2
    return None
