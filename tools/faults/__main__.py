"""Break a run in every way that it must survive, for real, and show what came of it.

    python -m tools.faults                     all of them, about ten minutes on two cores
    python -m tools.faults --list              their names
    python -m tools.faults --only=checkpoint   those whose name holds this

Each fault befalls the real command on a tiny model. Then the same command is given again, and what it comes to is
compared bit for bit with the run that nothing happened to: weights, metrics (timings left out), pairs, samples. The
last line is a summary, and the exit status 1 if anything was not as docs/reliability.md promises.
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
from tools.faults import cases, config_cases
from tools.faults.tiny_run import Runs
from xpo_jax.io.text import error_line
from xpo_jax.reporting.console import progress

assert config_cases  # enters its cases
WIDTHS = (44, 64)  # of fault and what happened


def chosen(only: str | None) -> list[str]:
    """Names of the cases whose name holds `only`.

    Raises:
      ValueError: if there is none.
    """
    found = [name for name in cases.CASES if only is None or only in name]
    if not found:
        raise ValueError(f"no fault is called {only!r}; --list shows them all")
    return found


def try_one(runs: Runs, name: str) -> tuple[bool, str]:
    """Whether a case came out as promised, and what happened."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    try:
        return True, cases.CASES[name](runs, slug)
    except (AssertionError, TimeoutError, OSError) as error:
        return False, error_line(error)
    finally:
        shutil.rmtree(runs.path(slug), ignore_errors=True)


def table_row(name: str, happened: str, verdict: str) -> str:
    """One fault, wrapped into as many lines as it takes."""
    cells = [textwrap.wrap(text, width) for text, width in zip((name, happened), WIDTHS, strict=True)]
    height = max(map(len, cells))
    cells = [cell + [""] * (height - len(cell)) for cell in cells] + [[verdict] + [""] * height]
    rows = ("  ".join(f"{cell[i]:{width}}" for cell, width in zip(cells, (*WIDTHS, 0), strict=True))
            for i in range(height))  # fmt: skip
    return "\n".join(row.rstrip() for row in rows)


def main(argv: Sequence[str]) -> int:
    """Run the matrix; returns the exit status."""
    parser = Parser(prog="python -m tools.faults", description=__doc__)
    parser.add_argument("--list", action="store_true", help="only show the names")
    parser.add_argument("--only", metavar="NAME", help="those whose name holds this")
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
    print(table_row("fault", "what happened", "verdict"))
    print("-" * (sum(WIDTHS) + 11), flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        runs = Runs(Path(folder))
        for name in progress(names, "faults"):
            passed, happened = try_one(runs, name)
            failed += not passed
            print(table_row(name, happened, "passed" if passed else "FAILED"), flush=True)
    took = f"{time.monotonic() - begun:.0f} s"
    print(f"\n{len(names) - failed} of {len(names)} faults came out as promised, in {took}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
