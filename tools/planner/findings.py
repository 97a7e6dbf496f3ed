"""What a compiled program should not do: copies of donated arguments, of caches, of all weights; another dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xpo_jax.algorithm.batch_shapes import SAMPLERS

from . import estimate, work
from .compiled import Compiled, DecodeLoop

GATHERED, COPIED = 0.5, 0.05  # of the weights; of the floor


def findings(
    s: estimate.Setup, compiled: Sequence[Compiled], loops: Mapping[str, DecodeLoop], dtype: Any
) -> list[str]:
    """Return what a compiled program should not do, one line each."""
    lines = []
    for program in compiled:
        if program.donated and program.aliased == 0:
            lines.append(
                f"{program.label}: {program.donated} donated argument(s), but no output takes the place of one"
            )
        if wide := wrong_dtype(program, dtype):
            lines.append(f"{program.label}: weights arrive as {wide}, the mesh computes in {dtype.name}")
    weights, _ = work.decode_bytes(s)
    for label, loop in loops.items():
        if loop.gathered > GATHERED * weights:
            lines.append(
                f"{label}: each decoded token gathers {loop.gathered / 2**20:,.0f} MiB, more than half of the weights"
            )
        if loop.caches_written > COPIED * loop.floor:
            lines.append(
                f"{label}: each decoded token writes {loop.caches_written / 2**20:,.0f} MiB of complete keys and values"
            )
    return lines


_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}


def wrong_dtype(program: Compiled, dtype: Any) -> str | None:
    """Return the dtype of a sampling or scoring program's largest argument, if it is not the mesh's."""
    if program.name not in (*SAMPLERS, "score", "judge"):
        return None
    entry = program.module.computations[program.module.entry]
    leaves = [leaf for i in entry.values() if i.opcode == "parameter" for leaf in i.leaves]
    largest = max((x for x in leaves if x.dtype in _NAMES.values()), key=lambda x: x.bytes, default=None)
    return None if largest is None or largest.dtype == _NAMES[dtype.name] else largest.dtype
