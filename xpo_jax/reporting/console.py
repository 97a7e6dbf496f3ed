"""What a terminal shows: tables, progress with the time left, and a run's table of steps.

Standard output gets what is read afterwards (tables, results), standard error gets the progress: a bar where it is
a terminal, plain lines where it is not, so that logs stay readable. While a bar is shown on a terminal, what is
printed appears above it.

Left out on purpose: tables that are redrawn while a run goes.
"""

from __future__ import annotations

import io
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from xpo_jax.io.text import visible

T = TypeVar("T")


# ---- tables ---------------------------------------------------------------------------------------


def format_value(value: Any) -> str:
    """Return a value as tables show it: four significant digits, counts in full, "-" for None."""
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
    """Return the terminal's columns; 100 where there is no terminal, and at least 40."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def field_table(fields: Mapping[str, Any], width: int | None = None) -> str:
    """Return names and values in two columns; long values are wrapped within their column.

    Args:
      fields: values by name.
      width: columns of the console; the terminal's by default.
    """
    if not fields:
        return ""
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(Text(name), Text(format_value(value)))
    return _rendered(table, width)


def text_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], width: int | None = None) -> str:
    """Return a table with a rule under its head; numbers are aligned to the right, long texts wrapped.

    Args:
      heads: one per column.
      rows: one entry per column each; texts may be of any length, with line breaks.
      width: columns of the console; the terminal's by default.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column, head in enumerate(heads):
        numeric = bool(rows) and not any(isinstance(row[column], str) for row in rows)
        table.add_column(Text(head), justify="right" if numeric else "left", overflow="fold")
    table.add_row(*(Rule(characters="-") for _ in heads))
    for row in rows:
        table.add_row(*(Text(format_value(entry)) for entry in row))
    return _rendered(table, width)


def _rendered(table: Table, width: int | None) -> str:
    console = Console(
        file=io.StringIO(), width=width or console_width(), color_system=None, force_terminal=False
    )
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


class StepTable:
    """The console's table of steps, printed a row at a time; the heads come again every 20 rows.

    Args:
      metrics: names of its columns, most important first. Those that do not fit into the width are left out.
      every_steps: print every n-th step, the last, and those with an evaluation, after which a run may end early.
      total_steps: the last step.
    """

    def __init__(self, metrics: Sequence[str], every_steps: int, total_steps: int):
        short = [re.sub(r"^.*/", "", name) for name in metrics]  # unless two would have the same head
        self._heads = {
            name: s if short.count(s) == 1 else name for name, s in zip(metrics, short, strict=True)
        }
        self._every, self._total, self._rows = every_steps, total_steps, 0

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Print a step's row if it is due and has one of the columns' metrics."""
        due = step % self._every == 0 or step == self._total or any(n.startswith("eval/") for n in values)
        if not due or self._heads.keys().isdisjoint(values):
            return
        width, cells, heads = console_width(), [f"{step:>6}"], ["  step"]
        for name, head in self._heads.items():
            size = max(len(head), 9)
            if sum(map(len, heads)) + 2 * len(heads) + size > width:
                break
            heads.append(f"{head:>{size}}")
            cells.append(f"{_format_metric(values.get(name)):>{size}}")
        if self._rows % 20 == 0:
            print("  ".join(heads))
        self._rows += 1
        print("  ".join(cells), flush=True)


def _format_metric(value: Any) -> str:
    """Return a metric with as many decimals as its magnitude allows in a narrow column."""
    if value is None or isinstance(value, int | np.integer):
        return format_value(value)
    size = abs(float(value))
    if not math.isfinite(size) or size == 0:
        return f"{float(value):g}"
    form = ".2e" if size < 1e-3 or size >= 1e7 else ".4f" if size < 10 else ".2f" if size < 1e3 else ".1f"
    return format(float(value), form)


# ---- progress -------------------------------------------------------------------------------------


class _StderrConsole(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing: a run that is killed must not leave the terminal without a cursor."""
        return False


# One for all bars, so that one may stand below another; used only where `_on_terminal`.
_STDERR = _StderrConsole(stderr=True, force_terminal=True, force_interactive=True)


def _on_terminal() -> bool:
    return sys.stderr.isatty() and not _STDERR.is_dumb_terminal


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
        console=_STDERR,
        transient=True,
        refresh_per_second=4,
        speed_estimate_period=math.inf,  # over all steps: one may take minutes
        redirect_stdout=sys.stdout.isatty(),  # else what is printed would go to standard error
    )


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar on standard error; where it is no terminal, print one line at the start.

    Args:
      items: what to iterate over.
      label: what is being done.
      total: how many items there are; their length by default.
    """
    if not _on_terminal():
        print(f"{label} ...", file=sys.stderr, flush=True)
        yield from items
        return
    with _bar() as bar:
        yield from bar.track(items, description=label, total=total)


class StepProgress:
    """How far a run is: a bar on a terminal, elsewhere a plain line now and then.

    Args:
      total_steps: the run's last step.
      every_seconds: between two plain lines.
      clock: seconds; for tests.
    """

    def __init__(
        self, total_steps: int, every_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic
    ):
        self._total, self._every, self._clock = total_steps, every_seconds, clock
        self._bar: Progress | None = None
        self._start: tuple[int, float] | None = None  # step and time
        self._printed = -math.inf

    def update(self, step: int) -> None:
        """Show that `step` steps are done."""
        now = self._clock()
        if self._start is None:
            # Time is measured from the end of the first step, because compilation comes before it.
            self._start = (step, now)
            if _on_terminal():
                self._bar = _bar()
                self._bar.add_task("step", total=self._total, completed=step - 1)
                self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, refresh=True)
        elif now - self._printed >= self._every or step == self._total:
            self._printed = now
            first, start = self._start
            left = "?"
            if step > first:
                left = _duration((now - start) / (step - first) * max(self._total - step, 0))
            percent = f"{100 * step / max(self._total, 1):.0f} %"
            print(f"step {step}/{self._total} ({percent}), time left {left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
