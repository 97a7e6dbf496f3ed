"""Run TRL for tools.bench: start trl_worker.py in its own environment and request one step at a time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.parts import PREFETCH, Bench
from xpo_jax.reporting.console import text_table

SCRIPT = Path(__file__).with_name("trl_worker.py")


class Peer:
    """TRL's XPOTrainer in a process of its own, which idles until a step is requested.

    Args:
      python: the interpreter of an environment with TRL.
      folder: the model's Hugging Face folder.
      prompts: i32[B P], tokens. lengths: i[S B], tokens of the responses.
      options: the command line.

    Raises:
      ValueError: the process cannot be started.
    """

    def __init__(
        self, python: str, folder: Path, prompts: np.ndarray, lengths: np.ndarray, options: argparse.Namespace
    ):
        self._scratch = tempfile.TemporaryDirectory()
        spec = Path(self._scratch.name) / "spec.json"
        spec.write_text(
            json.dumps(
                {
                    "folder": str(folder),
                    "prompts": prompts.tolist(),
                    "lengths": lengths.tolist() if options.lengths != "fixed" else None,
                    "new": options.new,
                    "steps": options.repeat + 1,
                    "scratch": self._scratch.name,
                }
            )
        )
        self._errors = (Path(self._scratch.name) / "stderr").open("w+")
        try:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), str(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        except OSError as error:
            raise ValueError(f"--peer_python={python}: {error}") from None
        self.seconds: list[dict[str, float]] = []

    def step(self, *, measured: bool = False) -> None:
        """Take one step, and record its times if `measured`.

        Raises:
          ValueError: TRL ended; the message holds its last line.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
            answer = next((line for line in self._process.stdout if line.startswith('{"step"')), None)
        except BrokenPipeError:
            answer = None
        if answer is None:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().rsplit("\n", 1)[-1]
            raise ValueError(
                f"--peer=trl: {SCRIPT.name} ended with status {self._process.returncode}: {last}"
            )
        if measured:
            self.seconds.append(json.loads(answer))

    def medians(self) -> dict[str, float]:
        """Return the median seconds of a step, and of the generation and the judge in it."""
        return {name: float(np.median([step[name] for step in self.seconds])) for name in self.seconds[0]}

    def ratios(self, bench: Bench) -> dict[str, Any]:
        """Return {part: (our seconds, TRL's, TRL's / ours)} of medians; generation is that of both candidates."""
        trl = self.medians()
        reference = bench.parts.get(PREFETCH, bench.parts["sample"])
        generation = bench.parts["sample"].median + reference.median
        ours = {"step": bench.parts["step"].median, "generation": generation}
        ratios: dict[str, Any] = {name: (ours[name], trl[name], trl[name] / ours[name]) for name in ours}
        ratios["judge"] = (None, trl["judge"], None)
        return ratios

    def table(self, bench: Bench) -> str:
        """Return the ratios as a table."""
        return text_table(
            ["", "ours, s", "TRL, s", "TRL / ours"],
            [[name, *row] for name, row in self.ratios(bench).items()],
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._scratch.cleanup()
