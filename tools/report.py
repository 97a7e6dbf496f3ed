"""The report of a run, or several runs side by side.

    python -m tools.report RUN [RUN ...] [--out=FILE.html]

RUN is a run directory, finished or under way. Of one, its report.html is written (again), or FILE.html. Of several, a
table is printed: the last evaluation of each, and in which fields of their configs they differ; with --out the same
as a page, with the win rates over judge queries and over KL in one picture each. The last line is one JSON object.

Intervals are over the held-out prompts of one run each. Two runs whose intervals overlap may still differ, and two
seeds of one config differ by more than an interval says: repeat a run with other seeds before you trust a small gap.

Examples:
  python -m tools.report runs/paraphrase
  python -m tools.report runs/alpha_0 runs/alpha_1e-4 runs/alpha_1e-3 --out=comparison.html

Exit status: 0 done, 2 something to mend (one line says what), 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.cli import Parser, exit_status
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.reporting import report
from xpo_jax.reporting.console import text_table
from xpo_jax.reporting.html import render, table
from xpo_jax.reporting.run_reader import Run, interval, read

HEADS = (
    "run",
    "step",
    "queries",
    "win rate, %",
    "at equal lengths, %",
    "KL",
    "valid",
    "copies",
    "tokens",
    "seconds",
)


def row(run: Run) -> list[Any]:
    """A line of the comparison: the last evaluation of a run."""
    last, result = run.evaluations[-1], run.result or {}
    rates = [interval(last, name).replace(" %", "") for name in ("win_rate", "win_rate_controlled")]
    others = [last.get(f"eval/policy/{name}") for name in ("valid", "copy", "tokens")]
    return [
        str(run.path),
        last["step"],
        last["queries"],
        *rates,
        last["eval/kl"],
        *others,
        result.get("seconds"),
    ]


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Per config field in which the runs differ: its name, and each run's value as JSON; run_dir left out."""
    flat = [dict(_leaves(run.config)) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each if name != "run_dir")
    rows = [[name, *(each.get(name, "absent") for each in flat)] for name in names]
    return [entries for entries in rows if len(set(entries[1:])) > 1]


def comparison(runs: Sequence[Run]) -> str:
    """The page for several runs."""
    heads = ("field", *(str(run.path) for run in runs))
    return render(
        "comparison.html.j2",
        title="Runs compared: xpo_jax",
        runs=len(runs),
        evaluations=table(HEADS, [row(run) for run in runs]),
        charts=report.held_out_charts(runs),
        differences=table(heads, differences(runs)),
    )


def _last(run: Run) -> dict[str, Any]:
    last = run.evaluations[-1]
    found = {name: value for name, value in last.items() if name.startswith("eval/")}
    return {"run": str(run.path), "step": last["step"], "queries": last["queries"], **found}


def _leaves(values: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _leaves(value, f"{path}{name}.")
        else:
            found.append((path + name, json.dumps(value, ensure_ascii=False)))
    return found


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Write and print; returns the last line."""
    parser = Parser(prog="python -m tools.report", description=None)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out")
    options = parser.parse_args(argv)
    runs = [read(path) for path in options.runs]
    if len(runs) == 1:
        out = Path(options.out or runs[0].path / "report.html")
        atomic_write(out, report.html(runs[0]))
        return {"report": str(out)}
    rows = [row(each) for each in runs]
    print(text_table(HEADS, rows))
    found = differences(runs)
    if found:
        print()
        print(text_table(["differs", *options.runs], found))
    if options.out:
        atomic_write(options.out, comparison(runs))
    print()
    return {"runs": [_last(each) for each in runs], "report": options.out}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0

    def shown() -> int:
        print(to_json(run(argv)))
        return 0

    return exit_status("report", shown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
