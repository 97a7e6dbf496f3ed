"""The TPU compiler's own estimate of cycles, calibrated with a matmul, for the parts that matmuls should dominate.

The text of a TPU program has an estimate for each fusion. Summed and divided by the clock at which a square matmul is
at the peak, it compares two versions of a part that computes much: prefill, and a layer of the update. It is no time:
waits for memory, for asynchronous copies and for other devices are not in it, so it is no measure of a decoded token;
kernels in Pallas have no estimate at all, so with splash a part is without its attention; and the matmul's own fraction
of the peak is taken as 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from xpo_jax.algorithm import packing
from xpo_jax.algorithm.batch_shapes import SAMPLERS
from xpo_jax.models.attention_kernels import SPLASH
from xpo_jax.models.layers import BLOCKS

from . import estimate, hlo, work
from .compiled import Compiled

SQUARE = 8192  # of the matmul that is taken to be at the peak


def calibrate(device: Any, peak_flops: float) -> float | None:
    """Return the clock, Hz, at which the compiler's cycles of a square bfloat16 matmul are at the peak.

    None if the compiler states no cycles, as those of GPUs.
    """
    split = NamedSharding(Mesh(np.array([device]), ("x",)), PS())
    square = jax.ShapeDtypeStruct((SQUARE, SQUARE), jnp.bfloat16, sharding=split)
    compiled: Any = jax.jit(jnp.matmul).lower(square, square).compile()
    module = hlo.parse(compiled.as_text())
    cycles = total(module, module.entry)
    return cycles * peak_flops / (2 * SQUARE**3) if cycles else None


def total(module: hlo.Module, name: str, chosen: Callable[[hlo.Instruction], bool] = lambda _: True) -> int:
    """Return the cycles of a computation's instructions; loops within count as often as their text states, or once."""
    cycles = 0
    for instruction in module.computations[name].values():
        if not chosen(instruction):
            continue
        cycles += instruction.cycles
        for keyword, times in (("body", hlo.trips(module, instruction) or 1), ("to_apply", 1)):
            called = instruction.calls(keyword) if instruction.opcode in ("while", "call") else None
            if called in module.computations:
                cycles += times * total(module, called)  # type: ignore[arg-type]
    return cycles


class Part(NamedTuple):
    """A part of a program on one device: its cycles, and the FLOPs of its matmuls (None: a part of a part)."""

    name: str
    cycles: int
    flops: float | None

    def row(self, clock: float, peak_flops: float) -> list[Any]:
        """Return its name, ms by calibrated cycles, ms of its FLOPs at the peak, and their ratio in %."""
        by_cycles = self.cycles / clock
        if self.flops is None:
            return [self.name, 1e3 * by_cycles, None, None]
        at_peak = self.flops / peak_flops
        return [self.name, 1e3 * by_cycles, 1e3 * at_peak, round(100 * at_peak / by_cycles)]


def parts(s: estimate.Setup, compiled: Sequence[Compiled]) -> list[Part]:
    """Return prefill of each sampling program, and a layer of each gradient's forward and backward pass.

    Both are without cycles and FLOPs of attention's scores where a Pallas kernel computes them, and named so.
    """
    measured = []
    for program in compiled:
        if program.name in SAMPLERS:
            measured.append(_prefill(s, program))
        if program.name == "accumulate":
            measured += _layers(s, program)
    return [part for part in measured if part.cycles]


def _prefill(s: estimate.Setup, program: Compiled) -> Part:
    P = program.tokens or s.prompt_tokens
    rows = s.batch_size * (s.reference_steps if program.name == "ahead" else 1) // s.shards
    cycles = total(program.module, program.module.entry, lambda i: "/prefill/" in i.op_name)
    scores, note = _attention(s, P, rows * P * P)
    flops = work.forward_flops(s.model, rows * P, scores, 0) / s.mesh.shape["tensor"]
    return Part(f"{program.label}: prefill{note}", cycles, flops)


def _attention(s: estimate.Setup, tokens: int, scores: int) -> tuple[int, str]:
    """Return the scores whose cycles are in the text, and what to add to the part's name."""
    return (0, " without its kernel") if s.kernels.at(tokens) == SPLASH else (scores, "")


def _layers(s: estimate.Setup, program: Compiled) -> list[Part]:
    module, layers = program.module, s.model.num_hidden_layers
    W = program.tokens or packing.sequence_lengths(s.prompt_tokens, s.response_tokens)[-1]
    one = dataclasses.replace(s.model, num_hidden_layers=1)
    tokens = s.micro_batch_rows * W
    scores, note = _attention(s, W, tokens * W * (BLOCKS + 1) // (2 * BLOCKS))
    forward = work.forward_flops(one, tokens, scores, 0) / s.mesh.shape["tensor"]
    measured = []
    for instruction in module.computations[module.entry].values():
        body = instruction.calls("body")
        if instruction.opcode != "while" or body is None or hlo.trips(module, instruction) != layers:
            continue
        backward = "transpose(" in instruction.op_name
        times = (2 + s.remat) if backward else 1
        name = f"{program.label}: a layer {'backward' if backward else 'forward'}{note}"
        cycles = total(module, body)
        ring = cycles - total(module, body, lambda i: i.opcode != "while")
        measured.append(Part(name, cycles, times * forward))
        measured.append(Part(f"{name}, in loops over shards", ring, None))
    return measured
