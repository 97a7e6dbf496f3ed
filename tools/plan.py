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

Exit status: 0 it fits, or no memory was given; 1 it does not fit; 2 invalid input (one line says what).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tools.cli import Parser, exit_status
from tools.planner import estimate
from tools.planner.fit import Change, Source, enough_devices, remedies, setup
from tools.planner.hardware import DEVICES, Device
from xpo_jax.config import loader as configs
from xpo_jax.reporting.console import field_table, text_table

GIB = 2**30


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
    k = s.reference_steps
    rows = {
        "a decoded token reads": f"{gib(weights)} GiB of weights + {gib(cache)} GiB of keys and values a device"
    }
    if bandwidth:
        seconds = (weights + cache) / bandwidth
        # the policy's samples, and a k-th of a call that draws the reference's for k steps
        both = s.response_tokens * ((1 + 1 / k) * weights + 2 * cache) / bandwidth
        rows["decode, at least"] = (
            f"{1e3 * weights / bandwidth:.2f} ms for the weights + {1e3 * cache / bandwidth:.2f} ms, at most"
            f" {s.batch_size / seconds:,.0f} tokens/s; both candidates of a step {both:.3g} s"
        )
    return field_table(rows)


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
        wider = enough_devices(source, limit)
        told = "nor would be more devices alone"
        if wider is not None:
            told = f"--devices={wider[0]} {_flags(wider[1])} would be"
        lines += ["", f"nothing of this is enough on {source.devices} device(s); {told}"]
    return "\n".join(lines)


def _flags(change: Change) -> str:
    return " ".join(f"--config.{override}" for override in change)


def describe(s: estimate.Setup) -> str:
    """What is planned."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in s.mesh.shape.items())
    return field_table(
        {
            "parameters": f"{estimate.parameters(s.model):,}, computing in {np.dtype(s.dtype).name}",
            "devices": f"{s.mesh.size}; mesh {mesh}",
            "batch": f"{s.batch_size} prompts of {s.prompt_tokens} tokens, responses of {s.response_tokens};"
            f" the update on {s.micro_batch_rows} rows a device at a time, remat {'on' if s.remat else 'off'}",
            "reference": f"its samples are drawn for {s.reference_steps} step(s) at a time, with so many times the"
            f" keys and values of {s.batch_size} rows",
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


def parse(argv: Sequence[str]) -> tuple[Source, Device]:
    """What is planned, and for which device; what is not known of it is 0.

    Raises:
      ValueError: an argument that is not understood or impossible.
    """
    parser = Parser(
        prog="python -m tools.plan",
        description=__doc__,
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


def plan(source: Source, device: Device) -> int:
    """Print a plan; returns the exit status."""
    planned, _ = setup(source)
    phases = estimate.memory(planned)
    print(describe(planned), memory_table(phases), sep="\n\n")
    print("", work_table(planned, device.peak_flops), "", decode_lines(planned, device.bandwidth), sep="\n")
    if device.memory:
        print("", verdict(source, phases, device.memory), sep="\n")
    return int(0 < device.memory < estimate.peak(phases)[1])


def main(argv: Sequence[str]) -> int:
    """Plan; returns the exit status."""
    return exit_status("plan", lambda: plan(*parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
