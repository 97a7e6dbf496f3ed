"""A profiler trace of a few steps, for TensorBoard's profile plugin or Perfetto; the parts of a step are named in it.

The first steps after a start are left out, because their caches are empty.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

SKIPPED_STEPS, TRACED_STEPS = 2, 2  # of a start, in this order


class Profiler:
    """Traces steps of a run that starts after step `start`; each process writes a trace of its own.

        with Profiler(folder, start) as profiler:
            profiler.at(done)  # between two steps

    Args:
      folder: of the traces; None traces nothing.
      start: steps done before this start.
    """

    def __init__(self, folder: Path | None, start: int):
        self._folder, self._first = folder, start + SKIPPED_STEPS
        self._running = self._traced = False

    def at(self, done: int) -> None:
        """Start or stop the trace once `done` steps have completed."""
        if self._folder is None:
            return
        if done == self._first:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True
        elif done == self._first + TRACED_STEPS:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running, self._traced = False, True
            jax.profiler.stop_trace()
            print(f"traced from step {self._first + 1} into {self._folder}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._folder and error is None and not self._traced:
            print(f"nothing was traced: there was no step {self._first + 1}", file=sys.stderr)
