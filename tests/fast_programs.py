"""Compile equal programs of several runs once.

A whole run of the tiny model spends nine tenths of its time on tracing, lowering and compiling its dozen programs.
`shared_programs` compiles a program once per process, whichever run needs it.

What a program is follows from its function, the values that the function closes over, its shardings and the shapes of
its arguments. A run on shared programs still declares and runs them like any other run.

A process may have 65,530 memory maps (vm.max_map_count), and an executable takes a few hundred: a worker that keeps all
of them ends with a segmentation fault in XLA. `forget_programs` drops them in time.

Left out on purpose: JAX's cache on disk, shared by the workers (it saves a tenth); and noticing a patched global that a
traced function reads. Tests that patch such a global must not share programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import types
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from xpo_jax.runtime import compilation
from xpo_jax.runtime.compilation import Program

MAPS = Path("/proc/self/maps")  # Linux has it
MANY_MAPS = 20_000

_compiled: dict[Hashable, jax.stages.Compiled] = {}


def forget_programs() -> None:
    """Drop all compiled programs if this process has many memory maps."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        _compiled.clear()
        jax.clear_caches()
        gc.collect()  # what refers to an executable is often part of a cycle


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Compile each program only once in this process."""
    initialize, compile_anew = Program.__init__, Program.compile

    def initialize_with_identity(
        self: Any, name: str, mesh: jax.sharding.Mesh, function: Any, **options: Any
    ) -> None:
        initialize(self, name, mesh, function, **options)
        self.identity = identity((mesh, function, options))

    def compile_once(self: Any, *args: Any) -> jax.stages.Compiled:
        key = self.identity, identity([(x.shape, x.dtype) for x in jax.tree.leaves(args)])
        if key not in _compiled:
            _compiled[key] = compile_anew(self, *args)
        self._compiled[compilation._shapes(args)] = _compiled[key]
        return _compiled[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Program, "__init__", initialize_with_identity)
        patched.setattr(Program, "compile", compile_once)
        yield


class _Itself:
    """Identifies an object without a value that can be hashed; holds it, so that no other one takes its id."""

    def __init__(self, value: Any):
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value


def identity(value: Any, within: tuple[types.FunctionType, ...] = ()) -> Hashable:
    """Return what is equal for two values that make the same program: functions by their code and closure.

    `within` names the functions whose closures hold the value.
    """
    if callable(value):  # the type checker wraps the functions of each run again
        value = inspect.unwrap(value)
    inner = functools.partial(identity, within=within)
    if isinstance(value, types.FunctionType):
        if value in within:
            return "a function that calls itself"
        inner = functools.partial(identity, within=(*within, value))
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__code__, inner([cells, value.__defaults__, value.__kwdefaults__])
    if isinstance(value, types.MethodType):
        return inner([value.__func__, value.__self__])
    if isinstance(value, functools.partial):
        return inner([value.func, value.args, value.keywords])
    if isinstance(value, Mapping):
        return type(value), tuple((key, inner(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(inner, value))
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, value.tobytes()
    try:
        hash(value)
    except TypeError:
        if dataclasses.is_dataclass(value):
            return type(value), inner([getattr(value, field.name) for field in dataclasses.fields(value)])
        return _Itself(value)
    return type(value), value
