"""Measure what a slow judge costs a run, with and without judging.steps_behind.

    python -m tools.bench.slow_judge --out=FOLDER [--steps=12]

runs the embedded example for a few steps: with its own judge, whose seconds are few; then with a judge that gives the
same verdicts but waits, as one on another machine does, once and three times as long as a step took; each with
judging.steps_behind 0 and 1. It prints the median seconds of a step, without the first two, and as a multiple of the
larger of step and judge, which no order of the two can beat.

Run it on a quiet machine. Exit status: 0 done, 2 invalid input (one line explains), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.paraphrase import embedded
from tools.cli import Parser, exit_status, path_argument
from xpo_jax.judges.contract import Judge
from xpo_jax.judges.paraphrase import paraphrase
from xpo_jax.reporting.console import text_table
from xpo_jax.train import train
from xpo_jax.values import Comparison

WARM_UP = 2  # steps that are left out


class Slow:
    """Another judge, which first waits."""

    def __init__(self, judge: Judge, seconds: float):
        self._judge, self._seconds = judge, seconds

    def __call__(self, comparisons: Sequence[Comparison]) -> Sequence[object]:
        """Wait, then judge each comparison."""
        time.sleep(self._seconds)
        return self._judge(comparisons)


def judge(*, seconds: float, **fields: Any) -> Slow:
    """Return the paraphrase judge for the config, made slow."""
    return Slow(paraphrase(**fields), seconds)


def step_seconds(folder: Path, steps: int, judge_seconds: float, behind: int) -> float:
    """Run a few steps, and return the median seconds of one."""
    config = embedded()
    config.run_dir = str(folder / "run")
    shutil.rmtree(folder / "run", ignore_errors=True)
    config.steps, config.optimizer.warmup_steps = steps, 1
    config.evaluation.prompts, config.evaluation.reference_samples = 2, 1
    config.judge = ConfigDict(
        {**config.judge, "name": "tools.bench.slow_judge:judge", "seconds": judge_seconds}
    )
    config.judging.steps_behind, config.checkpoint.every_steps = behind, None
    config.logging.tensorboard = False
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        train(config)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = [[seconds for name, seconds in row.items() if name.startswith("time/")] for row in rows]
    return statistics.median(sum(seconds) for seconds in parts[1 + WARM_UP :] if seconds)


def run(argv: Sequence[str]) -> int:
    """Measure, and print a table; return the exit status."""
    parser = Parser(prog="python -m tools.bench.slow_judge", description=__doc__)
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=12, help="of each run, at least 4 (12)")
    options = parser.parse_args(argv)
    if options.steps < WARM_UP + 2:
        raise ValueError(f"--steps={options.steps}: must be at least {WARM_UP + 2}")
    options.out.mkdir(parents=True, exist_ok=True)
    alone = step_seconds(options.out, options.steps, 0.0, 0)
    rows = [["0", f"{alone:.2f}", f"{step_seconds(options.out, options.steps, 0.0, 1):.2f}", ""]]
    for times in (1, 3):
        waiting = times * alone
        measured = [step_seconds(options.out, options.steps, waiting, behind) for behind in (0, 1)]
        rows.append(
            [f"{waiting:.2f}", *(f"{s:.2f}" for s in measured), f"{measured[1] / max(alone, waiting):.2f}"]
        )
    heads = ["judge, s", "step, s", "with steps_behind 1, s", "of the larger of step and judge"]
    print(text_table(heads, rows))
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the measurement; return the exit status."""
    return exit_status("slow_judge", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
