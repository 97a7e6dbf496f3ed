"""Metrics: metrics.jsonl, TensorBoard, Weights & Biases, a console table, progress with the time left, timers.

Standard output gets what is read afterwards (tables, and the last line); standard error gets the
progress. A number that is not finite is null in metrics.jsonl, because strict JSON has no word for it,
nan in the console table, and a gap in TensorBoard. Numbers come from the host: device_get first.

Where there are many processes, process 0 writes and the others take part in silence.

Left out on purpose: what the metrics mean, cutting the file back after a resume (resume.py), and widths of
characters that fill two cells of a terminal.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from xpo_jax.io.files import WriteError, append_whole, to_json
from xpo_jax.io.text import visible
from xpo_jax.reporting.writers import TensorBoard, WeightsAndBiases, Writer


class Metrics:
    """Where a run's numbers go. Use it as a context manager, or close it."""

    def __init__(
        self,
        run_path: str | Path,
        *,
        tensorboard: bool,
        wandb: bool,
        total_steps: int,
        first_step: int = 0,
        console: Sequence[str] = (),
        console_every_steps: int = 1,
        progress_every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        writes: bool = True,
    ):
        """Open <run_path>/metrics.jsonl and, if wanted, <run_path>/tensorboard/.

        Args:
          run_path: the run directory.
          tensorboard: whether event files are written.
          wandb: whether Weights & Biases gets the same, see `writers.WeightsAndBiases`.
          total_steps: of the run, for progress.
          first_step: that the run goes on after; what TensorBoard has of later ones is dropped.
          console: names of the metrics in the console table, most important first; what does not
            fit into the width is left out.
          console_every_steps: a table row after every so many steps, and after the last.
          progress_every_seconds: how often a line of progress is printed where standard error is no
            terminal (there is a bar where it is one).
          clock: seconds; for tests.
          writes: whether this process writes and shows anything at all.
        """
        self._path = Path(run_path) / "metrics.jsonl"
        self._writes = writes
        self._file = open(self._path if writes else os.devnull, "ab", buffering=0)  # noqa: SIM115, close()
        self._writers: list[Writer] = []
        if tensorboard and writes:
            self._writers.append(TensorBoard(run_path, first_step))
        if wandb and writes:
            self._writers.append(WeightsAndBiases(run_path))
        self._console = _columns(console)
        self._console_every, self._rows = console_every_steps, 0
        self._progress = _Progress(total_steps, progress_every_seconds, clock)
        self._total = total_steps

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the metrics of a step: numbers, or arrays of no dimension, on the host.

        Args:
          step: updates done so far.
          values: by name, as in "loss/dpo".

        Raises:
          ValueError: if a value is not a number, or the disk refuses.
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
        due = step % self._console_every == 0 or step == self._total
        if due and not self._console.keys().isdisjoint(values):
            self._row(step, values)

    def samples(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send texts for people to TensorBoard and Weights & Biases; before the step's `log`.

        Args:
          step: updates done so far.
          name: of the table.
          rows: one mapping per line, with the same columns each; entries that are mappings are left out.
        """
        lines = [{k: v for k, v in row.items() if not isinstance(v, Mapping)} for row in rows]
        for writer in self._writers:
            writer.texts(step, f"samples/{name}", lines)

    def say(self, text: str) -> None:
        """Print to standard output without tearing the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Finish the bar and close the files."""
        self._progress.close()
        self._file.close()
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _row(self, step: int, values: Mapping[str, Any]) -> None:
        width, cells, heads = console_width(), [f"{step:>6}"], ["  step"]
        for name, label in self._console.items():
            size = max(len(label), 9)
            if sum(map(len, heads)) + 2 * len(heads) + size > width:
                break
            heads.append(f"{label:>{size}}")
            cells.append(f"{_cell(values.get(name)):>{size}}")
        if self._rows % 20 == 0:
            self.say("  ".join(heads))
        self._rows += 1
        self.say("  ".join(cells))


class _Progress:
    """A bar on a terminal; elsewhere a whole line now and then, so that logs stay readable."""

    def __init__(self, total: int, every_seconds: float, clock: Callable[[], float]):
        self._total, self._every, self._clock = total, every_seconds, clock
        self._bar: tqdm | None = None
        self._begin: tuple[int, float] | None = None
        self._printed = -math.inf

    def update(self, step: int) -> None:
        now = self._clock()
        if self._begin is None:
            # Time is counted from the end of the first step: before it lies the compilation.
            self._begin = (step, now)
            if sys.stderr.isatty():
                self._bar = tqdm(
                    total=self._total, initial=step, unit=" step", dynamic_ncols=True, leave=False
                )
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        elif now - self._printed >= self._every or step == self._total:
            self._printed = now
            first, start = self._begin
            left = "?"
            if step > first:
                left = tqdm.format_interval((now - start) / (step - first) * max(self._total - step, 0))
            share = f"{100 * step / max(self._total, 1):.0f} %"
            print(f"step {step}/{self._total} ({share}), time left {left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Timer:
    """Seconds spent under each name: `with timer("sample"): ...`, then `timer.take()`.

    Args:
      mark: a context of that name around what is timed, such as jax.profiler.TraceAnnotation.
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
        """The seconds since the last call, as {"time/sample": ...}; starts again from zero."""
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


# ---- text for people ----------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value as a table shows it: four significant digits, counts in full, "-" for none."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float) or hasattr(value, "dtype"):
        number = float(value)
        return f"{number:.1f}" if 1e3 <= abs(number) < 1e7 else f"{number:.4g}"
    return visible(str(value))


def console_width() -> int:
    """Columns of the terminal; 100 where there is none, and never under 40."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def summary_table(rows: Mapping[str, Any], width: int | None = None) -> str:
    """Names and values in two columns; long values are wrapped under themselves."""
    size = max((len(name) for name in rows), default=0)
    lines = []
    for name, value in rows.items():
        wrapped = _wrap(show(value), max(20, (width or console_width()) - size - 2))
        lines += [
            f"{head:<{size}}  {text}"
            for head, text in zip([name] + [""] * len(wrapped), wrapped, strict=False)
        ]
    return "\n".join(lines)


def text_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], width: int | None = None) -> str:
    """A table with a rule under its head; columns of numbers to the right, long texts wrapped.

    Args:
      heads: one per column.
      rows: one entry per column each; texts may be of any length, with newlines.
      width: columns of the console; the terminal's by default.
    """
    cells = [[show(entry) for entry in row] for row in rows]
    numeric = [
        all(entry is None or not isinstance(entry, str) for entry in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(heads)
    natural = [
        max(len(line) for text in column for line in text.split("\n"))
        for column in zip(heads, *cells, strict=True)
    ]
    sizes = _fit(natural, (width or console_width()) - 2 * (len(heads) - 1))

    def lines(texts: Sequence[str]) -> list[str]:
        wrapped = [_wrap(text, size) for text, size in zip(texts, sizes, strict=True)]
        height = max(map(len, wrapped))
        filled = [column + [""] * (height - len(column)) for column in wrapped]
        return [
            "  ".join(f"{t:>{s}}" if n else f"{t:<{s}}" for t, s, n in zip(line, sizes, numeric, strict=True))
            for line in zip(*filled, strict=True)
        ]

    body = [line for texts in cells for line in lines(texts)]
    rule = "  ".join("-" * size for size in sizes)
    return "\n".join(line.rstrip() for line in [*lines(list(heads)), rule, *body])


def final_line(result: Mapping[str, Any]) -> str:
    """The last line of a run on standard output: strict JSON on one line, not finite as null."""
    return to_json(result)


def _cell(value: Any) -> str:
    """A metric in the console table, with as many decimals in each row as its size allows."""
    if value is None or isinstance(value, int | np.integer):
        return show(value)
    size = abs(float(value))
    if not math.isfinite(size) or size == 0:
        return f"{float(value):g}"
    form = ".2e" if size < 1e-3 or size >= 1e7 else ".4f" if size < 10 else ".2f" if size < 1e3 else ".1f"
    return format(float(value), form)


def _columns(names: Sequence[str]) -> dict[str, str]:
    """Short labels for metrics, the part after the slash, unless two would be called the same."""
    short = [re.sub(r"^.*/", "", name) for name in names]
    return {name: s if short.count(s) == 1 else name for name, s in zip(names, short, strict=True)}


def _fit(natural: Sequence[int], room: int) -> list[int]:
    """Share the room: narrow columns get what they need, the wide ones the same part of the rest."""
    sizes = [0] * len(natural)
    for done, column in enumerate(sorted(range(len(natural)), key=lambda c: natural[c])):
        sizes[column] = min(natural[column], max(1, (room - sum(sizes)) // (len(natural) - done)))
    return sizes


def _wrap(text: str, width: int) -> list[str]:
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
    return lines or [""]
