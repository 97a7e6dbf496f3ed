"""Compare settings on your own task: arms of one config over several seeds, as ordinary runs.

    python -m tools.sweep FILE.json [--jobs=2] [--runs=FOLDER] [--list] [--markdown] [--json=OUT.json]

FILE lists the arms, the seeds and optionally a field that is tuned separately for each arm, usually the learning rate;
docs/choosing.md shows how to write it. At the end it prints a table with a row per arm: means over its seeds with 95 %
intervals by the t-distribution, and the paired difference to the first arm. Seeds used for tuning are not in it.

It can be stopped at any time: running runs save their step. The same command again keeps finished runs, resumes
interrupted ones and retries failed ones; when nothing is left to run, it prints the table.

Examples:
  python -m tools.sweep mine.json --list
  python -m tools.sweep mine.json --jobs=2 --json=results.json
  python -m tools.sweep mine.json --runs=runs/mine --markdown > mine.md

  --jobs=N     concurrent runs (1), each on its own part of this machine's cores; leave it at 1 on an accelerator
  --runs=DIR   folder of the runs (runs/ and the name of FILE)
  --list       print the runs known so far with their status; start none
  --markdown   print the tables as Markdown; progress goes to standard error
  --json=OUT   write all figures, including those of each run

Exit status: 0 done, 1 some runs failed (one line each, with the path of the log), 2 invalid input, 130 interrupted.
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

from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.reporting.console import text_table

from .cli import Parser, as_called, exit_status, path_argument
from .sweeps.schedule import Ended, Planned, Result, check, plan, read_result, total
from .sweeps.spec import Sweep, read
from .sweeps.table import as_json, tables

_POLL_SECONDS = 0.2


class Process(Protocol):
    """A running run; subprocess.Popen is one."""

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""

    def terminate(self) -> None:
        """Make it save its step and end."""

    def wait(self) -> int:
        """Wait until it has ended; return the exit status."""


Start = Callable[[Planned, Sequence[int]], Process]


def log(line: str) -> None:
    """Print a line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def start(run: Planned, cores: Sequence[int]) -> Process:
    """Start a run in its own process on these cores; append its output to its log."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "xpo_jax.main", *run.arguments]
    # its own session: Ctrl-C reaches it only once, through `terminate`
    with open(run.log, "ab") as file, _pinned(cores):
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


@contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """Restrict this process to these cores; a child that is started meanwhile inherits them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def divide_cores(jobs: int) -> list[list[int]]:
    """Divide this process's cores among `jobs` jobs as evenly as possible.

    Raises:
      ValueError: more jobs than cores, or a system without core pinning.
    """
    if not hasattr(os, "sched_getaffinity"):
        if jobs == 1:
            return [list(range(os.cpu_count() or 1))]
        raise ValueError(f"--jobs={jobs}: this system cannot pin jobs to cores; use --jobs=1")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= jobs <= len(cores):
        raise ValueError(f"--jobs={jobs}: must be from 1 to {len(cores)}, the cores of this process")
    return [cores[len(cores) * job // jobs : len(cores) * (job + 1) // jobs] for job in range(jobs)]


def run_name(sweep: Sweep, run: Planned) -> str:
    """Return the name of a run in messages."""
    value = "" if run.value is None or sweep.tune is None else f", {sweep.tune.short} {run.value:g}"
    return f"{run.arm.name}{value}, seed {run.seed}"


def finished(sweep: Sweep) -> dict[Path, Result | None]:
    """Return {run_dir: result} of the runs that are already finished.

    Raises:
      ValueError: a directory holds a run of another config.
    """
    ended: dict[Path, Result | None] = {}
    while new := {
        run.run_dir: result
        for run in plan(sweep, ended)
        if run.run_dir not in ended and (result := read_result(run)) is not None
    }:  # finished runs may decide which further runs there are
        ended |= new
    return ended


def execute(
    sweep: Sweep, cores: Sequence[Sequence[int]], start: Start = start
) -> tuple[dict[Path, Result | None], list[str]]:
    """Run all runs that are not finished, one at a time on each element of `cores`.

    Returns:
      {run_dir: result}, None for a run that failed; and a line for each failure.

    Raises:
      ValueError: a directory holds a run of another config; nothing was started.
      KeyboardInterrupt: interrupted; the running runs have saved their step.
    """
    ended, failures = finished(sweep), []
    count, before = total(sweep), len(ended)
    if before:
        log(f"{before} of {count} runs are already finished")
    running: dict[int, tuple[Planned, Process, float]] = {}  # by index into cores
    begun = time.monotonic()

    def end(run: Planned, text: str, result: Result | None) -> None:
        ended[run.run_dir] = result
        left = (time.monotonic() - begun) / (len(ended) - before) * (count - len(ended))
        after = f"; about {_duration(left)} left" if left else ""
        log(f"[{len(ended)}/{count}] {run_name(sweep, run)}: {text}{after}")
        if result is None:
            failures.append(f"{run_name(sweep, run)}: {text}")

    try:
        while True:
            for job, (run, process, since) in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[job]
                    end(run, *_outcome(run, status, time.monotonic() - since))
            known = ended.keys() | {run.run_dir for run, _, _ in running.values()}
            todo = [run for run in plan(sweep, ended) if run.run_dir not in known]
            blocked = [run for run in todo if run.after in ended and ended[run.after] is None]
            for run in blocked:
                end(run, f"not run, because the run before it failed: {run.after}", None)
            if blocked:
                continue
            ready = [run for run in todo if run.after is None or run.after in ended]
            free = [job for job in range(len(cores)) if job not in running]
            for job, run in zip(free, ready, strict=False):
                running[job] = (run, start(run, cores[job]), time.monotonic())
            if not running:
                return ended, failures
            time.sleep(_POLL_SECONDS)
    except BaseException:
        for _, process, _ in running.values():
            process.terminate()
        if running:
            log(f"sweep: {len(running)} running run(s) save their step ...")
        for _, process, _ in running.values():
            process.wait()
        log("sweep: run the same command to resume")
        raise


def _outcome(run: Planned, status: int, seconds: float) -> tuple[str, Result | None]:
    """Return how a run ended, as text, and its result."""
    try:
        result = read_result(run) if status == 0 else None
    except ValueError as error:
        return f"failed: {error}; see {run.log}", None
    if result is None:
        lines = run.log.read_text(errors="replace").split("\n") if run.log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"failed with status {status}, see {run.log}: {last[:200]}", None
    rate = "no" if result["win_rate"] is None else f"{100 * result['win_rate']:.1f} %"
    return f"win rate {rate}, {_duration(seconds)}", result


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def listing(sweep: Sweep, ended: Ended) -> str:
    """Return the runs that are known so far with their status."""
    known = plan(sweep, ended)
    rows = []
    for run in known:
        result = ended.get(run.run_dir)
        rate = None if result is None else result["win_rate"]
        status = "to do" if not run.run_dir.exists() else "interrupted, failed or running"
        status = status if result is None else "done" if rate is None else f"done, {100 * rate:.1f} %"
        rows.append([run_name(sweep, run), status, str(run.run_dir)])
    more = total(sweep) - len(known)
    rest = f"; {more} more follow once values are chosen" if more else ""
    # wide, because a wrapped path cannot be copied
    table = text_table(["run", "status", "run_dir"], rows, width=10_000)
    return f"{table}\n\n{len(ended)} of {total(sweep)} runs done{rest}"


def run(argv: Sequence[str]) -> int:
    """Run the sweep and print its tables; return the exit status."""
    parser = Parser(prog="python -m tools.sweep", description=None)
    parser.add_argument("file", type=path_argument)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", type=path_argument)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=path_argument)
    options = parser.parse_args(argv)
    cores = divide_cores(options.jobs)
    sweep = read(options.file, options.runs)
    check(sweep)
    if options.list:
        print(listing(sweep, finished(sweep)))
        return 0
    log(f"{len(sweep.arms)} arms, {total(sweep)} runs in {sweep.folder}")
    log(f"{len(cores)} at a time on {' + '.join(str(len(job)) for job in cores)} core(s)")
    ended, failures = execute(sweep, cores)
    width = None if sys.stdout.isatty() else 10_000  # a file has no width
    print(tables(sweep, ended, markdown=options.markdown, width=width))
    if options.json:
        content: dict[str, Any] = {"file": str(options.file), **as_json(sweep, ended), "failures": failures}
        atomic_write(options.json, to_json(content, indent=2) + "\n")
    for line in failures:
        log(f"sweep: {line}")
    return int(bool(failures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(as_called(__doc__))
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C; what nohup ignores stays ignored
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    return exit_status("sweep", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
