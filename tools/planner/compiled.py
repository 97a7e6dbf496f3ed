"""What a topology's compiler makes of a run's programs: bytes, what is live together, and what should not be there.

Bytes are those of XLA's memory_analysis, per device. Left out on purpose: scratch on the chip, memory of the runtime.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from xpo_jax.algorithm import packing
from xpo_jax.algorithm.batch_shapes import SAMPLERS
from xpo_jax.runtime.backend import BackendError

from . import estimate, hlo, traffic, work
from .programs import Declared


class Compiled(NamedTuple):
    """One compiled program.

    Attributes:
      label: its name, and a sequence length.
      arguments, outputs, aliased, temporaries, code: bytes per device, of memory_analysis.
      donated: arguments that the run gives away.
      seconds: of the compilation.
      module: its text, read.
    """

    # long: one field per figure of memory_analysis
    label: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    donated: int
    seconds: float
    module: hlo.Module

    @property
    def name(self) -> str:
        """The program's name, without a sequence length."""
        return self.label.split()[0]

    @property
    def tokens(self) -> int | None:
        """The sequence length that it is compiled for; None if its label has none."""
        length = self.label.partition("=")[2]
        return int(length) if length else None

    @property
    def total(self) -> int:
        """The bytes that it needs while it runs, without its code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def collectives(self) -> Counter[str]:
        """The number of collective operations in its text by kind; one in a loop counts once."""
        return count_collectives(self.module.instructions())


class Refused(NamedTuple):
    """A program that the compiler refuses, because it needs more memory than a device has; and its message."""

    label: str
    message: str


def compile_all(
    programs: Sequence[Declared], log: Callable[[str], None]
) -> tuple[list[Compiled], list[Refused]]:
    """Compile programs one after another; `log` gets a line for each."""
    compiled, refused = [], []
    for label, compile_program in programs:
        started = time.monotonic()
        try:
            executable: Any = compile_program()
        except BackendError as error:
            refused.append(Refused(label, str(error)))
            log(f"{label}: refused after {time.monotonic() - started:.0f} s")
            continue
        compiled.append(analyse(label, executable, time.monotonic() - started))
        log(f"{label}: compiled in {compiled[-1].seconds:.0f} s")
    return compiled, refused


def analyse(label: str, executable: Any, seconds: float) -> Compiled:
    """Read the figures of a compiled program (a jax.stages.Compiled)."""
    memory = executable.memory_analysis()
    arguments = jax.tree.leaves(executable.args_info, is_leaf=lambda leaf: hasattr(leaf, "donated"))
    return Compiled(
        label,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        sum(leaf.donated for leaf in arguments),
        seconds,
        hlo.parse(executable.as_text()),
    )


def count_collectives(instructions: Iterable[hlo.Instruction]) -> Counter[str]:
    """Count collective operations by kind; the start and the end of an asynchronous one are one."""
    kinds = (instruction.opcode.removesuffix("-start") for instruction in instructions)
    return Counter(kind for kind in kinds if kind in hlo.COLLECTIVES)


# ---- beside the planner ---------------------------------------------------------------------------


def planned_total(s: estimate.Setup, label: str) -> int | None:
    """Return the planner's bytes of a program while it runs; None for shorter rows, which it does not plan."""
    name, _, length = label.partition(" ")
    longest = packing.sequence_lengths(s.prompt_tokens, s.response_tokens)[-1]
    tokens = int(length.partition("=")[2] or 0)
    if name in SAMPLERS:
        s = dataclasses.replace(work.one_call(s, name), prompt_tokens=tokens)
    elif tokens and tokens not in (longest, s.judge.tokens if s.judge else None):
        return None
    phases, judge = estimate.memory(s), "judge" if s.judge and s.judge.model else "reference"
    # the base and an adapter, or all weights
    sampled = "reference" if s.lora.rank else "policy, for sampling"
    parts = {
        **dict.fromkeys(SAMPLERS, ("sample", {sampled, "KV cache", "one layer"})),
        "score": ("score", {"reference", "one layer", "logits chunk"}),
        "judge": ("judge", {judge, "KV cache", "one layer"}),
        "accumulate": (
            "gradient",
            phases["gradient"].keys() - {"optimizer state", "reference", "judge", "code"},
        ),
        "apply": ("apply", phases["apply"].keys() - {"reference", "judge", "code"}),
        "init": ("apply", {"master weights", "optimizer state"}),
        "for_sampling": ("sample", {"master weights", "policy, for sampling"}),
        "fingerprint": ("sample", {"reference"}),
        "zeros": ("gradient", {"gradients"}),
        "stack": ("gradient", {"reference", "base, stacked"}),
    }
    phase, names = parts[name]
    planned = sum(size for part, size in phases[phase].items() if part in names)
    return planned + (estimate.gathered(s) if name == "for_sampling" else 0)


