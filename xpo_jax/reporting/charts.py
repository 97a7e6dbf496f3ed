"""Line charts: where their lines, ticks and labels lie. The templates draw them as SVG.

Left out on purpose: zooming, other kinds of charts, and a chart library, which would be larger than all of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

COLOURS = ("#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#0891b2", "#65a30d", "#6b7280")
MAX_POINTS = 300  # of a line; more are averaged in groups


class Line(NamedTuple):
    """A line of a chart.

    points: (x, y), in the order in which they are joined; a y of None or nan is a gap.
    band: (low, high) of each point, or nothing.
    labels: what is shown where the pointer rests on a point; x and y by default.
    labelled: whether the labels stand beside the points, too.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float | None, float | None]] = ()
    labels: Sequence[str] = ()
    labelled: bool = False


class Box(NamedTuple):
    """A chart's size, and the edges within it of what is drawn; the margins hold the axes' labels."""

    width: int = 460
    height: int = 250
    left: int = 62
    right: int = 438
    top: int = 10
    bottom: int = 210


class Tick(NamedTuple):
    """A tick of an axis: its coordinate and its text."""

    at: str
    text: str


class Point(NamedTuple):
    """A point of a curve: its coordinates, and its label with the place beside it."""

    x: str
    y: str
    label: str
    label_y: str
    anchor: str


class Curve(NamedTuple):
    """A line in coordinates. path: SVG path data; band: an SVG polygon's points, or "" for none."""

    name: str
    colour: str
    path: str
    band: str
    points: Sequence[Point]
    radius: float
    labelled: bool


class Chart(NamedTuple):
    """A chart in coordinates. level: y of the dashed line, or "" for none."""

    title: str
    x_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    level: str
    curves: Sequence[Curve]
    box: Box = Box()


def format_number(value: float | None, percent: bool = False) -> str:
    """Return a number as charts and tiles show it, "-" for None."""
    if not _is_finite(value):
        return "-"
    return f"{100 * value:.4g} %" if percent else f"{value:.4g}"


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    percent: bool = False,
    level: float | None = None,
    zero: bool = False,
) -> Chart | None:
    """Lay out a chart; None where no line has a point.

    Args:
      title: of the chart.
      lines: those without a point are left out.
      x: the label of the horizontal axis.
      percent: whether values are fractions, shown in percent.
      level: draws a dashed line at this value.
      zero: whether the vertical axis begins at 0.
    """
    lines = [_thinned(line) for line in lines if any(_is_finite(y) for _, y in line.points)]
    if not lines:
        return None
    values = [y for line in lines for _, y in line.points if _is_finite(y)]
    values += [y for line in lines for pair in line.band for y in pair if _is_finite(y)]
    values += [0.0] * zero + ([level] if level is not None else [])
    x_ticks = _ticks(*_ends([p for line in lines for p, _ in line.points]), integer=True)
    y_ticks = _ticks(*_ends(values))
    scale = _Scale((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), Box())
    return Chart(
        title,
        x,
        [Tick(f"{scale.x(tick):.1f}", f"{tick:,.10g}") for tick in x_ticks],
        [Tick(f"{scale.y(tick):.1f}", format_number(tick, percent)) for tick in y_ticks],
        "" if level is None else f"{scale.y(level):.1f}",
        [
            _curve(line, COLOURS[i % len(COLOURS)], scale, x_label=x, percent=percent)
            for i, line in enumerate(lines)
        ],
    )


class _Scale(NamedTuple):
    """From values, of which the axes show these ranges, to coordinates in the box."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    box: Box

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.box.left + (value - low) / (high - low) * (self.box.right - self.box.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.box.bottom - (value - low) / (high - low) * (self.box.bottom - self.box.top)


def _curve(line: Line, colour: str, scale: _Scale, *, x_label: str, percent: bool) -> Curve:
    edges: list[tuple[float, float, float]] = []
    for (p, _), (low, high) in zip(line.points, line.band, strict=False):
        if _is_finite(low) and _is_finite(high):
            edges.append((p, low, high))
    outline = [(p, low) for p, low, _ in edges] + [(p, high) for p, _, high in edges[::-1]]
    path, gap, points = "", True, []
    for number, (p, v) in enumerate(line.points):
        if _is_finite(v):
            x, y = scale.x(p), scale.y(v)
            path += f"{'M' if gap else 'L'}{x:.1f} {y:.1f}"
            label = (
                line.labels[number] if line.labels else f"{x_label} {p:,.10g}: {format_number(v, percent)}"
            )
            anchor = "end" if x > 0.85 * scale.box.width else "start"  # not beyond the edge
            points.append(Point(f"{x:.1f}", f"{y:.1f}", label, f"{max(y - 7, 11):.1f}", anchor))
        gap = not _is_finite(v)
    return Curve(
        line.name,
        colour,
        path,
        " ".join(f"{scale.x(p):.1f},{scale.y(v):.1f}" for p, v in outline),
        points,
        3 if len(line.points) <= 40 else 1.2,
        line.labelled,
    )


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _thinned(line: Line) -> Line:
    """Return the line with at most `MAX_POINTS` points, each the mean of as many."""
    size = math.ceil(len(line.points) / MAX_POINTS)
    if size == 1:
        return line
    points: list[tuple[float, float | None]] = []
    for start in range(0, len(line.points), size):
        group = [(p, v) for p, v in line.points[start : start + size] if v is not None and math.isfinite(v)]
        if group:
            points.append((group[-1][0], sum(v for _, v in group) / len(group)))
    return Line(f"{line.name} (means of {size})", points)


def _ends(values: Sequence[float | None]) -> tuple[float, float]:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    low, high = min(finite), max(finite)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    """Return four to seven round numbers, the first not above low, the last not below high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    whole = integer and low == int(low) and high == int(high)
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.8)
    if whole:
        step = 5.0 if step == 2.5 else max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]
