"""The report of a run, or several runs side by side.

    python -m tools.report RUN [RUN ...] [--out=FILE.html]

RUN is a run directory, of a finished run or one under way. For one run, its report.html is written (again), or
FILE.html. For several, a table is printed: the last evaluation of each, and the fields in which their configs differ;
with --out the same becomes a page, with charts of the win rates over judge queries and over KL. The last line is one
JSON object.

Intervals are over the held-out prompts of one run. Two runs whose intervals overlap may still differ, and two seeds of
one config differ by more than an interval shows: repeat a run with other seeds before you trust a small difference.

Examples:
  python -m tools.report runs/paraphrase
  python -m tools.report runs/alpha_0 runs/alpha_1e-4 runs/alpha_1e-3 --out=comparison.html

Exit status: 0 success, 2 invalid input (one line explains), 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from xpo_jax.io.files import atomic_write
from xpo_jax.io.streams import print_json
from xpo_jax.reporting import report
from xpo_jax.reporting.console import text_table
from xpo_jax.reporting.html import render, table
from xpo_jax.reporting.run_reader import Run, interval, read

from .cli import Parser, as_called, exit_status, path_argument

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


def evaluation_row(run: Run) -> list[Any]:
    """Return a run's row of the comparison: its last evaluation."""
    last, result = run.evaluations[-1], run.result or {}
    rates = [interval(last, name).replace(" %", "") for name in ("win_rate", "win_rate_controlled")]
    answers = [last.get(f"eval/policy/{name}") for name in ("valid", "copy", "tokens")]
    seconds = result.get("seconds")
    return [str(run.path), last["step"], last["queries"], *rates, last["eval/kl"], *answers, seconds]


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Return each config field in which the runs differ, run_dir left out: its name, and the runs' values as JSON."""
    configs = [dict(_leaves(run.config)) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config if name != "run_dir")
    rows = [[name, *(config.get(name, "absent") for config in configs)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def comparison(runs: Sequence[Run]) -> str:
    """Return the page for several runs."""
    heads = ("field", *(str(run.path) for run in runs))
    return render(
        "comparison.html.j2",
        title="Runs compared: xpo_jax",
        runs=len(runs),
        evaluations=table(HEADS, list(map(evaluation_row, runs))),
        charts=report.held_out_charts(runs),
        differences=table(heads, differences(runs)),
    )


def _summary(run: Run) -> dict[str, Any]:
    last = run.evaluations[-1]
    metrics = {name: value for name, value in last.items() if name.startswith("eval/")}
    return {"run": str(run.path), "step": last["step"], "queries": last["queries"], **metrics}


def _leaves(values: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    leaves = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves += _leaves(value, f"{path}{name}.")
        else:
            leaves.append((path + name, json.dumps(value, ensure_ascii=False)))
    return leaves


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Write the report, or print the comparison; return the last line."""
    parser = Parser(prog="python -m tools.report", description=None)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=path_argument)
    options = parser.parse_args(argv)
    runs = [read(path) for path in options.runs]
    if len(runs) == 1:
        out = options.out or runs[0].path / "report.html"
        atomic_write(out, report.html(runs[0]))
        return {"report": str(out)}
    print(text_table(HEADS, list(map(evaluation_row, runs))))
    differing = differences(runs)
    if differing:
        print()
        print(text_table(["differs", *options.runs], differing))
    if options.out:
        atomic_write(options.out, comparison(runs))
    print()
    return {"runs": list(map(_summary, runs)), "report": options.out and str(options.out)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(as_called(__doc__))
        return 0

    def print_result() -> int:
        print_json(run(argv))
        return 0

    return exit_status("report", print_result)


if __name__ == "__main__":
    sys.exit(main())
