"""Will it fit, and how long does a step take? A plan for a config and a mesh, from shapes alone.

    python -m tools.plan --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] [--devices=8] [--device=h100-80gb]

Neither devices nor weights, tokenizer or data are needed: the mesh may be larger than this machine, the model may
be only a name. Shown are, per device, the bytes of every part at every phase of a step; the floor of a decoded
token, (weight bytes + rows x context x key and value bytes) / bandwidth; and the FLOPs of a step with their time at
the peak. All prompts count as long as the last bucket, all responses as long as max_new_tokens. Where it does not
fit, changes to the config are tried one by one and together, until it does.

Examples:
  python -m tools.plan --config=configs/paraphrase.py
  python -m tools.plan --config=configs/paraphrase.py --model_config=Qwen2.5-7B --devices=8 --device=h100-80gb \\
    --config.mesh.fsdp=8
  python -m tools.plan --config=configs/paraphrase.py --model_config=path/to/config.json --memory=24GiB
  python -m tools.plan --config=runs/paraphrase/config.json --devices=16 --memory=80GB \\
    --peak_flops=989e12 --bandwidth=3.35e12

Exit status: 0 it fits, or no memory was given; 1 it does not fit; 2 something to mend (one line says what).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from tools import estimate
from tools.hardware import DEVICES, SIZES, Device, size_of
from xpo_jax import config as configs
from xpo_jax import hf, settings
from xpo_jax.data.prompts import load_prompts
from xpo_jax.metrics import summary_table, text_table
from xpo_jax.models.qwen2 import Qwen2Config
from xpo_jax.sampler import Sampling
from xpo_jax.sharding import AXES
from xpo_jax.update import make_optimizer

GIB = 2**30
MOST_DEVICES = 4096  # where the search for enough of them ends
Change = tuple[str, ...]  # overrides that go together: ("mesh.fsdp=4", "mesh.data=-1")


# ---- from a config to what is planned ---------------------------------------------------------------


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
    build(settings.Loss, config.loss, "loss")
    layout = build(settings.Layout, config.layout, "layout")
    layout.check(top.batch_size, sampling.max_new_tokens)
    optimizer, _ = build(make_optimizer, config.optimizer, "optimizer", steps=top.steps)
    configs.check(load_prompts, config.data, "data", given=("tokenizer", "max_new_tokens"))
    mesh = build(_mesh, config.mesh, "mesh", devices=source.devices)
    shapes = model_shapes(source.model or model.path)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    judge = _judge(config.judge, shares)
    for name, size in (
        ("batch_size", top.batch_size),
        ("layout.micro_batch_size", layout.micro_batch_size),
        ("judge.batch_size", judge.rows if judge else 0),
    ):
        if size % shares:
            raise ValueError(f"{name} {size} is not divisible by mesh.data x mesh.fsdp = {shares}")
    if shapes.num_key_value_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"mesh.tensor={mesh.shape['tensor']} does not divide the {shapes.num_key_value_heads} key-value heads"
        )
    planned = estimate.Setup(
        model=shapes,
        mesh=mesh,
        dtype=estimate.dtype_of(model.dtype),
        prompt_tokens=config.data.buckets[-1],
        response_tokens=sampling.max_new_tokens,
        batch_size=top.batch_size,
        micro_batch_size=layout.micro_batch_size,
        chunk_tokens=layout.chunk_tokens,
        remat=layout.remat,
        optimizer=optimizer,
        judge=judge,
    )
    return planned, config


def model_shapes(name: str) -> Qwen2Config:
    """Shapes from a config.json, a folder that holds one, "embedded", or the name of a Qwen2.5.

    Raises:
      ValueError: none of these.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        if path.name != "config.json":
            raise ValueError(f"{path}: a model's config.json is expected, or the folder that holds it")
        return hf.read_config(path.parent)
    if name == "embedded" or path.is_dir():
        return hf.read_config(name)
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
            f"sizes are positive and at most one is -1, not {dict(zip(AXES, sizes, strict=True))}"
        )
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)], known = devices // known, devices
    if -1 in sizes or known != devices:
        raise ValueError(
            f"data {data} x fsdp {fsdp} x tensor {tensor} is not {devices}, which --devices gives"
        )
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _judge(group: ConfigDict, shares: int) -> estimate.Judge | None:
    """A judge of the config that runs a model on the devices; its own where it names a folder."""
    if group.name != "llm":
        return None
    own = None if group.path is None else model_shapes(group.path)
    return estimate.Judge(own, group.batch_size, group.buckets[-1])


