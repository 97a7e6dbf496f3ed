"""Plan memory and speed of a config on a mesh, from shapes alone: does it fit, and how long does a step take?

    python -m tools.plan --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] [--devices=8] [--device=h100-80gb]

It needs no devices, weights, tokenizer or data: the mesh may be larger than this machine, and the model may be just a
name. It prints, per device, the bytes of each part in each phase of a step; the minimum time of a decoded token,
(weight bytes + rows x context x key and value bytes) / bandwidth; and the FLOPs of a step with their time at the peak.
Prompts are assumed as long as the last bucket, responses as long as max_new_tokens. If the config does not fit, it
tries changes one by one and combined until it does.

With --compile, the programs that a run declares are compiled for --topology by its own compiler, which needs no such
device: their bytes beside the plan's, collectives, what a decoded token moves, cycles on a TPU, and what is live
together. docs/accelerators.md explains the tables and what is a finding.

Examples:
  python -m tools.plan --config=paraphrase
  python -m tools.plan --config=paraphrase --model_config=Qwen2.5-7B --devices=8 --device=h100-80gb \\
    --config.mesh.fsdp=8
  python -m tools.plan --config=paraphrase --model_config=path/to/config.json --memory=24GiB
  python -m tools.plan --config=runs/paraphrase/config.json --devices=16 --memory=80GB \\
    --peak_flops=989e12 --bandwidth=3.35e12
  python -m tools.plan --config=paraphrase:Qwen/Qwen2.5-0.5B-Instruct --compile --topology=v5e-8 --longest
  python -m tools.plan --config=paraphrase:Qwen/Qwen2.5-0.5B-Instruct --sizes

Exit status: 0 it fits, or no memory was given; 1 it does not fit, or --compile has findings; 2 invalid input (one line
explains).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xpo_jax.config import loader as configs
from xpo_jax.reporting.console import field_table, text_table

from .cli import Parser, exit_status, path_argument
from .planner import compile_report, estimate, sizes, topology, work
from .planner.compile_report import Options
from .planner.fit import Change, Source, enough_devices, remedies, setup
from .planner.hardware import DEVICES, Device, platform

GIB = 2**30


# ---- what is printed ----------------------------------------------------------------------------------


def gib(number: float) -> float:
    """Return bytes as GiB, rounded for a table."""
    return round(number / GIB, 3 if number < GIB else 2)


def memory_table(phases: Mapping[str, Mapping[str, int]]) -> str:
    """Return the table of GiB per device, with a row for each part and a column for each phase."""
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    rows: list[list[Any]] = [
        [part, *(gib(phase[part]) if phase.get(part) else None for phase in phases.values())]
        for part in parts
    ]
    rows = [row for row in rows if any(entry is not None for entry in row[1:])]
    rows.append(["total", *(gib(sum(phase.values())) for phase in phases.values())])
    return text_table(["GiB per device", *phases], rows)


def work_table(s: estimate.Setup, peak_flops: float) -> str:
    """Return the table of the FLOPs of a step by phase, with their time at the peak of all devices."""
    phases = work.flops(s)
    rows: list[list[Any]] = []
    for name, (model, computed) in (
        *phases.items(),
        ("step", tuple(map(sum, zip(*phases.values(), strict=True)))),
    ):
        seconds = [computed / peak_flops / s.mesh.size] if peak_flops else []
        rows.append([name, f"{model:.3g}", f"{computed:.3g}", *seconds])
    return text_table(["phase", "model FLOPs", "computed", *(["s at the peak"] if peak_flops else [])], rows)


def decode_lines(s: estimate.Setup, bandwidth: float) -> str:
    """Return the minimum time of sampling, which reads all weights, keys and values for each token of its rows."""
    weights, cache = work.decode_bytes(s)
    k = s.reference_steps
    rows = {
        "a decoded token reads": f"{gib(weights)} GiB of weights + {gib(cache)} GiB of keys and values per device"
    }
    if bandwidth:
        seconds = (weights + cache) / bandwidth
        # the policy's samples, and 1/k of a call that draws the reference's for k steps
        drawn = 1 + s.candidates
        all_of_step = s.response_tokens * ((1 + 1 / k) * weights + drawn * cache) / bandwidth
        which = "both" if drawn == 2 else f"all {drawn}"
        rows["decode, at least"] = (
            f"{1e3 * weights / bandwidth:.2f} ms for the weights + {1e3 * cache / bandwidth:.2f} ms, at most"
            f" {s.batch_size / seconds:,.0f} tokens/s; {which} candidates of a step {all_of_step:.3g} s"
        )
    return field_table(rows)


def verdict(source: Source, planned: estimate.Setup, limit: float) -> str:
    """Return whether it fits, also without remat, and if not, what would."""
    name, most = estimate.peak(estimate.memory(planned))
    if most <= limit:
        fits = f"fits: {gib(most)} of {gib(limit)} GiB at the peak ({name})"
        without = estimate.peak(estimate.memory(dataclasses.replace(planned, remat=False)))[1]
        if not planned.remat or without > limit:
            return fits
        return (
            f"{fits}\n--config.layout.remat=False would fit, too, with {gib(without)} GiB; the update then computes"
            " each layer three times instead of four"
        )
    lines = [f"does not fit: {gib(most)} of {gib(limit)} GiB at the peak ({name})"]
    changes = remedies(source, limit)
    if changes.single:
        rows = [[_flags(change), gib(peak), peak <= limit] for change, peak in changes.single]
        lines += ["", text_table(["one change alone", "GiB", "fits"], rows)]
    if changes.peak is not None:
        lines += ["", f"fits with {gib(changes.peak)} GiB: {_flags(changes.combined)}"]
    else:
        wider = enough_devices(source, limit)
        more = "more devices alone would not be enough either"
        if wider is not None:
            more = f"enough would be --devices={wider[0]} {_flags(wider[1])}"
        lines += ["", f"none of these changes is enough on {source.devices} device(s); {more}"]
    return "\n".join(lines)


def _flags(change: Change) -> str:
    return " ".join(f"--config.{override}" for override in change)


def describe(s: estimate.Setup) -> str:
    """Return the table of what is planned."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in s.mesh.shape.items())
    return field_table(
        {
            "parameters": f"{estimate.parameters(s.model):,}, computing in {np.dtype(s.dtype).name}",
            "trained": s.lora.summary or "all of them",
            "devices": f"{s.mesh.size}; mesh {mesh}",
            "batch": f"{s.batch_size} prompts of {s.prompt_tokens} tokens, responses of {s.response_tokens};"
            f" micro-batches of {s.micro_batch_rows} rows per device in the update, remat {'on' if s.remat else 'off'}",
            "reference": f"its samples are drawn for {s.reference_steps} step(s) at a time, with the keys and values of"
            f" {s.reference_steps} x {s.batch_size} rows",
        }
    )


