"""The parts of a report: line charts as SVG, tables that can be filtered and sorted, and the page around them.

One file without a network: no script but the few lines here, which the page's policy names by their hash, so that
nothing that got into a text could run or fetch anything. All texts are escaped here. It knows nothing of runs.

Left out on purpose: zooming, other kinds of charts, and a chart library, which would be larger than all of this.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from xpo_jax.io.text import visible

COLOURS = ("#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#0891b2", "#65a30d", "#6b7280")
MAX_POINTS = 300  # of a line; more are averaged in groups
WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 22, 10, 40  # margins, for the labels of the axes


class Line(NamedTuple):
    """A line of a chart.

    points: (x, y), in the order in which they are joined; a y of None or nan is a gap.
    band: (low, high) of each point, or nothing.
    labels: what is shown where the pointer rests on a point; x and y by default.
    marked: whether the labels stand beside the points, too.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float | None, float | None]] = ()
    labels: Sequence[str] = ()
    marked: bool = False


class Cell(NamedTuple):
    """A cell of a table that is not just its text: already HTML, with the value to sort by and a class."""

    html: str
    value: str | float
    kind: str = ""


def escape(text: Any) -> str:
    """Any text as HTML text: markup is shown as it stands, control characters as symbols."""
    return html.escape(visible(str(text)))


