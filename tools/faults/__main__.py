"""Inject every fault that a run must survive into real runs, and show the outcome of each.

    python -m tools.faults                     all faults, about twenty minutes on two cores
    python -m tools.faults --list              their names
    python -m tools.faults --only=checkpoint   those whose name contains "checkpoint"

Each fault hits the real command with a tiny model. The same command is then run again, and its results are compared
bit for bit with those of an uninterrupted run: weights, metrics (without timings), pairs and samples. A case fails,
too, if its fault was not struck. The last line is a summary. Exit status: 0 every fault had the outcome that
docs/reliability.md promises, 1 some did not, 2 invalid input (one line explains).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from tools.cli import Parser
from tools.faults import cases, user_cases
from tools.faults.tiny_run import Runs
from xpo_jax.io.text import error_line
from xpo_jax.reporting.console import progress

assert user_cases  # importing it registers its cases, and those of the modules before it
WIDTHS = (44, 64)  # characters of the columns "fault" and "outcome"


def chosen(only: str | None) -> list[str]:
    """Return the names of the cases, or of those whose name contains `only`.

    Raises:
      ValueError: there is none.
    """
    names = [name for name in cases.CASES if only is None or only in name]
    if not names:
        raise ValueError(f"--only={only}: no name of a fault contains this; --list shows all names")
    return names


def try_one(runs: Runs, name: str) -> tuple[bool, str]:
    """Return whether a case had its promised outcome, and the outcome in words."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    try:
        return True, cases.CASES[name](runs, slug)
    except (AssertionError, TimeoutError, OSError) as error:
        return False, error_line(error)
    finally:
        shutil.rmtree(runs.path(slug), ignore_errors=True)


def table_row(name: str, outcome: str, verdict: str) -> str:
    """Return the row of one fault, wrapped into as many lines as needed."""
    cells = [textwrap.wrap(text, width) for text, width in zip((name, outcome), WIDTHS, strict=True)]
    height = max(map(len, cells))
    cells = [cell + [""] * (height - len(cell)) for cell in cells] + [[verdict] + [""] * height]
    rows = ("  ".join(f"{cell[i]:{width}}" for cell, width in zip(cells, (*WIDTHS, 0), strict=True))
            for i in range(height))  # fmt: skip
    return "\n".join(row.rstrip() for row in rows)


def main(argv: Sequence[str]) -> int:
    """Run the faults; return the exit status."""
    parser = Parser(prog="python -m tools.faults", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--only", metavar="NAME", help="run those whose name contains this")
    try:
        arguments = parser.parse_args(argv)
        names = chosen(arguments.only)
    except ValueError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(names))
        return 0
    begun, failed = time.monotonic(), 0
    print(table_row("fault", "outcome", "verdict"))
    print("-" * (sum(WIDTHS) + 11), flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        runs = Runs(Path(folder))
        for name in progress(names, "faults"):
            passed, outcome = try_one(runs, name)
            failed += not passed
            print(table_row(name, outcome, "passed" if passed else "FAILED"), flush=True)
    took = f"{time.monotonic() - begun:.0f} s"
    print(f"\n{len(names) - failed} of {len(names)} faults had the promised outcome, in {took}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
