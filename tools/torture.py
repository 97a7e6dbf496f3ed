"""Kill a run with SIGKILL at random moments, start it again, and see that nothing was ever lost.

    python -m tools.torture --kills=200
    python -m tools.torture --kills=200 --config=configs/paraphrase.py --override=steps=24 --log=torture.jsonl
    python -m tools.torture --kills=10 --tiny

Runs of a short form of the embedded example follow each other until there were so many kills. Each run is killed
again and again, at moments spread evenly over the time that an uninterrupted one takes, until it comes to its end
between two kills. Then weights, metrics (timings left out), pairs and samples are compared bit for bit with those of
the uninterrupted run. The log is a file with a line of JSON for each kill and each end. The exit status is 1 as soon
as a run is lost: if it ends with an error, hangs, or ends differently; its folder is then kept.

Left out on purpose: kills of one process of many, see faults.py.
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

from tools.cli import Parser
from tools.faults.tiny_run import PATIENCE_SECONDS, Ended, Runs, differences, metrics
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
)  # of the embedded run


class Lost(Exception):
    """A run did not end as it had to; one line that says where it is and what is wrong with it."""


def torture(runs: Runs, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Kill runs until there were so many kills; yields a line for each kill and each end.

    Raises:
      Lost: with the first run that did not end as it had to.
    """
    whole, begun = (
        runs.whole,
        time.monotonic(),
    )  # it has compiled the programs, so that the next one's time counts
    ended, took = runs.run("timed"), time.monotonic() - begun
    _compare(runs.path("timed"), ended, whole)
    yield {"event": "whole", "seconds": round(took, 2), "kills": kills, "seed": seed, **_about(runs)}
    moments, killed, number = random.Random(seed), 0, 0
    while killed < kills:
        number, begun, starts, before = number + 1, time.monotonic(), 0, killed
        path = runs.path(f"run-{number}")
        while True:
            starts += 1
            moment = moments.uniform(0, took) if killed < kills else PATIENCE_SECONDS
            ended = _kill_after(runs, path.name, moment)
            if ended.status != -9:
                break
            if killed == kills:
                raise Lost(f"{path}: hangs, no end after {PATIENCE_SECONDS} s")
            killed += 1
            line = {
                "event": "kill",
                "kill": killed,
                "run": number,
                "start": starts,
                "after": round(moment, 3),
            }
            yield {**line, **_seen(path, ended)}
        _compare(path, ended, whole)
        shutil.rmtree(path)
        seconds = round(time.monotonic() - begun, 1)
        yield {"event": "end", "run": number, "kills": killed - before, "starts": starts, "seconds": seconds,
               "bit_equal": True}  # fmt: skip


def _compare(path: Path, ended: Ended, whole: Path) -> None:
    if ended.status != 0:
        raise Lost(f"{path}: ends with status {ended.status}: {ended.said or ended.err[-500:]}")
    if different := differences(path, whole):
        raise Lost(f"{path}: differs from the uninterrupted run in {len(different)}: {different[:5]}")


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
    """What it had said last when it was killed, what it left half-written, and how far it had come."""
    done = metrics_so_far(run)
    whole, begun = [], []
    for folder in run.glob("checkpoints/*"):
        (whole if (folder / "manifest.sha256").exists() else begun).append(int(folder.name))
    half = [f"checkpoint {step}" for step in sorted(begun)] + ["export"] * (run / ".export.partial").exists()
    lines = [line.strip() for line in ended.err.splitlines() if line.strip()]
    said = lines[-1][:60] if lines else "nothing"
    return {"said": said, "half_written": half, "step": done, "checkpoint": max(whole, default=None)}


def metrics_so_far(run: Path) -> int | None:
    """The last step whose line in metrics.jsonl is whole; a kill may have torn one."""
    try:
        return metrics(run)[-1]["step"]
    except (OSError, IndexError, ValueError):
        lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        return lines - 1 if lines else None


def summary(lines: Sequence[dict[str, Any]], took: float) -> str:
    """The last line that is shown."""
    kills, ends = ([line for line in lines if line["event"] == event] for event in ("kill", "end"))
    return (
        f"{len(kills)} kills over {len(ends)} runs in {took:.0f} s: no run lost,"
        f" {sum(line['bit_equal'] for line in ends)} of {len(ends)} bit-equal to the uninterrupted one"
    )


def main(argv: Sequence[str]) -> int:
    """Torture, with a bar and a log; returns the exit status."""
    parser = Parser(prog="python -m tools.torture", description=__doc__)
    parser.add_argument("--kills", type=int, required=True, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--config", default=EMBEDDED, help=f"of the runs; {EMBEDDED} in a short form")
    parser.add_argument("--override", action="append", default=[], help="a field of it, such as steps=24")
    parser.add_argument("--tiny", action="store_true", help="tiny_run.py's config instead: seconds a run")
    parser.add_argument("--log", type=Path, default=Path("torture.jsonl"), help="the file to write")
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
    told = summary(lines, time.monotonic() - begun)
    with arguments.log.open("a") as log:
        log.write(json.dumps({"event": "summary", "said": told}) + "\n")
    shutil.rmtree(folder)
    print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
