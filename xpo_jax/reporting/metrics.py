"""A run's metrics: metrics.jsonl, TensorBoard, Weights & Biases, the console's table and progress; and a timer.

A number that is not finite is null in metrics.jsonl, because strict JSON has no word for it, nan in the
console's table, and a gap in TensorBoard. Numbers are the host's: device_get first.

Of many processes, process 0 writes and the others do nothing.

Left out on purpose: what the metrics mean (docs/evaluation.md), and cutting the file back for a resume
(verdict_journal.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from xpo_jax.io.files import WriteError, append_whole, to_json
from xpo_jax.reporting.console import StepProgress, StepTable
from xpo_jax.reporting.writers import Writer


class Metrics:
    """Where a run's metrics go. Use it as a context manager, or close it."""

    def __init__(
        self,
        run_path: str | Path,
        *,
        total_steps: int,
        others: Sequence[Writer] = (),
        first_step: int = 0,
        console: Sequence[str] = (),
        console_every_steps: int = 1,
        writes: bool = True,
    ):
        """Open <run_path>/metrics.jsonl.

        Args:
          run_path: the run directory.
          total_steps: the run's last step, for progress.
          others: get the same, see `writers.opened`, which closes them.
          first_step: the step that the run resumes from; the others drop what they have of later ones.
          console: names of the metrics in the console's table, see `console.StepTable`.
          console_every_steps: every n-th step has a row in that table, see `console.StepTable`.
          writes: whether this process writes and shows anything at all.
        """
        self._path = Path(run_path) / "metrics.jsonl"
        self._writes = writes
        self._file = open(self._path if writes else os.devnull, "ab", buffering=0)  # noqa: SIM115, close()
        self._writers = others if writes else ()
        for writer in self._writers:
            writer.begin(first_step)
        self._table = StepTable(console, console_every_steps, total_steps)
        self._progress = StepProgress(total_steps)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the metrics of a step: numbers, or arrays of no dimension, on the host.

        Args:
          step: updates done so far.
          values: by name, as in "loss/dpo".

        Raises:
          ValueError: a value is not a number, or the file cannot be written.
        """
        for name, value in values.items():
            if np.ndim(value) or (not isinstance(value, int | float) and not hasattr(value, "dtype")):
                raise ValueError(f"metric {name} at step {step}: {value!r} is not a number; give a scalar")
        if not self._writes:
            return
        try:
            append_whole(self._file, (to_json({"step": step, **values}) + "\n").encode())
        except OSError as error:
            raise WriteError(f"{self._path}: cannot be written ({error.strerror}); free space") from error
        for writer in self._writers:
            writer.scalars(step, values)
        self._progress.update(step)
        self._table.update(step, values)

    def samples(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send sample texts to TensorBoard and Weights & Biases; call it before the step's `log`.

        Args:
          step: updates done so far.
          name: of the table.
          rows: one mapping per row, all with the same columns; entries that are mappings are left out.
        """
        texts = [{k: v for k, v in row.items() if not isinstance(v, Mapping)} for row in rows]
        for writer in self._writers:
            writer.texts(step, f"samples/{name}", texts)

    def close(self) -> None:
        """Remove the progress bar and close the file."""
        self._progress.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Timer:
    """Seconds spent under each name: `with timer("sample"): ...`, then `timer.take()`.

    Args:
      mark: makes a context of that name around what is timed, such as jax.profiler.TraceAnnotation.
      clock: seconds; for tests.
    """

    def __init__(
        self,
        mark: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._mark, self._clock = mark, clock
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            with self._mark(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call as {"time/sample": ...}, and start again from zero."""
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken
