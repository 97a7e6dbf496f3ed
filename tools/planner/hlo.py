"""Read the text of a compiled program: its instructions, and the bytes that each moves to and from device memory.

The text is XLA's, after scheduling. A fusion reads its operands and writes its results once; of an operand of which it
takes only a slice, also after operations that need only the slice's own elements, it reads that slice, and of a result
that it updates in place it writes the update. TPU compilers
state which arrays are on the chip (`S(1)` in a layout); those move no bytes, and the copies that bring them there do.

Left out on purpose: caches between memory and chip (on a GPU a small array may be read from L2), and scratch memory of
kernels that are custom calls.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_LEAF = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_SLICES = ("dynamic-slice", "slice", "gather")
# An element of their result needs only its own elements of the first large operand, in a fusion.
_ELEMENTWISE = {
    "bitcast", "reshape", "convert", "reduce-precision", "add", "subtract", "multiply", "divide", "maximum", "minimum",
    "negate", "exponential", "select", "reduce", "pad",
}  # fmt: skip
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "iota",
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Leaf(NamedTuple):
    """One array of an instruction's result: dtype, dimensions, and the text of its layout."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def on_chip(self) -> bool:
        """Whether it is in another memory space than the device's main memory."""
        return re.search(r"S\([1-9]", self.layout) is not None

    @property
    def bytes(self) -> int:
        """Its bytes, including the padding of its tiles."""
        digits = re.sub(r"^[a-z]+", "", self.dtype)
        bits = _BITS.get(self.dtype) or int(re.match(r"\d*", digits)[0] or 0)  # type: ignore[index]
        minor, _, tiles = self.layout.partition(":")
        order = [int(axis) for axis in minor.split(",") if axis]
        dims = [self.dims[axis] for axis in reversed(order)] if len(order) == len(self.dims) else [*self.dims]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        sizes = [int(size) for size in tile[1].split(",")] if tile else []
        for i, size in enumerate(reversed(sizes), 1):
            if i <= len(dims) and len(dims) >= len(sizes):
                dims[-i] = -(-dims[-i] // size) * size
        return math.prod(dims) * bits // 8

    @property
    def moved(self) -> int:
        """The bytes that reading or writing it moves."""
        return 0 if self.on_chip else self.bytes


class Instruction(NamedTuple):
    """One line: name, the arrays of its result, opcode, names of its operands, and the rest of the line.

    A parameter has its number instead of operands, a constant its value.
    """

    name: str
    leaves: tuple[Leaf, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def calls(self, keyword: str = "calls") -> str | None:
        """Return the computation that it calls."""
        match = re.search(rf"\b{keyword}=%?([\w.\-]+)", self.rest)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """The name of the JAX operation that it comes from, "" if none is stated."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate; 0 without one."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(match[1]) if match else 0


Computation = dict[str, Instruction]  # in order; the last is the root


class Module(NamedTuple):
    """A compiled program: its computations by name, and the name of the entry."""

    computations: Mapping[str, Computation]
    entry: str

    def instructions(self) -> Iterator[Instruction]:
        """Yield every instruction, also those inside fusions."""
        for computation in self.computations.values():
            yield from computation.values()


def parse(text: str) -> Module:
    """Read the text of a compiled program, as `compiled.as_text()` returns it.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        start = _START.match(line)
        if start and current is not None:
            instruction = _instruction(start[2], line[start.end() :])
            if instruction is not None:
                current[instruction.name] = instruction
            continue
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _closing(text: str, start: int) -> int:
    """Return the position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text) - 1


def _instruction(name: str, text: str) -> Instruction | None:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    opcode = re.match(r" ?([a-z][\w\-]*)\(", text[end:])
    if not opcode:
        return None
    leaves = tuple(
        Leaf(dtype, tuple(int(n) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _LEAF.findall(text[:end])
    )
    start = end + opcode.end() - 1
    stop = _closing(text, start)
    inside = text[start + 1 : stop]
    operands = (
        (inside,) if opcode[1] in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    )
    return Instruction(name, leaves, opcode[1], operands, text[stop + 1 :])


def trips(module: Module, loop: Instruction) -> int | None:
    """Return the iterations of a while loop: those stated, or the constant that a counter from 0 is compared with."""
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if stated:
        return int(stated[1])
    condition = module.computations.get(loop.calls("condition") or "")
    root = next(reversed(condition.values())) if condition else None
    if not condition or root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    limit = condition.get(root.operands[1])
    return int(limit.operands[0]) if limit is not None and limit.opcode == "constant" else None


# ---- bytes --------------------------------------------------------------------------------------


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
