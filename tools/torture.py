"""Kill runs with SIGKILL at random moments, restart them, and check that nothing is ever lost.

    python -m tools.torture --kills=200
    python -m tools.torture --kills=200 --config=configs/paraphrase.py --override=steps=24 --log=torture.jsonl
    python -m tools.torture --kills=10 --tiny

A short form of the embedded example is run again and again until --kills runs were killed. Each run is killed
repeatedly, at moments spread evenly over the duration of an uninterrupted run, until it reaches its end between two
kills. Its weights, metrics (without timings), pairs and samples are then compared bit for bit with those of the
uninterrupted run. The log has a line of JSON for each kill and each end.

Exit status: 0 no run was lost; 1 a run was lost, because it ended with an error, hangs, or ended differently (its
folder is kept); 2 invalid input (one line explains).

Left out on purpose: kills of one of several processes, see tools.faults.
"""

from __future__ import annotations

import contextlib
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from tools.cli import Parser, path_argument
from tools.faults.tiny_run import HANG_SECONDS, Ended, Runs, differences, metrics
from xpo_jax.reporting.console import progress

EMBEDDED = "configs/paraphrase.py"
SHORT = (
    "steps=12",
    "batch_size=32",
    "data.buckets=40",
    "checkpoint.every_steps=3",
    "evaluation.every_steps=6",
    "evaluation.prompts=32",
    "evaluation.reference_samples=1",
    "logging.tensorboard=False",
)  # the short form of the embedded example


class Lost(Exception):
    """A run did not end like the uninterrupted one; the message names its directory and the difference."""


def torture(runs: Runs, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Kill runs until there were `kills` kills; yield a record for each kill and each end.

    Raises:
      Lost: a run did not end like the uninterrupted one.
    """
    expected = (
        runs.uninterrupted
    )  # compiles the programs, so that the next run has the duration of the others
    begun = time.monotonic()
    ended, took = runs.run("timed"), time.monotonic() - begun
    _compare(runs.path("timed"), ended, expected)
    yield {"event": "whole", "seconds": round(took, 2), "kills": kills, "seed": seed, **_about(runs)}
    moments, killed, number = random.Random(seed), 0, 0
    while killed < kills:
        number, begun, starts, before = number + 1, time.monotonic(), 0, killed
        path = runs.path(f"run-{number}")
        while True:
            starts += 1
            moment = moments.uniform(0, took) if killed < kills else HANG_SECONDS
            ended = _kill_after(runs, path.name, moment)
            if ended.status != -9:
                break
            if killed == kills:
                raise Lost(f"{path}: hangs, no end after {HANG_SECONDS} s")
            killed += 1
            line = {
                "event": "kill",
                "kill": killed,
                "run": number,
                "start": starts,
                "after": round(moment, 3),
            }
            yield {**line, **_seen(path, ended)}
        _compare(path, ended, expected)
        shutil.rmtree(path)
        seconds = round(time.monotonic() - begun, 1)
        yield {"event": "end", "run": number, "kills": killed - before, "starts": starts, "seconds": seconds,
               "bit_equal": True}  # fmt: skip


def _compare(path: Path, ended: Ended, expected: Path) -> None:
    if ended.status != 0:
        raise Lost(f"{path}: ends with status {ended.status}: {ended.message or ended.err[-500:]}")
    if different := differences(path, expected):
        raise Lost(f"{path}: differs from the uninterrupted run in {len(different)} results: {different[:5]}")


def _about(runs: Runs) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    return {"overrides": list(runs.overrides), **versions, "machine": platform.machine()}


def _kill_after(runs: Runs, name: str, seconds: float) -> Ended:
    with runs.started(name) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=seconds)
            return Ended(process.returncode, out, err)
        process.kill()
        out, err = process.communicate()
        return Ended(process.returncode, out, err)


def _seen(run: Path, ended: Ended) -> dict[str, Any]:
    """Describe a killed run: its last line of output, what is half written, its last step and checkpoint."""
    done = metrics_so_far(run)
    complete, partial = [], []
    for folder in run.glob("checkpoints/*"):
        (complete if (folder / "manifest.sha256").exists() else partial).append(int(folder.name))
    half = [f"checkpoint {step}" for step in sorted(partial)] + ["export"] * (
        run / ".export.partial"
    ).exists()
    lines = [line.strip() for line in ended.err.splitlines() if line.strip()]
    message = lines[-1][:60] if lines else "nothing"
    return {"said": message, "half_written": half, "step": done, "checkpoint": max(complete, default=None)}


def metrics_so_far(run: Path) -> int | None:
    """Return the last step whose line in metrics.jsonl is complete; a kill may have truncated one."""
    try:
        return metrics(run)[-1]["step"]
    except (OSError, IndexError, ValueError):
        lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        return lines - 1 if lines else None


def summary(lines: Sequence[dict[str, Any]], took: float) -> str:
    """Return the line that is printed at the end."""
    kills, ends = ([line for line in lines if line["event"] == event] for event in ("kill", "end"))
    return (
        f"{len(kills)} kills over {len(ends)} runs in {took:.0f} s: no run lost,"
        f" {sum(line['bit_equal'] for line in ends)} of {len(ends)} bit-equal to the uninterrupted one"
    )


def main(argv: Sequence[str]) -> int:
    """Kill runs, with a progress bar and a log; return the exit status."""
    parser = Parser(prog="python -m tools.torture", description=__doc__)
    parser.add_argument("--kills", type=int, required=True, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (0)")
    parser.add_argument("--config", default=EMBEDDED, help=f"config of the runs (a short form of {EMBEDDED})")
    parser.add_argument(
        "--override", action="append", default=[], help="override of a config field, such as steps=24"
    )
    parser.add_argument("--tiny", action="store_true", help="use the config of tools.faults: seconds per run")
    parser.add_argument(
        "--log", type=path_argument, default=Path("torture.jsonl"), help="file to write (torture.jsonl)"
    )
    try:
        arguments = parser.parse_args(argv)
        if arguments.kills < 1:
            raise ValueError(f"--kills is {arguments.kills}, must be at least 1")
    except ValueError as error:
        print(f"torture: {error}", file=sys.stderr)
        return 2
    short = SHORT if arguments.config == EMBEDDED and not arguments.tiny else ()
    folder, begun, lines = Path(tempfile.mkdtemp(prefix="torture-")), time.monotonic(), []
    config = None if arguments.tiny else arguments.config
    runs = Runs(folder, config=config, overrides=(*short, *arguments.override))
    with arguments.log.open("w") as log:

        def kills() -> Iterator[None]:
            for line in torture(runs, arguments.kills, arguments.seed):
                log.write(json.dumps({"time": time.strftime("%H:%M:%S"), **line}) + "\n")
                log.flush()
                lines.append(line)
                if line["event"] == "kill":
                    yield

        try:
            for _ in progress(kills(), "kills", total=arguments.kills):
                pass
        except (Lost, TimeoutError, RuntimeError) as lost:
            log.write(json.dumps({"event": "lost", "said": str(lost)}) + "\n")
            print(f"torture: LOST: {lost}", file=sys.stderr)
            return 1
    conclusion = summary(lines, time.monotonic() - begun)
    with arguments.log.open("a") as log:
        log.write(json.dumps({"event": "summary", "said": conclusion}) + "\n")
    shutil.rmtree(folder)
    print(conclusion)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