# ---- the command line -------------------------------------------------------------------------------


def parse_bytes(text: str) -> float:
    """Return a size such as "80GiB", "80GB" or "16e9" in bytes.

    Raises:
      ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([KMGT]i?)?B?\s*", text)
    if not match or float(match[1]) == 0:
        raise ValueError(f"--memory={text}: not a size; write for example 80GiB, 80GB or 16e9")
    unit = match[2] or ""
    return float(match[1]) * (1024 if unit.endswith("i") else 1000) ** " KMGT".index(unit[:1] or " ")


def parse(argv: Sequence[str]) -> tuple[Source, Device, Options | None, bool]:
    """Return what is planned, for which device (what is unknown of it is 0), what to compile, and if all sizes are.

    Raises:
      ValueError: an unknown or impossible argument.
    """
    parser = Parser(
        prog="python -m tools.plan",
        description=__doc__,
        usage="python -m tools.plan --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] [options]",
    )
    parser.add_argument("--devices", type=int, help="devices of the mesh (1, or those of --topology)")
    parser.add_argument("--device", choices=DEVICES, help="memory, peak and bandwidth from the data sheet")
    parser.add_argument("--memory", help="memory of a device: 80GiB, 80GB, 16e9")
    parser.add_argument("--peak_flops", type=float, help="peak of a device in bfloat16, for example 989e12")
    parser.add_argument(
        "--bandwidth", type=float, help="memory bandwidth of a device, bytes/s, for example 3.35e12"
    )
    parser.add_argument("--model_config", help="model: config.json, a folder, Qwen2.5-7B (model.path)")
    parser.add_argument("--topology", help="devices by name: v5e-8, v5p-8, v6e-8, h100x8, h200x1")
    parser.add_argument(
        "--sizes", action="store_true", help="one table: Qwen2.5 of all sizes, on several devices"
    )
    parser.add_argument("--compile", action="store_true", help="compile the run's programs for --topology")
    parser.add_argument(
        "--longest", action="store_true", help="compile each for its longest prompts or rows only"
    )
    parser.add_argument(
        "--cache", type=path_argument, help="folder of JAX's compilation cache, to fill and to use"
    )
    options, rest = parser.parse_known_args(argv)
    arguments = configs.split_argv(rest)
    for name in ("devices", "peak_flops", "bandwidth"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name}={value}: must be positive and finite")
    assert arguments.spec is not None  # required unless --help, which argparse has handled
    named = topology.parse(options.topology) if options.topology else None
    if named and (options.devices or options.device):
        raise ValueError("--topology: it names the devices already; leave --devices and --device out")
    others = (named, options.devices, options.device, options.memory, options.model_config, options.compile)
    others += (options.peak_flops, options.bandwidth, options.longest, options.cache)
    if options.sizes and any(others):
        raise ValueError("--sizes: it plans its own models and devices; leave the other options out")
    if options.compile and not named:
        raise ValueError("--compile: add --topology=NAME, for example --topology=v5e-8")
    if not options.compile and (options.longest or options.cache):
        raise ValueError("--longest, --cache: these are options of --compile; add it")
    known = named.hardware if named else DEVICES.get(options.device, Device(0, 0, 0))
    device = Device(
        parse_bytes(options.memory) if options.memory else known.memory,
        options.peak_flops or known.peak_flops,
        options.bandwidth or known.bandwidth,
    )
    count = named.count if named else options.devices or 1
    kind = platform(named.device if named else options.device)
    source = Source(arguments.spec, arguments.overrides, count, options.model_config, kind)
    to_compile = Options(named, options.longest, options.cache) if options.compile and named else None
    return source, device, to_compile, options.sizes


def plan(source: Source, device: Device, to_compile: Options | None, all_sizes: bool = False) -> int:
    """Print a plan, what the compiler makes of it, or the table of all sizes; return the exit status."""
    if all_sizes:
        return sizes.run(source.spec, source.overrides)
    if to_compile is not None:
        return compile_report.run(source, device, to_compile)
    planned, _ = setup(source)
    phases = estimate.memory(planned)
    print(describe(planned), memory_table(phases), sep="\n\n")
    print("", work_table(planned, device.peak_flops), "", decode_lines(planned, device.bandwidth), sep="\n")
    if device.memory:
        print("", verdict(source, planned, device.memory), sep="\n")
    return int(0 < device.memory < estimate.peak(phases)[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status("plan", lambda: plan(*parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
