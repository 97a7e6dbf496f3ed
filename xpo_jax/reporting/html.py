"""Pages in HTML: the templates beside it, filled in.

A page is one file that needs no network: its only script is templates/report.js, which the page's policy names by its
hash, so that nothing that got into a text could run or fetch anything. The templates escape all texts.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from xpo_jax.io.text import visible
from xpo_jax.reporting.charts import format_number


class Cell(NamedTuple):
    """A cell of a table.

    value: to sort by.
    kind: its class, which colours it and which rows may be chosen by.
    note: a second, quieter line.
    folded: whether its text is shown only when it is opened.
    """

    text: str
    value: str | float
    kind: str = ""
    note: str = ""
    folded: bool = False


class Table(NamedTuple):
    """A table whose heads sort it, under a field that filters it.

    numeric: the columns that hold numbers only.
    choice: the column whose cells' `kinds` a menu offers; there is no menu without kinds.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[int]
    choice: int
    kinds: Sequence[str]


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], *, choice: str = "") -> Table:
    """Make a table.

    Args:
      heads: one per column.
      rows: texts, numbers, None or `Cell`s.
      choice: the head of the column whose cells' kinds a menu offers; "" for no menu.
    """
    numeric = [i for i in range(len(heads)) if all(isinstance(row[i], int | float) for row in rows)]
    cells = [[_cell(entry) for entry in row] for row in rows]
    column = heads.index(choice) if choice else -1
    kinds = list(dict.fromkeys(row[column].kind for row in cells)) if choice else []
    return Table(heads, cells, numeric, column, kinds)


def render(template: str, **values: Any) -> str:
    """Return a page.

    Args:
      template: its file in templates/.
      values: what it shows; texts may hold anything.
    """
    environment = _environment()
    assert environment.loader is not None
    script, _, _ = environment.loader.get_source(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(**values, script=script, script_hash=digest)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("xpo_jax.reporting"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # not what is escaped already
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _cell(entry: Any) -> Cell:
    if isinstance(entry, Cell):
        return entry
    if isinstance(entry, int | float):
        return Cell(format_number(float(entry)), entry, "number")
    return Cell("" if entry is None else str(entry), "" if entry is None else str(entry))
