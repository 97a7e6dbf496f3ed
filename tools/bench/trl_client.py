"""Run TRL beside tools.bench: start trl_worker.py in its own environment and request one step at a time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.parts import Bench
from xpo_jax.reporting.console import text_table

SCRIPT = Path(__file__).with_name("trl_worker.py")


class Peer:
    """TRL's XPOTrainer in a process of its own, that rests until it is asked for a step.

    Args:
      python: of the environment that has TRL.
      folder: of the model's weights.
      prompts: i32[B P]. lengths: i[S B], of the responses.
      options: of the command line.

    Raises:
      ValueError: it does not start; with its last line.
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
        """Let it take one step, and keep its times if `measured`."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
            told = next((line for line in self._process.stdout if line.startswith('{"step"')), None)
        except BrokenPipeError:
            told = None
        if told is None:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().rsplit("\n", 1)[-1]
            raise ValueError(
                f"--peer=trl: {SCRIPT.name} ended with status {self._process.returncode}: {last}"
            )
        if measured:
            self.seconds.append(json.loads(told))

    def medians(self) -> dict[str, float]:
        """Seconds of a step, and of the generation and the judge in it."""
        return {name: float(np.median([each[name] for each in self.seconds])) for name in self.seconds[0]}

    def ratios(self, parts: Bench) -> dict[str, Any]:
        """{what: (our seconds, theirs, theirs / ours)}, medians; generation is of both candidates."""
        theirs = self.medians()
        second = parts.parts.get("ahead", parts.parts["sample"])
        generation = parts.parts["sample"].median + second.median
        ours = {"step": parts.parts["step"].median, "generation": generation}
        found: dict[str, Any] = {name: (ours[name], theirs[name], theirs[name] / ours[name]) for name in ours}
        found["judge"] = (None, theirs["judge"], None)
        return found

    def table(self, parts: Bench) -> str:
        """The ratios for people."""
        return text_table(
            ["", "ours, s", "TRL, s", "TRL / ours"],
            [[name, *row] for name, row in self.ratios(parts).items()],
        )

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._scratch.cleanup()
