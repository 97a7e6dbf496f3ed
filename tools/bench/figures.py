"""What tools.bench measures and prints: rounds of all parts, their floors, and the table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from tools.bench.parts import PREFETCH, Bench
from xpo_jax.reporting.console import field_table, progress, text_table

if TYPE_CHECKING:
    from tools.bench.trl_client import Peer

COLUMNS = ("part", "s", "tokens/s", "GFLOP", "MB", "of floor", "temp. MiB", "compilations", "compile s")
SUMS = ("sample", PREFETCH, "step", "judged")  # parts that consist of others


def measure(bench: Bench, peer: Peer | None, repeat: int) -> None:
    """Time every part once per round, in turn, so that other load on the machine affects all parts alike."""
    order = [part for part in bench.parts.values() if part.run]
    if peer:
        peer.step()
    for part in order:  # the first call of a part is slower
        jax.block_until_ready(part.run())
    for _ in progress(range(repeat), "measuring"):
        for part in order:
            begun = time.perf_counter()
            jax.block_until_ready(part.run())
            part.seconds.append((time.perf_counter() - begun) / part.steps)
        sample, prefill = bench.parts["sample"].seconds[-1], bench.parts["prefill"].seconds[-1]
        bench.parts["decode"].seconds.append(max(sample - prefill, 1e-9))
        if peer:
            peer.step(measured=True)


def floors(bench: Bench, peak: float, bandwidths: Mapping[str, float]) -> dict[str, float]:
    """Return the least seconds that each part can take.

    Args:
      peak: FLOP/s of all devices.
      bandwidths: bytes/s of one device, by part; those of a sample and of a step are the sums of their parts'.
    """
    parts = bench.parts
    floor = {
        name: max(parts[name].flops / peak, parts[name].bytes / speed) for name, speed in bandwidths.items()
    }
    floor["sample"] = floor["prefill"] + floor["decode"]
    reference = "sample"
    if PREFETCH in parts:
        reference, group, prefill = PREFETCH, parts[PREFETCH], parts["prefill"]
        computing, moving = group.flops - prefill.flops, group.bytes - prefill.bytes
        floor[PREFETCH] = floor["prefill"] + max(computing / peak, moving / bandwidths["decode"])
    update = ("score", "accumulate", "apply", "for_sampling")
    floor["step"] = floor["sample"] + sum(floor[name] for name in (reference, *update))
    if bench.judge is not None:
        steps = parts[reference].steps
        floor["judged"] = step_with_judge(floor["step"], bench.judge, floor["score"], floor[reference], steps)
    return floor


def figures(bench: Bench, peak: float, bandwidths: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return {part: its figures}.

    Args:
      peak, bandwidths: FLOP/s, and bytes/s by part, of one device; so are the bytes of the parts.
    """
    floor = floors(bench, peak * bench.step.mesh.size, bandwidths)
    return {
        name: {
            "seconds": part.median,
            "fastest": min(part.seconds),
            "slowest": max(part.seconds),
            "tokens_per_second": part.tokens / part.median if part.tokens else None,
            "flops": part.flops,
            "bytes": part.bytes,
            "bandwidth": bandwidths.get(name),
            "floor_seconds": floor[name],
            "fraction_of_floor": floor[name] / part.median,
            "temporaries": part.temporaries,
            "compilations": part.compilations,
            "compile_seconds": part.compile_seconds,
        }
        for name, part in bench.parts.items()
    }


def step_with_judge(step: float, judge: float, score: float, reference: float, steps: int = 1) -> float:
    """Return the seconds of a step with a judge, part of whose time is hidden behind other work.

    Args:
      step: seconds of a step without a judge. judge: seconds of the judge.
      score, reference: seconds per step of work that needs no verdict: scoring, and the reference's samples.
      steps: that share one call for the reference's samples; the call hides the judge of one of them.
    """
    hidden = [score + steps * reference] + (steps - 1) * [score]
    return step + sum(max(0.0, judge - seconds) for seconds in hidden) / steps


def judge_line(bench: Bench) -> str:
    """Compare a measured step with a judge to the time that is left when as much of it as possible is hidden."""
    assert bench.judge is not None
    median = {name: part.median for name, part in bench.parts.items()}
    reference = bench.parts.get(PREFETCH, bench.parts["sample"])
    hidden = median["score"] + reference.median
    least = step_with_judge(median["step"], bench.judge, median["score"], reference.median, reference.steps)
    return (
        f"a judge of {bench.judge:g} s: {median['judged']:.3f} s a step, {median['judged'] / least - 1:+.1%} against"
        f" the {least:.3f} s that remain if scoring and the reference's samples ({hidden:.3f} s) run meanwhile"
    )


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures as a table."""
    rows = []
    for name, part in results.items():
        compiled = [
            round(part["temporaries"] / 2**20, 1),
            part["compilations"],
            round(part["compile_seconds"], 1),
        ]
        rows.append(
            [
                name,
                round(part["seconds"], 4),
                round(part["tokens_per_second"]) if part["tokens_per_second"] else None,
                part["flops"] / 1e9 or None,
                part["bytes"] / 1e6,
                f"{part['fraction_of_floor']:.0%}",
                *(compiled if part["compilations"] else [None] * 3),
            ]
        )
    return text_table(COLUMNS, rows)


def report(
    bench: Bench, about: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], peer: Peer | None
) -> str:
    """Return everything that is printed."""
    texts = [field_table(about), table(results)]
    if bench.judge is not None:
        texts.append(judge_line(bench))
    if peer:
        texts.append(peer.table(bench))
    return "\n\n".join(texts)
