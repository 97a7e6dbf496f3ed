"""What checkpoints cost: the embedded run with one every ten steps beside the same without, and a verified restore.

    python -m tools.checkpoint_cost                      three rounds of 60 steps each, some ten minutes on two cores
    python -m tools.checkpoint_cost --rounds=5 --steps=120
    python -m tools.checkpoint_cost --rounds=0 --restore_mb=4000

The runs alternate, so that what else the machine does falls on both. Seconds are from a run's start to its last line,
compilation and export included; CPU seconds are those of its process. Ratios are of medians.

Left out on purpose: disks other than the one of the temporary folder (TMPDIR).
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
    """Seconds and CPU seconds of each run, by what it saved; the first of each, which compiles, is not counted."""
    overrides = (
        f"steps={steps}",
        "optimizer.warmup_steps=1",
        "evaluation.prompts=64",
        "logging.tensorboard=False",
    )
    runs = Runs(folder, config="configs/paraphrase.py", overrides=overrides)
    found: dict[str, list[tuple[float, float]]] = {"none": [], f"every {EVERY}": []}
    for at in progress(range(number + 1), "runs with and without checkpoints"):
        for name, taken in found.items():
            every = "None" if name == "none" else str(EVERY)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run = f"{name}-{at}".replace(" ", "-")
            ended = runs.run(run, [f"checkpoint.every_steps={every}"])
            if ended.status != 0:
                raise ValueError(
                    f"the run with checkpoints {name} ends with status {ended.status}: {ended.said}"
                )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            seconds = json.loads((runs.path(run) / "result.json").read_text())["seconds"]
            if at:
                taken.append((seconds, cpu))
    return found


def restore(folder: Path, megabytes: int) -> tuple[float, float, float]:
    """Seconds to save (until whole), to verify, and to verify and restore a state of that size."""
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


def show(found: dict[str, list[tuple[float, float]]]) -> str:
    """The table of runs, and the ratios."""
    medians = {
        name: [statistics.median(column) for column in zip(*taken, strict=True)]
        for name, taken in found.items()
    }
    rows = [
        [name, *medians[name], ", ".join(f"{seconds:.1f}" for seconds, _ in taken)]
        for name, taken in found.items()
    ]
    wall, cpu = (b / a for a, b in zip(*medians.values(), strict=True))
    heads = ["checkpoints", "seconds", "CPU seconds", "seconds of each round"]
    return f"{text_table(heads, rows)}\n\nwith checkpoints: {wall:.3f} of the seconds, {cpu:.3f} of the CPU seconds"


def run(argv: Sequence[str]) -> int:
    """The whole of it."""
    parser = Parser(prog="python -m tools.checkpoint_cost", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of a run with and one without; 0 leaves them out"
    )
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument(
        "--restore_mb", type=int, default=1200, help="of a state that is saved and restored; 0: none"
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds < 0 or arguments.steps < EVERY or arguments.restore_mb < 0:
        raise ValueError(f"--rounds and --restore_mb are from 0 on, --steps from {EVERY} on")
    with tempfile.TemporaryDirectory(prefix="checkpoint-cost-") as folder:
        if arguments.rounds:
            print(show(rounds(Path(folder), arguments.rounds, arguments.steps)), flush=True)
        if arguments.restore_mb:
            times = restore(Path(folder) / "state", arguments.restore_mb)
            size = arguments.restore_mb / 1000
            what = ("saved, until whole", "verified", "verified and restored")
            rows = [[name, seconds, size / seconds] for name, seconds in zip(what, times, strict=True)]
            print("\n" + text_table([f"{size:g} GB", "seconds", "GB/s"], rows))
    return 0


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    return exit_status("checkpoint_cost", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
