"""Run pytest in parallel workers, then run what failed once more, alone.

    python -m tools.run_tests                    # what `make test` runs after lint and types
    python -m tools.run_tests -m slow            # what `make slow` runs
    python -m tools.run_tests -k sampler -x      # any arguments of pytest
    python -m tools.run_tests --slow_for=900     # the slow tests, file after file, until 900 seconds have passed

A test that passes only alone is printed as FLAKY and does not fail the command: it is to be fixed all the same.
Everything else that fails does. With a single worker, `-n 0`, nothing is run again.

With --slow_for, each commit begins at another file, so that all of them are run in the long run; the last lines name
those that were left out. A file that was begun is run to its end.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# tests/shared_fixtures.py orders the files, so pytest-xdist shall not.
WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
ALONE = ("-n", "0", "--last-failed", "--last-failed-no-failures", "none")
TESTS_FAILED, NO_TESTS = (
    1,
    5,
)  # exit statuses of pytest; any other but 0 is of a run that did not get that far
USAGE = 2
LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")


def last_failed() -> set[str]:
    """Return the tests that pytest remembers as failed."""
    return set(json.loads(LAST_FAILED.read_text())) if LAST_FAILED.is_file() else set()


def slow_files() -> list[str]:
    """Return the files with slow tests, beginning at one that the commit decides."""
    files = sorted(str(path) for path in Path("tests").glob("test_*.py") if "mark.slow" in path.read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    first = int(commit or "0", 16) % len(files)
    return files[first:] + files[:first]


def run_slow_for(seconds: int) -> int:
    """Run the slow tests of one file after the other until the time is over; return 1 if any failed, else 0."""
    end, left, failed = time.monotonic() + seconds, slow_files(), []
    while left and time.monotonic() < end:
        file = left.pop(0)
        print(f"slow tests of {file}", flush=True)
        # a file may mention the mark and have no such test
        if main(["-m", "slow", "--dist", "worksteal", file]) not in (0, NO_TESTS):
            failed.append(file)
    if left:
        print(f"slow: LEFT OUT after {seconds} s: {' '.join(left)}", flush=True)
    if failed:
        print(f"slow: FAILED in {' '.join(failed)}", flush=True)
    return int(bool(failed))


def main(argv: Sequence[str]) -> int:
    """Return the exit status of pytest, or of the second run where tests failed in the first."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if argv and argv[0].startswith("--slow_for"):
        seconds = re.fullmatch(r"--slow_for=(\d+)", " ".join(argv))
        if seconds is None:
            print("run_tests: write --slow_for=SECONDS, a whole number, and nothing else", file=sys.stderr)
            return USAGE
        return run_slow_for(int(seconds[1]))
    pytest = (sys.executable, "-m", "pytest")
    LAST_FAILED.unlink(missing_ok=True)  # failures of an earlier command
    status = subprocess.run([*pytest, *WORKERS, *argv]).returncode
    if status != TESTS_FAILED or "-n" in argv:
        return status
    failed = last_failed()
    print(f"\nrunning {len(failed)} failed test(s) once more, alone", flush=True)
    status = subprocess.run([*pytest, *argv, *ALONE]).returncode
    for test in sorted(failed - last_failed()):
        print(f"FLAKY {test}: failed beside other tests and passed alone", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