# ---- what would have to change ----------------------------------------------------------------------


def ladders(planned: estimate.Setup, config: ConfigDict) -> Iterator[list[Change]]:
    """What can be changed to save memory, the cheapest first; each a ladder of ever stronger changes."""
    devices, shape = planned.mesh.size, planned.mesh.shape

    def doubled(axis: str, others: int) -> list[Change]:
        sizes = [shape[axis] * 2**i for i in range(1, 14)]
        return [(f"mesh.{axis}={n}", "mesh.data=-1") for n in sizes if devices % (n * others) == 0]

    def halved(name: str, value: int, least: int) -> list[Change]:
        return [(f"{name}={value >> i}",) for i in range(1, 20) if value % 2**i == 0 and value >> i >= least]

    yield doubled("fsdp", shape["tensor"])
    yield halved("layout.micro_batch_size", planned.micro_batch_size, planned.shares)
    yield [] if planned.remat else [("layout.remat=True",)]
    yield halved("layout.chunk_tokens", planned.chunk_tokens, 128)
    yield [("optimizer.mu_dtype=bfloat16",)] if config.optimizer.get("mu_dtype") == "float32" else []
    yield doubled("tensor", 1)
    yield [
        (*change, f"layout.micro_batch_size={min(planned.micro_batch_size, int(change[0].split('=')[1]))}")
        for change in halved("batch_size", planned.batch_size, planned.shares)
    ]


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

    single, chosen = [], []
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


def enough_devices(source: Source, change: Change, limit: float) -> int | None:
    """The number of devices, doubled again and again, over which fsdp makes it fit, with `change`."""
    devices = source.devices * 2
    kept = tuple(override for override in change if not override.startswith("mesh."))
    while devices <= MOST_DEVICES:
        wider = source._replace(devices=devices).changed((*kept, "mesh.data=1", "mesh.fsdp=-1"))
        try:
            if estimate.peak(estimate.memory(setup(wider)[0]))[1] <= limit:
                return devices
        except ValueError:
            return None  # more devices than rows
        devices *= 2
    return None


# ---- what is shown ----------------------------------------------------------------------------------


def gib(number: float) -> float:
    """Bytes as GiB, rounded as a table shows them."""
    return round(number / GIB, 3 if number < GIB else 2)


def memory_table(phases: Mapping[str, Mapping[str, int]]) -> str:
    """GiB per device, a row for each part, a column for each phase."""
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    rows: list[list[Any]] = [
        [part, *(gib(phase[part]) if phase.get(part) else None for phase in phases.values())]
        for part in parts
    ]
    rows = [row for row in rows if any(entry is not None for entry in row[1:])]
    rows.append(["together", *(gib(sum(phase.values())) for phase in phases.values())])
    return text_table(["GiB per device", *phases], rows)


def work_table(s: estimate.Setup, peak_flops: float) -> str:
    """FLOPs of a step by phase, and their time at the peak of all devices."""
    found = estimate.flops(s)
    rows: list[list[Any]] = []
    for name, (model, computed) in (
        *found.items(),
        ("step", tuple(map(sum, zip(*found.values(), strict=True)))),
    ):
        seconds = [computed / peak_flops / s.mesh.size] if peak_flops else []
        rows.append([name, f"{model:.3g}", f"{computed:.3g}", *seconds])
    return text_table(["phase", "model FLOPs", "computed", *(["s at the peak"] if peak_flops else [])], rows)


def decode_lines(s: estimate.Setup, bandwidth: float) -> str:
    """The floor of the sampler, which reads all weights and all keys and values for each token of its rows."""
    weights, cache = estimate.decode_bytes(s)
    rows = {
        "a decoded token reads": f"{gib(weights)} GiB of weights + {gib(cache)} GiB of keys and values a device"
    }
    if bandwidth:
        seconds = (weights + cache) / bandwidth
        both = estimate.CANDIDATES * s.response_tokens * seconds
        rows["decode, at least"] = (
            f"{1e3 * weights / bandwidth:.2f} ms for the weights + {1e3 * cache / bandwidth:.2f} ms, at most"
            f" {s.batch_size / seconds:,.0f} tokens/s; both candidates of a step {both:.3g} s"
        )
    return summary_table(rows)


def verdict(source: Source, phases: Mapping[str, Mapping[str, int]], limit: float) -> str:
    """Whether it fits, and if not, what would."""
    name, most = estimate.peak(phases)
    if most <= limit:
        return f"fits: {gib(most)} of {gib(limit)} GiB at its fullest ({name})"
    lines = [f"does not fit: {gib(most)} of {gib(limit)} GiB at its fullest ({name})"]
    found = remedies(source, limit)
    if found.single:
        rows = [[_flags(change), gib(peak), peak <= limit] for change, peak in found.single]
        lines += ["", text_table(["one change alone", "GiB", "fits"], rows)]
    if found.peak is not None:
        lines += ["", f"fits with {gib(found.peak)} GiB: {_flags(found.together)}"]
    else:
        devices = enough_devices(source, found.together, limit)
        told = (
            f"--devices={devices} with mesh.fsdp={devices} would"
            if devices
            else "nor would more devices alone"
        )
        lines += ["", f"nothing of this is enough on {source.devices} device(s); {told}"]
    return "\n".join(lines)


def _flags(change: Change) -> str:
    return " ".join(f"--config.{override}" for override in change)


def describe(s: estimate.Setup) -> str:
    """What is planned."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in s.mesh.shape.items())
    return summary_table(
        {
            "parameters": f"{estimate.parameters(s.model):,}, computing in {np.dtype(s.dtype).name}",
            "devices": f"{s.mesh.size}; mesh {mesh}",
            "batch": f"{s.batch_size} prompts of {s.prompt_tokens} tokens, responses of {s.response_tokens};"
            f" {s.micro_batch_size} at a time in the update, remat {'on' if s.remat else 'off'}",
        }
    )


# ---- the command line -------------------------------------------------------------------------------


def bytes_of(text: str) -> float:
    """ "80GiB", "80GB", "16e9" as bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([KMGT]i?)?B?\s*", text)
    if not found or float(found[1]) == 0:
        raise ValueError(f"--memory={text}: a size is expected, for example 80GiB, 80GB or 16e9")
    unit = found[2] or ""
    return float(found[1]) * (1024 if unit.endswith("i") else 1000) ** " KMGT".index(unit[:1] or " ")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows examples")


def parse(argv: Sequence[str]) -> tuple[Source, Device]:
    """What is planned, and for which device; what is not known of it is 0.

    Raises:
      ValueError: an argument that is not understood or impossible.
    """
    parser = _Parser(
        prog="python -m tools.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python -m tools.plan --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] [options]",
    )
    parser.add_argument("--devices", type=int, default=1, help="how many the mesh is over (1)")
    parser.add_argument(
        "--device", choices=DEVICES, help="fills in memory, peak and bandwidth by the maker's figures"
    )
    parser.add_argument("--memory", help="of a device: 80GiB, 80GB, 16e9")
    parser.add_argument("--peak_flops", type=float, help="of a device, bfloat16, for example 989e12")
    parser.add_argument("--bandwidth", type=float, help="of a device's memory, bytes/s, for example 3.35e12")
    parser.add_argument("--model_config", help="whose shapes: config.json, a folder, Qwen2.5-7B (model.path)")
    options, rest = parser.parse_known_args(argv)
    arguments = configs.split_argv(rest)
    for name in ("devices", "peak_flops", "bandwidth"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name}={value}: a positive number is expected")
    assert arguments.spec is not None  # without --help, which argparse has answered, there is one
    known = DEVICES.get(options.device, Device(0, 0, 0))
    device = Device(
        bytes_of(options.memory) if options.memory else known.memory,
        options.peak_flops or known.peak_flops,
        options.bandwidth or known.bandwidth,
    )
    return Source(arguments.spec, arguments.overrides, options.devices, options.model_config), device


def main(argv: Sequence[str]) -> int:
    """Print a plan; returns the exit status."""
    try:
        source, device = parse(argv)
        planned, _ = setup(source)
        phases = estimate.memory(planned)
        print(describe(planned), memory_table(phases), sep="\n\n")
        print(
            "", work_table(planned, device.peak_flops), "", decode_lines(planned, device.bandwidth), sep="\n"
        )
        if device.memory:
            print("", verdict(source, phases, device.memory), sep="\n")
    except (ValueError, OSError) as error:
        print(f"plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return int(0 < device.memory < estimate.peak(phases)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
