"""The page of the human judge in a real browser: `pip install PySide6`, which has Chromium, runs this test."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("PySide6") is None, reason="PySide6 is not installed"),
]
PATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
SHORT = ("judging.max_queries=24", "batch_size=4", "judge.port=0", "evaluation.prompts=8")


class Played:
    """A run of configs/human.py in a folder."""

    def __init__(self, folder, log):
        command = [sys.executable, "-m", "xpo_jax.main", "--config=human", *(f"--config.{o}" for o in SHORT)]
        environment = os.environ | {"PYTHONPATH": PATH, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        self._log = folder / log
        with open(self._log, "w") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def out(self):
        return self._log.read_text()

    def judge(self, votes, screenshot):
        while "the first comparisons wait" not in self.out:
            assert self.process.poll() is None, self.out
            time.sleep(0.2)
        address = re.findall(r"http://127\S+", self.out)[-1]
        driver = [sys.executable, ROOT / "tests" / "human_browser.py", address, str(votes), screenshot]
        environment = os.environ | {"PYTHONPATH": PATH}
        done = subprocess.run(driver, env=environment, capture_output=True, text=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])


def test_person_in_a_browser_whose_run_is_killed_is_asked_nothing_twice(tmp_path):
    first = Played(tmp_path, "first.log")
    assert first.judge(10, tmp_path / "first.png")["votes"] == 10
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    second = Played(tmp_path, "second.log")
    assert second.judge(1000, tmp_path / "second.png")["votes"] <= 14
    assert second.process.wait(300) == 0, second.out
    result = json.loads(second.out.splitlines()[-1])
    lines = (tmp_path / "runs" / "human_votes" / "votes.jsonl").read_text().splitlines()
    ids = [json.loads(line)["comparison"] for line in lines]
    assert len(ids) == len(set(ids)) == result["judge_queries"] <= 24
    assert (tmp_path / "first.png").stat().st_size > 10_000
