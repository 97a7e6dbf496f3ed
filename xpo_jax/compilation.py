"""Compile ahead, run only what was compiled, and count what XLA compiles.

A shape that was not announced is an error instead of a silent recompilation in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from xpo_jax import distributed


def _shapes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(args))


class Program:
    """A function under jax.jit that runs only for the shapes it was compiled for.

    Args:
      name: for messages and the start-up summary.
      mesh: that the function's `sharding.constrain` refers to.
      function, options: as for jax.jit (in_shardings, out_shardings, donate_argnums, ...).
    """

    def __init__(self, name: str, mesh: Mesh, function: Callable[..., Any], **options: Any):
        self.name, self._mesh = name, mesh
        self._jit = jax.jit(function, **options)
        self._in_shardings = options.get("in_shardings")
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """Compile for arguments like these: arrays or ShapeDtypeStructs."""
        with jax.set_mesh(self._mesh):
            compiled = self._jit.lower(*args).compile()
        self._compiled[_shapes(args)] = compiled
        return compiled

    def __call__(self, *args: Any) -> Any:
        compiled = self._compiled.get(_shapes(args))
        if compiled is None:
            raise RuntimeError(
                f"program {self.name!r} was not announced for shapes {[s for s in _shapes(args) if s][-8:]};"
                " this is a fault of xpo_jax, whose runs announce every shape at their start"
            )
        if self._in_shardings is not None and jax.process_count() > 1:
            args = distributed.put(args, self._in_shardings)  # one process may leave it to jit
        return compiled(*args)


class CompilationCounter:
    """Counts every compilation by XLA's backend in this process from its creation on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"
