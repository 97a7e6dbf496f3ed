"""Compare settings on your own task: arms of one config over several seeds, as ordinary runs.

    python -m tools.sweep FILE.json [--jobs=2] [--runs=FOLDER] [--list] [--markdown] [--json=OUT.json]

FILE names the arms, the seeds and, if you like, a field that is tuned for each arm alike, the learning rate above all;
docs/choosing.md shows how to write it. At the end a table has a line per arm: means over its seeds with 95 % intervals
by the t-distribution, and the paired difference to the first arm. Seeds that a value was chosen on are not in it.

Stop it when you like: runs in hand save their step. The same command again leaves finished runs as they are, goes on
with interrupted ones and tries failed ones again; with nothing left to run it prints the table.

Examples:
  python -m tools.sweep tools/sweeps/embedded.json --list
  python -m tools.sweep tools/sweeps/embedded.json --jobs=2 --json=build/embedded.json
  python -m tools.sweep mine.json --runs=runs/mine --markdown > mine.md

  --jobs=N     runs at a time (1), each on its share of this machine's cores; on an accelerator leave it at 1
  --runs=DIR   where the runs are (runs/ and the name of FILE)
  --list       the runs that are known so far and how they stand; starts none
  --markdown   the tables for a document; progress goes to standard error
  --json=OUT   all figures, of each run too

Exit status: 0 done, 1 some runs failed (one line each, which names its log), 2 invalid input, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tools.cli import Parser, exit_status
from tools.sweeps.schedule import Ended, Planned, Result, check, plan, result_of, total
from tools.sweeps.spec import Sweep, read
from tools.sweeps.table import as_json, tables
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.reporting.console import text_table

_POLL_SECONDS = 0.2


class Process(Protocol):
    """A run under way; subprocess.Popen is one."""

    def poll(self) -> int | None:
        """The exit status, once there is one."""

    def terminate(self) -> None:
        """Tell it to save its step and end."""

    def wait(self) -> int:
        """Until it has ended."""


Start = Callable[[Planned, Sequence[int]], Process]


def say(line: str) -> None:
    """Progress is not the result: it goes to standard error."""
    print(line, file=sys.stderr, flush=True)


def start(run: Planned, cores: Sequence[int]) -> Process:
    """Start a run in a process of its own, on these cores, its output at the end of its log."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "xpo_jax.main", *run.arguments]
    # a session of its own: what is typed here reaches it through `terminate` alone, once
    with open(run.log, "ab") as log, _pinned(cores):
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


@contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """A child inherits the cores that its parent may use when it starts it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def shares(jobs: int) -> list[list[int]]:
    """This process's cores, divided among so many jobs as evenly as they can be.

    Raises:
      ValueError: more jobs than cores, or a system that cannot pin them.
    """
    if not hasattr(os, "sched_getaffinity"):
        if jobs == 1:
            return [list(range(os.cpu_count() or 1))]
        raise ValueError(f"--jobs={jobs}: this system cannot give each job its own cores; leave it at 1")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= jobs <= len(cores):
        raise ValueError(f"--jobs={jobs}: from 1 to {len(cores)}, the cores of this process, is expected")
    return [cores[len(cores) * job // jobs : len(cores) * (job + 1) // jobs] for job in range(jobs)]


def name_of(sweep: Sweep, run: Planned) -> str:
    """A run as people call it."""
    value = "" if run.value is None or sweep.tune is None else f", {sweep.tune.short} {run.value:g}"
    return f"{run.arm.name}{value}, seed {run.seed}"


def finished(sweep: Sweep) -> dict[Path, Result | None]:
    """By run_dir, the results of the runs that are finished already.

    Raises:
      ValueError: a directory holds a run of another config.
    """
    ended: dict[Path, Result | None] = {}
    while new := {
        run.run_dir: found
        for run in plan(sweep, ended)
        if run.run_dir not in ended and (found := result_of(run)) is not None
    }:  # what is finished may decide which runs there are
        ended |= new
    return ended


def execute(
    sweep: Sweep, cores: Sequence[Sequence[int]], start: Start = start
) -> tuple[dict[Path, Result | None], list[str]]:
    """Run whatever is not finished, as many at a time as there are shares of cores.

    Returns:
      By run_dir the results, None of a run that failed; and a line on each failure.

    Raises:
      ValueError: a directory holds a run of another config; nothing was started.
      KeyboardInterrupt: told to end; the runs in hand have saved their step.
    """
    ended, failures = finished(sweep), []
    count, before = total(sweep), len(ended)
    if before:
        say(f"{before} of {count} runs are finished already")
    running: dict[int, tuple[Planned, Process, float]] = {}  # by share of cores
    begun = time.monotonic()

    def end(run: Planned, text: str, result: Result | None) -> None:
        ended[run.run_dir] = result
        left = (time.monotonic() - begun) / (len(ended) - before) * (count - len(ended))
        after = f"; about {_duration(left)} left" if left else ""
        say(f"[{len(ended)}/{count}] {name_of(sweep, run)}: {text}{after}")
        if result is None:
            failures.append(f"{name_of(sweep, run)}: {text}")

    try:
        while True:
            for share, (run, process, since) in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[share]
                    end(run, *_outcome(run, status, time.monotonic() - since))
            seen = ended.keys() | {run.run_dir for run, _, _ in running.values()}
            todo = [run for run in plan(sweep, ended) if run.run_dir not in seen]
            lost = [run for run in todo if run.after in ended and ended[run.after] is None]
            for run in lost:
                end(run, f"not run: the run before it failed, {run.after}", None)
            if lost:
                continue
            ready = [run for run in todo if run.after is None or run.after in ended]
            free = [share for share in range(len(cores)) if share not in running]
            for share, run in zip(free, ready, strict=False):
                running[share] = (run, start(run, cores[share]), time.monotonic())
            if not running:
                return ended, failures
            time.sleep(_POLL_SECONDS)
    except BaseException:
        for _, process, _ in running.values():
            process.terminate()
        if running:
            say(f"sweep: {len(running)} run(s) in hand save their step ...")
        for _, process, _ in running.values():
            process.wait()
        say("sweep: the same command goes on from here")
        raise


def _outcome(run: Planned, status: int, seconds: float) -> tuple[str, Result | None]:
    """A run that has ended, as text, and its result."""
    try:
        result = result_of(run) if status == 0 else None
    except ValueError as error:
        return f"failed: {error}; see {run.log}", None
    if result is None:
        lines = run.log.read_text(errors="replace").split("\n") if run.log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"failed with status {status}, see {run.log}: {last[:200]}", None
    rate = "no" if result["win_rate"] is None else f"{100 * result['win_rate']:.1f} %"
    return f"win rate {rate}, {_duration(seconds)}", result


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def listing(sweep: Sweep, ended: Ended) -> str:
    """The runs that are known so far and how they stand."""
    known = plan(sweep, ended)
    rows = []
    for run in known:
        result = ended.get(run.run_dir)
        rate = None if result is None else result["win_rate"]
        stands = "to do" if not run.run_dir.exists() else "interrupted, failed or under way"
        stands = stands if result is None else "done" if rate is None else f"done, {100 * rate:.1f} %"
        rows.append([name_of(sweep, run), stands, str(run.run_dir)])
    more = total(sweep) - len(known)
    told = f"; {more} more follow once values are chosen" if more else ""
    table = text_table(
        ["run", "stands", "run_dir"], rows, width=10_000
    )  # a path that is wrapped cannot be copied
    return f"{table}\n\n{len(ended)} of {total(sweep)} runs done{told}"


def run(argv: Sequence[str]) -> int:
    """Run, and print what came of it; returns the exit status."""
    parser = Parser(prog="python -m tools.sweep", description=None)
    parser.add_argument("file")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    cores = shares(options.jobs)
    sweep = read(options.file, options.runs)
    check(sweep)
    if options.list:
        print(listing(sweep, finished(sweep)))
        return 0
    say(f"{len(sweep.arms)} arms, {total(sweep)} runs in {sweep.folder}")
    say(f"{len(cores)} at a time on {' + '.join(str(len(share)) for share in cores)} core(s)")
    ended, failures = execute(sweep, cores)
    width = None if sys.stdout.isatty() else 10_000  # a file is as wide as it is
    print(tables(sweep, ended, markdown=options.markdown, width=width))
    if options.json:
        found: dict[str, Any] = {"file": options.file, **as_json(sweep, ended), "failures": failures}
        atomic_write(options.json, to_json(found, indent=2) + "\n")
    for line in failures:
        say(f"sweep: {line}")
    return int(bool(failures))


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C; what nohup has turned off stays off
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    return exit_status("sweep", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
