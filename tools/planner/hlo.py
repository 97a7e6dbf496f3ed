"""Read the text of a compiled program, XLA's after scheduling: its computations and their instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_LEAF = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"^\}(\s*$|,)")
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
    for line in _lines(text):
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


def _lines(text: str) -> Iterator[str]:
    """Yield the lines, an instruction's as one: the attributes of a kernel may fill several."""
    whole = ""
    for line in text.splitlines():
        if line.rstrip() and not (_START.match(line) or _COMPUTATION.match(line) or _END.match(line)):
            whole += line
            continue
        yield whole
        whole = line
    yield whole


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
