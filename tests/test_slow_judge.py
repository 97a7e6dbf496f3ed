"""tools.bench.slow_judge: the table from given seconds; slow: a run of it."""

import time

import pytest

from tools.bench import slow_judge
from xpo_jax.values import Comparison


def test_table_compares_with_the_larger_of_step_and_judge(tmp_path, capsys, monkeypatch):
    """A step of 2 s alone; what waits adds up, or hides the shorter of the two."""

    def step_seconds(folder, steps, judge_seconds, behind):
        assert (folder, steps) == (tmp_path, 5)
        return max(2.0, judge_seconds) * 1.05 if behind else 2.0 + judge_seconds

    monkeypatch.setattr(slow_judge, "step_seconds", step_seconds)
    assert slow_judge.main([f"--out={tmp_path}", "--steps=5"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["0", "2.00", "2.10"], ["2.00", "4.00", "2.10", "1.05"], ["6.00", "8.00", "6.30", "1.05"]]


def test_slow_judge_waits_and_gives_the_verdicts_of_the_other():
    judge = slow_judge.Slow(lambda comparisons: ["A"] * len(comparisons), 0.05)
    begun = time.monotonic()
    assert judge([Comparison((), {}, "a", "b")] * 3) == ["A"] * 3
    assert time.monotonic() - begun >= 0.05  # what it is for; no measurement


def test_main_invalid_input_is_one_line(tmp_path, capsys):
    assert slow_judge.main([f"--out={tmp_path}", "--steps=3"]) == 2
    assert capsys.readouterr().err == "slow_judge: --steps=3: must be at least 4\n"


@pytest.mark.slow
def test_step_seconds_are_those_of_a_run_with_that_judge(tmp_path):
    assert slow_judge.step_seconds(tmp_path, 4, 20.0, 0) > 20.0
    assert (tmp_path / "run" / "config.json").read_text().count('"steps_behind": 0') == 1
