"""From a config to what `estimate` takes, and the search for changes that make it fit into a memory.

Nothing is guessed: each change is an override of the config, loaded, checked and estimated like the config itself.
Left out: changes to the model, and a search over all combinations (they are tried in one order, the cheapest first,
and those that turn out not to be needed are taken back).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from tools.planner import estimate
from tools.planner.hardware import SIZES, size_of
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.sampler import Sampling
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.config.loss import make_loss
from xpo_jax.data.prompts import load_prompts
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf import model_folder
from xpo_jax.models.layers import KEY_VALUES
from xpo_jax.models.registry import family
from xpo_jax.runtime import sharding

MOST_DEVICES = 4096  # where the search for enough of them ends
Change = tuple[str, ...]  # overrides that go together: ("mesh.fsdp=4", "mesh.data=-1")


class Source(NamedTuple):
    """Where a plan comes from: a config, its overrides, how many devices, and whose shapes (None: model.path's)."""

    spec: str
    overrides: tuple[str, ...]
    devices: int
    model: str | None

    def changed(self, change: Change) -> Source:
        """The same with more overrides."""
        return self._replace(overrides=self.overrides + change)


def setup(source: Source) -> tuple[estimate.Setup, ConfigDict]:
    """What a config asks for, with the same checks as a run where they need no files.

    Raises:
      ValueError: a config that cannot be used, sizes that do not divide, a model whose shapes are not known.
    """
    config = configs.load(source.spec, source.overrides)
    build = configs.build
    top = build(settings.Experiment, config, "config")
    model = build(settings.Model, config.model, "model")
    sampling = build(Sampling, config.sampling, "sampling")
    loss, _ = make_loss(config.loss)
    layout = build(settings.Layout, config.layout, "layout")
    optimizer = build(make_optimizer, config.optimizer, "optimizer", steps=top.steps)
    configs.check(load_prompts, config.data, "data", provided=("tokenizer", "max_new_tokens", "check"))
    mesh = build(_mesh, config.mesh, "mesh", devices=source.devices)
    shapes = model_shapes(source.model or model.path)
    judge = _judge(config.judge, orders=1 + config.judging.both_orders)
    sharding.check_rows(
        mesh, batch_size=top.batch_size, **({"judge.batch_size": judge.rows} if judge else {})
    )  # type: ignore[arg-type]
    heads = (top.batch_size, shapes.num_key_value_heads, config.data.buckets[-1], shapes.head_dim)
    tree = {**estimate.param_shapes(shapes), "key_values": jax.ShapeDtypeStruct(heads, np.float32)}
    sharding.shardings(mesh, tree, (("key_values", KEY_VALUES), *family(shapes).sharding))  # type: ignore[arg-type]
    planned = estimate.Setup(
        model=shapes,
        mesh=mesh,
        dtype=np.float32
        if model.dtype == "float32"
        else ml_dtypes.bfloat16,  # which "auto" is on accelerators
        prompt_tokens=config.data.buckets[-1],
        response_tokens=sampling.max_new_tokens,
        batch_size=top.batch_size,
        micro_batch_rows=layout.micro_batch_rows,
        chunk_tokens=layout.chunk_tokens,
        remat=layout.remat,
        optimizer=optimizer.transformation,
        judge=judge,
        reference_steps=layout.reference_steps
        if loss.second_candidate == "reference" and top.offline is None
        else 1,
    )
    return planned, config


def model_shapes(name: str) -> ModelConfig:
    """Shapes from a config.json, a folder that holds one, "embedded", or the name of a Qwen2.5.

    Raises:
      ValueError: none of these.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        if path.name != "config.json":
            raise ValueError(f"{path}: a model's config.json is expected, or the folder that holds it")
        return model_folder.read_config(path.parent)
    if name == "embedded" or path.is_dir():
        return model_folder.read_config(name)
    known = size_of(name)
    if known is None:
        raise ValueError(
            f"{name}: neither a folder nor a config.json nor a Qwen2.5 of known size; give --model_config=FOLDER or"
            f" --model_config=Qwen2.5-7B (known: {', '.join(SIZES)})"
        )
    return known


def _mesh(*, data: int, fsdp: int, tensor: int, devices: int) -> AbstractMesh:
    """As `sharding.make_mesh` does it, over devices that need not exist."""
    sizes = [data, fsdp, tensor]
    known = 1
    for size in sizes:
        known *= 1 if size == -1 else size
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"sizes are positive and at most one is -1, not {dict(zip(sharding.AXES, sizes, strict=True))}"
        )
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)], known = devices // known, devices
    if -1 in sizes or known != devices:
        raise ValueError(
            f"data {data} x fsdp {fsdp} x tensor {tensor} is not {devices}, which --devices gives"
        )
    return AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def _judge(group: ConfigDict, orders: int) -> estimate.Judge | None:
    """A judge of the config that runs a model on the devices; its own where it names a folder."""
    if group.name != "llm":
        return None
    own = None if group.path is None else model_shapes(group.path)
    return estimate.Judge(own, group.batch_size, group.buckets[-1], asked=orders)


# ---- what would have to change ----------------------------------------------------------------------


def ladders(planned: estimate.Setup, config: ConfigDict) -> Iterator[list[Change]]:
    """What can be changed to save memory, the cheapest first; each a ladder of ever stronger changes."""
    devices, shape = planned.mesh.size, planned.mesh.shape

    def doubled(axis: str, others: int, *rest: str) -> list[Change]:
        sizes = [shape[axis] * 2**i for i in range(1, 14)]
        return [(f"mesh.{axis}={n}", *rest) for n in sizes if devices % (n * others) == 0]

    def halved(name: str, value: int, least: int) -> list[Change]:
        return [(f"{name}={value >> i}",) for i in range(1, 20) if value % 2**i == 0 and value >> i >= least]

    yield doubled("fsdp", shape["tensor"], "mesh.data=-1")
    yield halved("layout.reference_steps", planned.reference_steps, 1)
    yield halved("layout.micro_batch_rows", planned.micro_batch_rows, 1)
    yield [] if planned.remat else [("layout.remat=True",)]
    yield halved("layout.chunk_tokens", planned.chunk_tokens, 128)
    yield [("optimizer.mu_dtype=bfloat16",)] if config.optimizer.get("mu_dtype") == "float32" else []
    yield halved("judge.batch_size", planned.judge.rows, planned.shares) if planned.judge else []
    yield doubled("tensor", 1, "mesh.data=1", "mesh.fsdp=-1")
    yield halved("batch_size", planned.batch_size, planned.shares)


class Remedies(NamedTuple):
    """What was found: single changes with the peak that each leaves, and changes that together fit, if any do."""

    single: list[tuple[Change, int]]
    together: Change
    peak: int | None


def remedies(source: Source, limit: float) -> Remedies:
    """Try what `ladders` has, alone and together."""
    planned, config = setup(source)

    def tried(change: Change) -> int | None:
        try:
            return estimate.peak(estimate.memory(setup(source.changed(change))[0]))[1]
        except ValueError:
            return None  # sizes that do not go together

    single: list[tuple[Change, int]] = []
    chosen: list[Change] = []
    together: Change = ()
    best = estimate.peak(estimate.memory(planned))[1]
    for ladder in ladders(planned, config):
        alone = [(change, peak) for change in ladder if (peak := tried(change)) is not None]
        if alone:
            fits = (pair for pair in alone if pair[1] <= limit)
            single.append(next(fits, min(alone, key=lambda pair: pair[1])))
        if best <= limit:
            continue
        for change in ladder:  # on top of what was chosen so far, no stronger than needed
            peak = tried(together + change)
            if peak is not None and peak < best:
                best, chosen = peak, [c for c in chosen if c not in ladder] + [change]
                if peak <= limit:
                    break
        together = tuple(override for change in chosen for override in change)
    if best > limit:
        return Remedies(single, together, None)
    for change in list(chosen):  # some are not needed any more
        rest = tuple(override for other in chosen if other != change for override in other)
        peak = tried(rest)
        if peak is not None and peak <= limit:
            chosen.remove(change)
            best, together = peak, rest
    return Remedies(single, together, best)


def enough_devices(source: Source, limit: float) -> tuple[int, Change] | None:
    """The number of devices, doubled again and again, that a mesh alone makes enough; and that mesh.

    As little of tensor as fits: what it splits is sent to and fro in every layer.
    """
    devices = source.devices * 2
    while devices <= MOST_DEVICES:
        for tensor in (1, 2, 4, 8):
            mesh = ("mesh.data=1", "mesh.fsdp=-1", f"mesh.tensor={tensor}")
            try:
                planned, _ = setup(source._replace(devices=devices).changed(mesh))
            except ValueError:
                continue  # sizes that do not divide, or more shares than rows
            if estimate.peak(estimate.memory(planned))[1] <= limit:
                return devices, mesh
        devices *= 2
    return None
