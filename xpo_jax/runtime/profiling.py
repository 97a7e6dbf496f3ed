"""A trace of a few steps, for TensorBoard's profile plugin or Perfetto, in which the parts of a step have names.

The first steps of a start are left out: they meet empty caches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

FROM, STEPS = 2, 2  # steps of this start that come before, and that are traced


class Tracing:
    """Traces a run that begins after step `begun`; each process writes what it sees.

        with Tracing(folder, begun) as tracing:
            tracing.at(done)  # between two steps

    Args:
      folder: where to; None traces nothing.
    """

    def __init__(self, folder: Path | None, begun: int):
        self._folder, self._first = folder, begun + FROM
        self._running = self._said = False

    def at(self, done: int) -> None:
        """`done` steps are behind us."""
        if self._folder is None:
            return
        if done == self._first:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True
        elif done == self._first + STEPS:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running, self._said = False, True
            jax.profiler.stop_trace()
            print(f"traced from step {self._first + 1} into {self._folder}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._folder and error is None and not self._said:
            print(f"nothing was traced: there was no step {self._first + 1}", file=sys.stderr)
