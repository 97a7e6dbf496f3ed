"""Compile ahead, run only what was compiled, count what XLA compiles, and keep it for the next run.

A shape that was not announced is an error instead of a silent recompilation in the middle of a run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from xpo_jax.runtime import distributed


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


CACHE_BYTES = 4 * 2**30  # the entries used longest ago go first; a run of the worked example needs some 10 MB


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where compiled programs are kept: in the user's cache directory, a folder for each kind of processor.

    XLA compiles for the processor at hand, JAX's keys do not tell one from another, and home directories are shared
    by unlike machines: there, a program from elsewhere would end the process with an illegal instruction.
    """
    user = Path(environ.get("XDG_CACHE_HOME") or "")
    if not user.is_absolute():  # by the standard, a relative one does not count
        user = Path(os.path.expanduser("~")) / ".cache"
    return user / "xpo_jax" / "compiled" / f"{platform.machine()}-{_processor()}"


def keep_compiled(environ: Mapping[str, str]) -> None:
    """Let JAX keep what it compiles, and take from there what it compiled before.

    JAX_COMPILATION_CACHE_DIR names another folder, and is then all that counts (empty: keep nothing). Processes may
    share a folder, JAX locks it. Says in one line on stderr if the folder cannot be written to; the run then
    compiles as if there were none.
    """
    if "JAX_COMPILATION_CACHE_DIR" in environ:
        return
    folder = cache_folder(environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(
            f"xpo_jax: compiled programs are not kept ({error}); JAX_COMPILATION_CACHE_DIR may name another folder",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the small ones are many


def _processor() -> str:
    """A fingerprint of what the processor can do."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        told = ""
    found = re.findall(r"^(?:model name|flags|Features)\s*:.*$", told, re.MULTILINE)
    return hashlib.sha256("\n".join([platform.processor(), *sorted(set(found))]).encode()).hexdigest()[:12]
