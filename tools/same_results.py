"""Show that a change of the code changes nothing that a run computes.

    python -m tools.same_results --before=COMMIT [--after=COMMIT] [--folder=DIR] [--short]

Both commits are checked out into a temporary folder, and each trains the embedded example with seed 0 in four
scenarios, with the present interpreter:

    run      the example in full: 240 steps (with --short, 12)
    replay   12 steps with three updates per batch, two of them on past pairs
    offline  12 steps on the pairs that `run` recorded
    two      12 steps by two processes

Compared byte for byte are the metrics (metrics.jsonl: names, values and order, timings left out), the pairs logs
(pairs*.jsonl) and the exported weights (export/model.safetensors). Work that is not committed is not compared.

Examples:
  python -m tools.same_results --before=main --short                  minutes
  python -m tools.same_results --before=v1.0 --after=HEAD             about 20 minutes on two cores
  python -m tools.same_results --before=main --folder=build/same      keeps the runs; finished ones are reused

Exit status: 0 everything is equal, 1 something differs, 2 invalid input or a run that failed (one line explains),
130 interrupted.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.cli import Parser, exit_status, path_argument
from tools.faults.tiny_run import is_timing
from xpo_jax.reporting.console import text_table

ROOT = Path(__file__).parents[1]
FILES = ("metrics.jsonl", "pairs*.jsonl", "export/model.safetensors")
# Overrides must exist in every commit that is compared.
SHORT = ("steps=12", "optimizer.warmup_steps=1", "evaluation.prompts=64")
COMMON = ("logging.tensorboard=False",)


class Compared(NamedTuple):
    """One file of two runs.

    Attributes:
      file: its path in the run directory.
      bytes: compared, those of `before`.
      difference: the first one, in words; None if the files are equal.
    """

    file: str
    bytes: int
    difference: str | None


# ---- comparing two run directories ------------------------------------------------------------------


def compare(before: Path, after: Path) -> list[Compared]:
    """Compare two finished runs.

    Raises:
      ValueError: a run directory without one of the files, so that there is nothing to compare.
    """
    for pattern in FILES:
        if not list(before.glob(pattern)):
            raise ValueError(f"{before}: has no {pattern}; is it a finished run?")
    names = {str(path.relative_to(run)) for run in (before, after) for p in FILES for path in run.glob(p)}
    return [compare_file(before, after, name) for name in sorted(names)]


def compare_file(before: Path, after: Path, name: str) -> Compared:
    """Compare one file of two runs, byte for byte but for the timings in metrics.jsonl."""
    for run, commit in ((before, "before"), (after, "after")):
        if not (run / name).exists():
            return Compared(name, 0, f"the file does not exist {commit} the change")
    old, new = (_content(run / name) for run in (before, after))
    if old == new:
        return Compared(name, len(old), None)
    if name.endswith(".jsonl"):
        return Compared(name, len(old), _line_difference(old, new))
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return Compared(name, len(old), f"byte {at:,} of {len(old):,} and {len(new):,}")


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name != "metrics.jsonl":
        return data
    rows = (json.loads(line) for line in data.splitlines())
    return b"".join(json.dumps(_without_timings(row)).encode() + b"\n" for row in rows)


def _without_timings(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not is_timing(name)}


def _line_difference(old: bytes, new: bytes) -> str:
    """Describe the first line that differs, by field where both lines hold the same fields."""
    lines, others = old.splitlines(), new.splitlines()
    number = next(
        (i for i, (a, b) in enumerate(zip(lines, others, strict=False)) if a != b),
        min(len(lines), len(others)),
    )
    where = f"line {number + 1}"
    if number == min(len(lines), len(others)):
        return f"{where}: there are {len(lines)} lines before and {len(others)} after"
    row, other = json.loads(lines[number]), json.loads(others[number])
    if list(row) != list(other):
        changed = sorted(set(row) ^ set(other))
        return f"{where}: {'fields ' + ', '.join(changed) if changed else 'the order of the fields'}"
    for name, value in row.items():
        shown, replaced = json.dumps(value), json.dumps(other[name])
        if shown != replaced:
            return f"{where}: {name} {shown[:40]} -> {replaced[:40]}"
    return f"{where}: spelled differently"


# ---- the runs -----------------------------------------------------------------------------------------


def scenarios(short: bool) -> dict[str, tuple[str, ...]]:
    """Return the overrides of each scenario, in the order in which they are run."""
    few = (*COMMON, *SHORT)
    return {
        "run": few if short else COMMON,
        "replay": (*few, "replay.updates=3"),
        "offline": few,
        "two": (*few, "distributed.mode=on", "distributed.num_processes=2"),
    }


def config_of(name: str, folder: Path) -> str:
    """Return the config of a scenario whose runs are in `folder`."""
    return (
        f"configs/offline_dpo.py:{folder / 'run' / 'pairs.jsonl'}"
        if name == "offline"
        else "configs/paraphrase.py"
    )


def run_scenario(code: Path, folder: Path, name: str, overrides: Sequence[str]) -> None:
    """Run one scenario with the code of one commit; a finished run is reused.

    Raises:
      ValueError: the run failed; the message holds its last line.
    """
    if (folder / name / "result.json").exists():
        return
    argv = [sys.executable, "-m", "xpo_jax.main", f"--config={config_of(name, folder)}"]
    argv += [f"--config.{override}" for override in (*overrides, f"run_dir={folder / name}")]
    processes = [argv]
    if name == "two":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            argv.append(f"--config.distributed.coordinator=localhost:{free.getsockname()[1]}")
        processes = [[*argv, f"--config.distributed.process_id={i}"] for i in range(2)]
    environ = {**os.environ, "PYTHONPATH": str(code)}  # before an installed xpo_jax
    started, logs = [], [folder / f"{name}-{i}.log" for i in range(len(processes))]
    try:
        for command, log in zip(processes, logs, strict=True):
            with open(log, "wb") as out:
                started.append(subprocess.Popen(command, cwd=code, env=environ, stdout=out, stderr=out))
        statuses = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    for status, log in zip(statuses, logs, strict=True):
        if status:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise ValueError(
                f"{log}: {name} ended with status {status}: {lines[-1] if lines else 'no output'}"
            )


def run_commit(commit: str, folder: Path, short: bool) -> Path:
    """Run all scenarios with the code of one commit; return the folder of their run directories."""
    runs = folder / f"{commit[:12]}{'-short' if short else ''}"
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "code"
        _git("worktree", "add", "--quiet", "--detach", str(code), commit)
        try:
            for name, overrides in scenarios(short).items():
                begun = time.monotonic()
                print(f"{commit[:12]}: {name} ...", file=sys.stderr, flush=True)
                run_scenario(code, runs, name, overrides)
                print(f"{commit[:12]}: {name}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        finally:
            _git("worktree", "remove", "--force", str(code))
    return runs


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip()


def resolve(revision: str, flag: str) -> str:
    """Return the full hash of a commit.

    Raises:
      ValueError: there is no such commit.
    """
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except ValueError:
        raise ValueError(f"{flag}={revision}: is not a commit of {ROOT}") from None


# ---- the command line -----------------------------------------------------------------------------------


def table(results: Mapping[str, Sequence[Compared]]) -> str:
    """Return one row for each file of each scenario."""
    rows = [
        [scenario, file.file, file.bytes, file.difference or "equal"]
        for scenario, files in results.items()
        for file in files
    ]
    return text_table(["scenario", "file", "bytes", "result"], rows)


def run(argv: Sequence[str]) -> int:
    """Run both commits and print the comparison; return the exit status."""
    parser = Parser(prog="python -m tools.same_results", description=__doc__)
    parser.add_argument("--before", required=True, metavar="COMMIT", help="the code before the change")
    parser.add_argument("--after", default="HEAD", metavar="COMMIT", help="the code after it (HEAD)")
    parser.add_argument("--folder", type=path_argument, help="keep the runs here (a temporary folder)")
    parser.add_argument("--short", action="store_true", help="`run` takes 12 steps as well")
    options = parser.parse_args(argv)
    commits = [resolve(options.before, "--before"), resolve(options.after, "--after")]
    with tempfile.TemporaryDirectory(prefix="same-results-") as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        before, after = (run_commit(commit, folder, options.short) for commit in commits)
        results = {name: compare(before / name, after / name) for name in scenarios(options.short)}
    print(table(results))
    differ = sum(file.difference is not None for files in results.values() for file in files)
    total = sum(map(len, results.values()))
    print(f"\n{commits[0][:12]} and {commits[1][:12]}: {total - differ} of {total} files are equal")
    return 1 if differ else 0


def main(argv: Sequence[str]) -> int:
    """Compare two commits; return the exit status."""
    return exit_status("same_results", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
