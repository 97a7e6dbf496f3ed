"""Programs that are compiled at start-up and run for those shapes only; the compilation cache; a count of compilations.

A shape that was not compiled at start-up is an error instead of a silent recompilation in the middle of a run.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from xpo_jax.io.user_paths import user_cache
from xpo_jax.runtime import backend, distributed


def _shapes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(args))


class Program:
    """A function under jax.jit that runs only for the shapes it was compiled for.

    Args:
      name: for error messages and the start-up summary.
      mesh: the one that the function's `sharding.constrain` refers to.
      function, options: as for jax.jit (in_shardings, out_shardings, donate_argnums, ...).

    latest: name of the program that was called last, whose errors may appear only where its results are read.
    """

    latest: ClassVar[str | None] = None

    def __init__(self, name: str, mesh: Mesh, function: Callable[..., Any], **options: Any):
        self.name, self._mesh = name, mesh
        self._jit = jax.jit(function, **options)
        self._in_shardings = options.get("in_shardings")
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Trace for arguments like these."""
        with jax.set_mesh(self._mesh):
            return self._jit.lower(*args)

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """Compile for arguments like these: arrays or ShapeDtypeStructs."""
        with backend.memory_checked("compiling", self.name):
            compiled = self.lower(*args).compile()
        self._compiled[_shapes(args)] = compiled
        return compiled

    def __call__(self, *args: Any) -> Any:
        compiled = self._compiled.get(_shapes(args))
        if compiled is None:
            raise RuntimeError(
                f"program {self.name!r} was not compiled for shapes {[s for s in _shapes(args) if s][-8:]};"
                " this is a bug in xpo_jax, whose runs declare every shape at start-up"
            )
        Program.latest = self.name
        with backend.memory_checked("running", self.name):
            if self._in_shardings is not None:
                args = distributed.put(args, self._in_shardings)
            return compiled(*args)


class CompilationCounter:
    """Counts every compilation by XLA's backend in this process from its creation on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


# Least recently used entries are evicted. A run of the worked example needs about 10 MB.
CACHE_BYTES = 4 * 2**30


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of compiled programs: in the user's cache directory, one per kind of processor.

    XLA compiles for the local processor, JAX's cache keys do not include it, and different machines share home
    directories: there, another machine's program would end the process with an illegal instruction.
    """
    return user_cache(environ) / "compiled" / f"{platform.machine()}-{_processor()}"


def enable_cache(environ: Mapping[str, str]) -> None:
    """Let JAX cache compiled programs on disk and reuse them.

    JAX_COMPILATION_CACHE_DIR overrides all of this with another folder (empty: no cache). Processes may share a
    folder; JAX locks it. If the folder cannot be written to, a line on stderr says so, and the run compiles everything.
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
            f"xpo_jax: compiled programs are not cached ({error}); set JAX_COMPILATION_CACHE_DIR to another folder",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small ones are numerous


def _processor() -> str:
    """Return a hash of the processor's model and features."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        cpuinfo = ""
    features = re.findall(r"^(?:model name|flags|Features)\s*:.*$", cpuinfo, re.MULTILINE)
    return hashlib.sha256("\n".join([platform.processor(), *sorted(set(features))]).encode()).hexdigest()[:12]