def number(value: float | None, percent: bool = False) -> str:
    """A number as axes and tiles show it, "-" for none."""
    if value is None or not math.isfinite(value):
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
) -> str:
    """A figure, or nothing where no line has a point.

    Args:
      x: the label of the horizontal axis.
      percent: whether values are shares.
      level: draws a dashed line at this value.
      zero: whether the vertical axis begins at 0.
    """
    lines = [_thinned(line) for line in lines if any(_is(y) for _, y in line.points)]
    if not lines:
        return ""
    values = [y for line in lines for _, y in line.points if _is(y)]
    values += [y for line in lines for pair in line.band for y in pair if _is(y)]
    values += [0.0] * zero + ([level] if level is not None else [])
    x_ticks = _ticks(*_ends([p for line in lines for p, _ in line.points]), integer=True)
    y_ticks = _ticks(*_ends(values))
    (x0, x1), (y0, y1) = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])
    across = lambda v: _LEFT + (v - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT)  # noqa: E731
    down = lambda v: HEIGHT - _BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM)  # noqa: E731

    out = []
    for tick in y_ticks:
        at = f"{down(tick):.1f}"
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        out.append(f'<text class="y" x="{_LEFT - 6}" y="{at}">{number(tick, percent)}</text>')
    for tick in x_ticks:
        out.append(f'<text class="x" x="{across(tick):.1f}" y="{HEIGHT - _BOTTOM + 16}">{tick:,.10g}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    out.append(f'<text class="x" x="{middle}" y="{HEIGHT - 6}">{escape(x)}</text>')
    if level is not None:
        at = f"{down(level):.1f}"
        out.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        held = [(p, *b) for (p, _), b in zip(line.points, line.band, strict=False) if _is(b[0]) and _is(b[1])]
        if held:
            edge = [(p, low) for p, low, _ in held] + [(p, high) for p, _, high in held[::-1]]
            corners = " ".join(f"{across(p):.1f},{down(v):.1f}" for p, v in edge)
            out.append(f'<polygon fill="{colour}" opacity="0.15" points="{corners}"/>')
        path, gap = "", True
        for p, v in line.points:
            if _is(v):
                path += f"{'M' if gap else 'L'}{across(p):.1f} {down(v):.1f}"
            gap = not _is(v)
        out.append(f'<path stroke="{colour}" d="{path}"/>')
        radius = 3 if len(line.points) <= 40 else 1.2
        for k, (p, v) in enumerate(line.points):
            if not _is(v):
                continue
            said = line.labels[k] if line.labels else f"{x} {p:,.10g}: {number(v, percent)}"
            where = f'cx="{across(p):.1f}" cy="{down(v):.1f}"'
            told = f"<title>{escape(line.name)}, {escape(said)}</title>"
            out.append(f'<circle {where} r="{radius}" fill="{colour}">{told}</circle>')
            if line.marked:
                side = "end" if across(p) > 0.85 * WIDTH else "start"  # not over the edge
                at = f'x="{across(p):.1f}" y="{max(down(v) - 7, 11):.1f}" text-anchor="{side}"'
                out.append(f"<text {at}>{escape(said)}</text>")
    legend = "".join(
        f'<span class="key"><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(line.name)}</span>'
        for i, line in enumerate(lines)
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(out)}</svg></figure>'
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], *, choices: str = "") -> str:
    """A table whose heads sort it, under a field that filters it.

    Args:
      rows: texts, numbers, None or `Cell`s. Rows may be chosen by the kind of one of their cells.
      choices: the head of the column whose cells' kinds a menu offers; "" for no menu.
    """
    column = heads.index(choices) if choices else -1
    kinds = dict.fromkeys(row[column].kind for row in rows) if choices else {}
    menu = "".join(f"<option>{escape(kind)}</option>" for kind in kinds)
    menu = f'<select><option value="">all</option>{menu}</select>' if choices else ""
    numeric = [
        ' class="number"' if all(isinstance(row[i], int | float) for row in rows) else ""
        for i in range(len(heads))
    ]
    body = []
    for row in rows:
        kind = f' data-kind="{escape(row[column].kind)}"' if choices else ""
        body.append(f"<tr{kind}>{''.join(map(_cell, row))}</tr>")
    return (
        f'<div class="browse"><p><input type="search" placeholder="filter by text"> {menu}'
        f' <output>{len(rows)} of {len(rows)}</output></p><div class="scroll"><table><thead><tr>'
        + "".join(
            f'<th{kind}><button type="button">{escape(head)}</button></th>'
            for head, kind in zip(heads, numeric, strict=True)
        )
        + f"</tr></thead><tbody>{''.join(body)}</tbody></table></div></div>"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values, one line each."""
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in values.items())
    return f'<table class="pairs">{rows}</table>'


def page(title: str, parts: Sequence[str]) -> str:
    """The whole file; `parts` are HTML."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _cell(entry: Any) -> str:
    if isinstance(entry, Cell):
        return f'<td class="{escape(entry.kind)}" data-value="{escape(entry.value)}">{entry.html}</td>'
    if isinstance(entry, int | float):
        return f'<td class="number" data-value="{entry}">{number(float(entry))}</td>'
    return f"<td>{'' if entry is None else escape(entry)}</td>"


def _is(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _thinned(line: Line) -> Line:
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
    known = [v for v in values if v is not None and math.isfinite(v)]
    low, high = min(known), max(known)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    """Four to seven round numbers, the first not above low, the last not below high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    whole = integer and low == int(low) and high == int(high)
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.8)
    if whole:
        step = 5.0 if step == 2.5 else max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1.2rem; color: #1f2937; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .6rem; }
.quiet { color: #6b7280; margin: .2rem 0; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.tile { border: 1px solid #e5e7eb; border-radius: .5rem; padding: .5rem .8rem; min-width: 9.5rem; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; } .tile small { color: #6b7280; }
ul.findings { list-style: none; padding: 0; margin: 0; } ul.findings li { padding: .15rem 0; }
ul.findings li::before { display: inline-block; width: 4.4rem; font-weight: 600; }
li.good::before { content: "good"; color: #047857; } li.look::before { content: "look"; color: #b45309; }
li.bad::before { content: "bad"; color: #b91c1c; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #e5e7eb; border-radius: .5rem; padding: .6rem; }
figcaption { min-height: 2.6em; } .key { margin-left: .6em; white-space: nowrap; font-size: .87em; color: #4b5563; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: #4b5563; }
svg text.x { text-anchor: middle; } svg text.y { text-anchor: end; dominant-baseline: middle; }
svg path { fill: none; stroke-width: 1.8; } .grid { stroke: #eef0f3; }
.level { stroke: #9ca3af; stroke-dasharray: 4 3; }
.scroll { margin-bottom: 1.2rem; overflow: auto; max-height: 42rem; border: 1px solid #e5e7eb; border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .35rem .55rem; border-bottom: 1px solid #eef0f3; }
td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 4.5rem; }
td.text { min-width: 15rem; } td.reason { min-width: 11rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
thead th { position: sticky; top: 0; background: #f9fafb; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid #2563eb; }
td.won { background: #ecfdf5; } td.lost { background: #fef2f2; } td.failed { background: #fffbeb; }
table.pairs { width: auto; } table.pairs th { font-weight: 500; color: #6b7280; } details { margin: .4rem 0; }
td details { margin: 0; } td details[open] { min-width: 13rem; }
input, select { font: inherit; padding: .25rem .5rem; border: 1px solid #d1d5db; border-radius: .35rem; }
"""

SCRIPT = """
for (const box of document.querySelectorAll('.browse')) {
  const body = box.querySelector('tbody'), rows = [...body.rows];
  const field = box.querySelector('input'), menu = box.querySelector('select'), told = box.querySelector('output');
  const show = () => {
    let shown = 0;
    for (const row of rows) {
      const fits = row.textContent.toLowerCase().includes(field.value.toLowerCase());
      row.hidden = !(fits && (!menu || !menu.value || row.dataset.kind === menu.value));
      shown += !row.hidden;
    }
    told.textContent = shown + ' of ' + rows.length;
  };
  field.addEventListener('input', show);
  if (menu) menu.addEventListener('change', show);
  box.querySelectorAll('th button').forEach((button, i) => {
    let order = -1;
    const key = row => row.cells[i].dataset.value ?? row.cells[i].textContent;
    button.addEventListener('click', () => {
      order = -order;
      rows.sort((a, b) => order * (key(a) - key(b) || (isNaN(key(a) - key(b)) && key(a).localeCompare(key(b)))));
      body.append(...rows);
    });
  });
}
"""