def planned_phases(s: estimate.Setup) -> dict[str, int]:
    """Return the planner's bytes of each phase of a step, without the code."""
    return {
        phase: sum(size for part, size in parts.items() if part != "code")
        for phase, parts in estimate.memory(s).items()
    }


def phases(s: estimate.Setup, compiled: Sequence[Compiled]) -> dict[str, int]:
    """Return the bytes that are live together in each phase of a step, from the compiled programs.

    A phase is left out if one of its programs was refused.
    """
    by_name: dict[str, list[Compiled]] = {program.name: [] for program in compiled}
    for program in compiled:
        by_name[program.name].append(program)

    def most(*names: str) -> int | None:
        return max((program.total for name in names for program in by_name.get(name, [])), default=None)

    needed = ("init", "for_sampling", "zeros")
    if not set(needed) <= by_name.keys():
        return {}
    state, copy, masters = (max(program.outputs for program in by_name[name]) for name in needed)
    reference = copy + estimate.base(s)
    judge = estimate.sampling_copy(s.judge.model, s.mesh, s.dtype) if s.judge and s.judge.model else 0
    sampled = most(*SAMPLERS)  # or its copy of the weights is made, from the masters
    made = max(program.outputs + program.temporaries for program in by_name["for_sampling"])
    # a program's total includes the weights that are its arguments: one of the two copies, or the state
    both = {
        "sample": (sampled and max(sampled, made), state + copy + judge),
        "score": (most("score"), state + copy + judge),
        "judge": (most("judge"), state + copy + (reference if judge else 0)),
        "gradient": (most("accumulate"), state - masters + reference + judge),
        "apply": (most("apply"), reference + judge),
    }
    return {name: program + rest for name, (program, rest) in both.items() if program is not None}


# ---- the decode loop --------------------------------------------------------------------------------


class DecodeLoop(NamedTuple):
    """One decoded token of a batch, as compiled.

    Attributes:
      moved: bytes from and to device memory.
      floor: weights, and keys and values, of the planner; what a token must read.
      caches_written: bytes of keys and values that are written as complete arrays, without their padding.
      gathered: bytes that collectives gather.
      collectives: by kind.
    """

    moved: traffic.Traffic
    floor: int
    caches_written: int
    gathered: int
    collectives: Counter[str]


def decode_loop(s: estimate.Setup, program: Compiled) -> DecodeLoop | None:
    """Read the sampler's loop over tokens with all rows (those of later stages have fewer); None if it has none."""
    module = program.module
    loops = [
        instruction
        for instruction in module.instructions()
        if instruction.opcode == "while" and instruction.op_name.endswith("decode/while")
    ]
    if not loops:
        return None
    loop = max(loops, key=lambda while_: sum(leaf.bytes for leaf in while_.leaves))
    name = loop.calls("body")
    if name not in module.computations:
        return None
    call = work.one_call(s, program.name)
    rows = call.batch_size * call.reference_steps * call.candidates
    s = dataclasses.replace(call, prompt_tokens=program.tokens or s.prompt_tokens, batch_size=rows)
    body = module.computations[name]
    return DecodeLoop(
        traffic.total(module, name),
        sum(work.decode_bytes(s)),
        caches_written(s, module, body),
        sum(
            instruction.leaves[-1].bytes
            for instruction in within(module, name)
            if instruction.opcode in ("all-gather", "all-gather-start")
        ),
        count_collectives(within(module, name)),
    )


def within(module: hlo.Module, name: str) -> list[hlo.Instruction]:
    """Return the instructions of a computation and of those it calls, except fusions."""
    computation, result = module.computations[name], []
    for instruction in computation.values():
        result.append(instruction)
        if instruction.opcode in ("while", "call", "conditional", "async-start"):
            for keyword in ("body", "to_apply", "calls", "true_computation", "false_computation"):
                called = instruction.calls(keyword)
                if called in module.computations:
                    result += within(module, called)  # type: ignore[arg-type]
    return result


def caches_written(s: estimate.Setup, module: hlo.Module, body: hlo.Computation) -> int:
    """Return the bytes of whole keys or values of a layer that the loop writes to memory, instead of one position."""
    shard, rows = estimate.local(s.model, s.mesh), s.batch_size // s.shards
    heads, size = shard.num_key_value_heads, shard.head_dim
    shapes = [sorted((rows, heads, slots, size)) for slots in (s.prompt_tokens, s.response_tokens)]
    written = 0
    for instruction in body.values():
        if instruction.opcode in hlo.FREE or instruction.opcode.endswith("-done"):
            continue
        results = instruction.leaves[:1] if instruction.opcode.endswith("-start") else instruction.leaves
        cached = [leaf for leaf in results if sorted(leaf.dims) in shapes and not leaf.on_chip]
        if cached and instruction.opcode != "dynamic-update-slice":
            written += min(sum(x.bytes for x in cached), traffic.traffic(module, body, instruction).written)
    return written
