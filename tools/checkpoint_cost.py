"""Measure the cost of checkpoints: the embedded run with and without them, and a verified restore.

    python -m tools.checkpoint_cost                      three rounds of 60 steps, about ten minutes on two cores
    python -m tools.checkpoint_cost --rounds=5 --steps=120
    python -m tools.checkpoint_cost --rounds=0 --restore_mb=4000

Runs with a checkpoint every ten steps alternate with runs without, so that other load on the machine affects both.
Seconds are from a run's start to its last line, including compilation and export; CPU seconds are those of its process.
Ratios are ratios of medians.

Left out on purpose: disks other than that of the temporary folder (TMPDIR).
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from tools.cli import Parser, exit_status
from tools.faults.tiny_run import Runs
from xpo_jax.checkpointing import checkpoint
from xpo_jax.reporting.console import progress, text_table
from xpo_jax.values import TrainState

EVERY = 10


def rounds(folder: Path, number: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds and CPU seconds of runs, by checkpoint interval, without the first round, which compiles."""
    overrides = (
        f"steps={steps}",
        "optimizer.warmup_steps=1",
        "evaluation.prompts=64",
        "logging.tensorboard=False",
    )
    runs = Runs(folder, config="configs/paraphrase.py", overrides=overrides)
    seconds_of: dict[str, list[tuple[float, float]]] = {"none": [], f"every {EVERY}": []}
    for at in progress(range(number + 1), "runs with and without checkpoints"):
        for name, measured in seconds_of.items():
            every = "None" if name == "none" else str(EVERY)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run = f"{name}-{at}".replace(" ", "-")
            ended = runs.run(run, [f"checkpoint.every_steps={every}"])
            if ended.status != 0:
                raise ValueError(
                    f"the run with checkpoints {name} ended with status {ended.status}: {ended.message}"
                )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            seconds = json.loads((runs.path(run) / "result.json").read_text())["seconds"]
            if at:
                measured.append((seconds, cpu))
    return seconds_of


def restore(folder: Path, megabytes: int) -> tuple[float, float, float]:
    """Return the seconds to save a state of that size completely, to verify it, and to verify and restore it."""
    keys = jax.random.split(jax.random.key(0), 8)
    params = {str(i): jax.random.normal(key, (megabytes * 1_000_000 // 32,)) for i, key in enumerate(keys)}
    state = TrainState(jnp.int32(1), jnp.int32(0), params, {})
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    begun = [time.perf_counter()]
    checkpoint.save(folder, 1, jax.block_until_ready(state), {})
    begun.append(time.perf_counter())
    checkpoint.verify(folder, 1)
    begun.append(time.perf_counter())
    jax.block_until_ready(checkpoint.restore(folder, 1, like)[0])
    begun.append(time.perf_counter())
    saving, verifying, restoring = (b - a for a, b in itertools.pairwise(begun))
    return saving, verifying, restoring


def show(seconds_of: dict[str, list[tuple[float, float]]]) -> str:
    """Return the table of runs, and the ratios."""
    medians = {
        name: [statistics.median(column) for column in zip(*measured, strict=True)]
        for name, measured in seconds_of.items()
    }
    rows = [
        [name, *medians[name], ", ".join(f"{seconds:.1f}" for seconds, _ in measured)]
        for name, measured in seconds_of.items()
    ]
    wall, cpu = (b / a for a, b in zip(*medians.values(), strict=True))
    heads = ["checkpoints", "seconds", "CPU seconds", "seconds of each round"]
    ratios = f"with checkpoints: {wall:.3f} times the seconds, {cpu:.3f} times the CPU seconds"
    return f"{text_table(heads, rows)}\n\n{ratios}"


def run(argv: Sequence[str]) -> int:
    """Measure and print; return the exit status."""
    parser = Parser(prog="python -m tools.checkpoint_cost", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of a run with and a run without; 0 for none (3)"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of each run (60)")
    parser.add_argument(
        "--restore_mb",
        type=int,
        default=1200,
        help="size of a state to save and restore, MB; 0 for none (1200)",
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds < 0 or arguments.steps < EVERY or arguments.restore_mb < 0:
        raise ValueError(f"--rounds and --restore_mb must be at least 0, --steps at least {EVERY}")
    with tempfile.TemporaryDirectory(prefix="checkpoint-cost-") as folder:
        if arguments.rounds:
            print(show(rounds(Path(folder), arguments.rounds, arguments.steps)), flush=True)
        if arguments.restore_mb:
            times = restore(Path(folder) / "state", arguments.restore_mb)
            size = arguments.restore_mb / 1000
            what = ("saved, until complete", "verified", "verified and restored")
            rows = [[name, seconds, size / seconds] for name, seconds in zip(what, times, strict=True)]
            print("\n" + text_table([f"{size:g} GB", "seconds", "GB/s"], rows))
    return 0


def main(argv: Sequence[str]) -> int:
    """Measure checkpoints; return the exit status."""
    return exit_status("checkpoint_cost", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
