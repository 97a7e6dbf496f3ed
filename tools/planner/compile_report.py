"""`python -m tools.plan --compile`: compile a run's programs for a topology, print what they need, and what is wrong.

Left out on purpose: timings of a step. What was compiled here was not run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from xpo_jax.algorithm.batch_shapes import SAMPLERS
from xpo_jax.reporting.console import field_table, text_table
from xpo_jax.runtime import sharding

from . import compiled, cycles, estimate, findings, hlo, programs, topology
from .compiled import Compiled, DecodeLoop
from .fit import Source, setup
from .hardware import Device
from .program_code import program_code

GIB = 2**30
CAVEAT = (
    "compiled, not run: bytes are the compiler's, times would be guesses; fragmentation, the runtime's memory and, on a"
    " GPU, the scratch of kernels that autotuning may choose are not in them"
)
CYCLES_CAVEAT = (
    "cycles are the compiler's estimate at the clock of a square matmul at the peak: good for comparing two versions of"
    " one part, not for its time, nor for a decoded token, nor for programs with Pallas kernels, which have none"
)


class Options(NamedTuple):
    """What to compile: for which topology, only the longest programs, and into which cache (None: none)."""

    topology: topology.Topology
    longest: bool
    cache: Path | None


def gib(number: float) -> float:
    """Return bytes as GiB, rounded for a table."""
    return round(number / GIB, 3 if number < GIB else 2)


def run(source: Source, device: Device, options: Options) -> int:
    """Compile and print; return the exit status: 1 if it does not fit, or if there are findings."""
    devices = topology.devices(options.topology)
    planned, config = setup(source)
    declaration = programs.declare(planned, config, devices)
    wanted = programs.longest(declaration.programs) if options.longest else declaration.programs
    print(f"{options.topology.name}: {len(devices)} x {devices[0].device_kind}; {CAVEAT}", flush=True)
    if options.cache is not None:
        use_cache(options.cache)
        if not declaration.has_tokenizer:
            print("--cache: model.path has no tokenizer here, so a run will not find all of these programs")
    built, refused = compiled.compile_all(wanted, lambda line: print(line, file=sys.stderr, flush=True))
    clock = None
    if sharding.platform(declaration.spec.mesh) == "tpu" and device.peak_flops:
        clock = cycles.calibrate(devices[0], device.peak_flops)
    code = all_code(built, declaration.programs)
    text, status = report(
        planned, built, refused, device=device, clock=clock, dtype=declaration.spec.dtype, code=code
    )
    print(text)
    return status


def all_code(built: Sequence[Compiled], declared: Sequence[programs.Declared]) -> int:
    """Return the bytes of the code of all declared programs; one not compiled counts as the longest of its name."""
    sizes = {program.label: program.code for program in built}
    longest = {program.name: program.code for program in built}  # lengths increase
    return sum(sizes.get(label, longest.get(label.split()[0], 0)) for label, _ in declared)


def use_cache(folder: Path) -> None:
    """Let JAX write what it compiles into `folder`.

    Nothing is read from there: the compiler of a topology has no client that could load a program, and warns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")


def report(
    planned: estimate.Setup,
    built: Sequence[Compiled],
    refused: Sequence[compiled.Refused],
    *,
    device: Device,
    clock: float | None,
    dtype: Any,
    code: int,
) -> tuple[str, int]:
    """Return the text of all tables, and the exit status; code: see `all_code`."""
    loops = {
        program.label: loop
        for program in built
        if program.name in SAMPLERS
        for loop in [compiled.decode_loop(planned, program)]
        if loop is not None
    }
    live = compiled.phases(planned, built)
    blocks = [program_table(planned, built), collective_table(built)]
    blocks += [loop_table(loops)] if loops else []
    if clock:
        rows = [part.row(clock, device.peak_flops) for part in cycles.parts(planned, built)]
        head = ["part, on one device", "ms by cycles", "ms at the peak", "% of the peak"]
        blocks += [f"{text_table(head, rows)}\n\n{clock / 1e9:.2f} GHz; {CYCLES_CAVEAT}"] if rows else []
    blocks.append(phase_table(planned, live, code))
    wrong = findings.findings(planned, built, loops, dtype)
    blocks += [f"finding: {line}" for line in wrong]
    blocks += [f"refused: {program.label}: {program.message}" for program in refused]
    most = max(live.values(), default=0) + code
    fits = not refused and (not device.memory or most <= device.memory)
    if device.memory:
        name = max(live, key=lambda phase: live[phase]) if live else "no phase"
        verdict = "fits" if fits else "does not fit"
        blocks.append(
            f"{verdict}: {gib(most)} of {gib(device.memory)} GiB at the peak ({name}, with all code)"
        )
    return "\n\n".join(blocks), int(not fits or bool(wrong))


def program_table(planned: estimate.Setup, built: Sequence[Compiled]) -> str:
    """Return the bytes of each program, beside the planner's."""
    rows = []
    for program in built:
        plan = compiled.planned_total(planned, program.label)
        numbers = [program.arguments, program.outputs, program.aliased, program.temporaries, program.total]
        ratio = round(program.total / plan, 2) if plan else None
        rows.append(
            [
                program.label,
                *map(gib, numbers),
                None if plan is None else gib(plan),
                ratio,
                gib(program.code),
                round(program.seconds),
            ]
        )
    head = [
        "GiB per device",
        "arguments",
        "outputs",
        "aliased",
        "temporary",
        "total",
        "planned",
        "ratio",
        "code",
        "s",
    ]
    return text_table(head, rows)


def collective_table(built: Sequence[Compiled]) -> str:
    """Return the number of collectives of each program by kind; those in a loop count once."""
    counts = {program.label: program.collectives for program in built}
    kinds = [kind for kind in hlo.COLLECTIVES if any(count[kind] for count in counts.values())]
    if not kinds:
        return "no collectives"
    rows = [[label, *(count[kind] or None for kind in kinds)] for label, count in counts.items() if count]
    return text_table(["collectives in the text", *kinds], rows)


def loop_table(loops: Mapping[str, DecodeLoop]) -> str:
    """Return what a decoded token of all rows moves, beside the weights, keys and values that it must read."""
    rows = [
        [
            label,
            *(round(size / 2**20, 1) for size in (*loop.moved, loop.floor)),
            round(sum(loop.moved) / loop.floor, 2),
            round(loop.caches_written / 2**20, 1),
            ", ".join(f"{count} {kind}" for kind, count in loop.collectives.items()) or None,
        ]
        for label, loop in loops.items()
    ]
    head = ["MiB per decoded token", "read", "written", "floor", "ratio", "caches rewritten", "collectives"]
    return text_table(head, rows) + (
        "\n\nThe floor is weights + keys and values. Arrays that stay on a TPU's chip between tokens move no bytes, so"
        "\nthat a ratio may be below 1; bytes include the padding of tiles."
    )


def phase_table(planned: estimate.Setup, live: Mapping[str, int], code: int) -> str:
    """Return what is live together in each phase of a step, beside the planner's."""
    plan, planned_code = compiled.planned_phases(planned), program_code(planned)
    rows = [[name, gib(size), gib(plan[name]), round(size / plan[name], 2)] for name, size in live.items()]
    table = text_table(["live together without code, GiB per device", "compiled", "planned", "ratio"], rows)
    beside = f", planned {gib(planned_code)}" if planned_code else ""
    in_all = {"code of all programs": f"{gib(code)} GiB per device, in every phase{beside}"}
    return f"{table}\n\n{field_table(in_all)}"
