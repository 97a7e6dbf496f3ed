"""The bytes that the instructions of a compiled program move to and from device memory.

A fusion reads its operands and writes its results once; of an operand of which it takes only a slice, also after
operations that need only the slice's own elements, it reads that slice, and of a result that it updates in place it
writes the update. TPU compilers state which arrays are on the chip (`S(1)` in a layout); those move no bytes, and the
copies that bring them there do.

Left out on purpose: caches between memory and chip (on a GPU a small array may be read from L2), and scratch memory of
kernels that are custom calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from .hlo import FREE, Computation, Instruction, Leaf, Module, trips

_SLICES = ("dynamic-slice", "slice", "gather")
# An element of their result needs only its own elements of the first large operand, in a fusion.
_ELEMENTWISE = {
    "bitcast", "reshape", "convert", "reduce-precision", "add", "subtract", "multiply", "divide", "maximum", "minimum",
    "negate", "exponential", "select", "reduce", "pad",
}  # fmt: skip


class Traffic(NamedTuple):
    """Bytes read from and written to device memory."""

    read: int
    written: int

    def __add__(self, other: Traffic) -> Traffic:  # type: ignore[override]
        return Traffic(self.read + other.read, self.written + other.written)


def traffic(module: Module, computation: Computation, instruction: Instruction) -> Traffic:
    """Return the bytes that an instruction moves; a loop within counts as often as its text states, or once."""
    opcode, rest = instruction.opcode, instruction.rest
    if opcode in FREE or opcode.endswith("-done") or 'custom_call_target="ConcatBitcast"' in rest:
        return Traffic(0, 0)
    inputs = [computation[name].leaves[0] for name in instruction.operands if name in computation]
    if opcode in ("while", "call", "conditional") or (opcode == "async-start" and instruction.calls()):
        return _called(module, instruction)
    if opcode == "copy-start":
        return Traffic(instruction.leaves[1].moved, instruction.leaves[0].moved)
    if opcode == "slice-start":
        return Traffic(
            instruction.leaves[1].bytes if not inputs[0].on_chip else 0, instruction.leaves[1].moved
        )
    if opcode in _SLICES:
        return Traffic(0 if inputs[0].on_chip else instruction.leaves[0].bytes, instruction.leaves[0].moved)
    if opcode == "dynamic-update-slice":
        return Traffic(inputs[1].moved, 0 if instruction.leaves[0].on_chip else inputs[1].bytes)
    if opcode == "fusion":
        called = module.computations.get(instruction.calls() or "")
        if called:
            return _fusion(called, instruction, inputs)
    results = instruction.leaves
    if opcode.endswith("-start") and len(results) > len(inputs):  # (operands, results, contexts)
        results = results[len(inputs) :]
    return Traffic(sum(x.moved for x in inputs), sum(x.moved for x in results))


def total(module: Module, name: str) -> Traffic:
    """Return the bytes that a computation moves."""
    computation = module.computations[name]
    return sum((traffic(module, computation, i) for i in computation.values()), Traffic(0, 0))


def _called(module: Module, instruction: Instruction) -> Traffic:
    if instruction.opcode == "while":
        body, count = instruction.calls("body"), trips(module, instruction) or 1
        once = total(module, body) if body in module.computations else Traffic(0, 0)  # type: ignore[arg-type]
        return Traffic(once.read * count, once.written * count)
    if instruction.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        names += [
            name for key in ("true_computation", "false_computation") if (name := instruction.calls(key))
        ]
        return max((total(module, n) for n in names if n in module.computations), default=Traffic(0, 0))
    name = instruction.calls("to_apply") or instruction.calls()
    return total(module, name) if name in module.computations else Traffic(0, 0)  # type: ignore[arg-type]


def _fusion(called: Computation, instruction: Instruction, inputs: list[Leaf]) -> Traffic:
    users: dict[str, list[Instruction]] = {}
    for inner in called.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    parameters = {
        int(inner.operands[0]): inner.name for inner in called.values() if inner.opcode == "parameter"
    }
    read = sum(
        0 if leaf.on_chip else min(leaf.bytes, _read_of(parameters.get(i, ""), users, leaf))
        for i, leaf in enumerate(inputs)
    )
    roots = _roots(called)
    written = sum(
        0 if leaf.on_chip else (_updated(root, called) if root is not None else None) or leaf.bytes
        for leaf, root in zip(instruction.leaves, [*roots, *[None] * len(instruction.leaves)], strict=False)
    )
    return Traffic(read, written)


def _read_of(name: str, users: Mapping[str, list[Instruction]], leaf: Leaf) -> int:
    """Return the bytes of a fusion's parameter, or of a value within, that the fusion needs."""
    read = 0
    for user in users.get(name, []):
        first, result = user.operands[0] == name, user.leaves[0]
        if user.opcode in _SLICES and first:
            read += result.bytes
        elif user.opcode == "dynamic-update-slice" and first:
            read += 0  # updated in place
        elif user.opcode in _ELEMENTWISE and user.name in users and len(user.leaves) == 1 and result.bytes:
            read += _read_of(user.name, users, result) * leaf.bytes // result.bytes
        else:
            return leaf.bytes
        if read >= leaf.bytes:
            return leaf.bytes
    return read


def _roots(called: Computation) -> list[Instruction | None]:
    root = next(reversed(called.values()))
    if root.opcode == "tuple":
        return [called.get(name) for name in root.operands]
    return [root]


def _updated(root: Instruction, called: Computation) -> int | None:
    """Return the bytes of the update, if a fusion's result is an operand that is updated in place."""
    while root.opcode in ("bitcast", "convert") and root.operands and root.operands[0] in called:
        root = called[root.operands[0]]
    if root.opcode != "dynamic-update-slice":
        return None
    update = called.get(root.operands[1])
    return update.leaves[0].bytes if update else None
