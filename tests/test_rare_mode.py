"""tools.rare_mode: its judge against Bradley-Terry's closed form, what it reads from a pairs log; slow: a run."""

import json
import math

import numpy as np
import pytest

from tools import rare_mode
from tools.sweeps import schedule
from tools.sweeps.spec import Sweep
from xpo_jax.config.loader import load
from xpo_jax.values import Comparison


def test_judge_draws_from_bradley_terry():
    pairs = [("F0", "A5"), ("A5", "F0"), ("G1", "E2"), ("F0", "AA"), ("F00", "A0"), ("A0", "A5")]
    gaps = [
        3 - 0.5,
        0.5 - 3,
        0 - 1,
        3 + 1,
        -1 - 0.5,
        0,
    ]  # F is good, A to E are common, the rest is 0, other texts -1
    judge, n = rare_mode.judge(seed=1), 4000
    answers = np.array([judge([Comparison((), {}, a, b) for a, b in pairs]) for _ in range(n)])
    for rate, gap in zip((answers == "A").mean(axis=0), gaps, strict=True):
        assert rate == pytest.approx(1 / (1 + math.exp(-gap)), abs=0.03)
    assert set(answers.ravel()) == {"A", "B"}


def test_fractions_are_those_of_the_log(tmp_path):
    texts = {0: ["F0", "A1", "Fx"], 2: ["F5", "F1", "F", "F22"]}
    lines = [
        json.dumps({"step": step, "responses": [{"text": text}, {"text": "F0"}], "shown": shown}) + "\n"
        for step, batch in texts.items()
        for text, shown in zip(batch, ([0, 1], None, [1, 0], [0, 1]), strict=False)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    good, other, verdicts = rare_mode.fractions(tmp_path)
    np.testing.assert_array_equal(good[:4] * rare_mode.BATCH, [1, 0, 2, 0])
    np.testing.assert_array_equal(other[:4] * rare_mode.BATCH, [1, 0, 2, 0])
    np.testing.assert_array_equal(verdicts[:4], [2, 2, 5, 5])
    assert len(good) == rare_mode.STEPS and verdicts[-1] == 5


@pytest.mark.slow
def test_main_fits_the_reference_and_trains(tmp_path, monkeypatch, capsys):
    """The fitted model gives the good letter with the probability asked for, and the runs end."""
    monkeypatch.setattr(rare_mode, "STEPS", 3)
    monkeypatch.setattr(rare_mode, "SEEDS", 1)
    assert rare_mode.main([f"--out={tmp_path}", "--mass=0.01"]) == 0
    out = capsys.readouterr().out
    good = float(out.split("gives F with ")[1].split(",")[0])
    letters = float(out.split("one of the letters with ")[1].split("\n")[0])
    assert good == pytest.approx(0.01, rel=0.15) and letters == pytest.approx(1, abs=0.02)
    lines = (tmp_path / "0.01" / "runs" / "plain_0.1" / "seed_0" / "pairs.jsonl").read_text().splitlines()
    assert len(lines) == 3 * rare_mode.BATCH
    assert [line.split("  ")[0] for line in out.splitlines()[-3:]] == ["0", "0.02", "0.1"]


def test_arms_are_valid_configs_and_change_what_they_name(tmp_path):
    arms = rare_mode.arms(tmp_path, factors=True)
    sweep = Sweep(tmp_path / "runs", arms, (0, 7), None)
    schedule.check(sweep)
    assert len({arm.slug for arm in arms}) == len(arms)
    configs = {
        run.arm.name: load(run.arm.config, run.overrides) for run in schedule.plan(sweep, {}) if run.seed == 7
    }
    plain = configs["plain, 0"]
    assert (plain.seed, plain.judge.seed, plain.loss.alpha, plain.replay.updates) == (7, 7, 0.0, 1)
    assert configs["plain, 0.02"].loss.alpha == pytest.approx(0.02 * plain.loss.beta)
    assert configs["replay, 0"].replay.updates == 4 and configs["replay, 0"].loss.alpha == 0.0
    assert configs["bounded, 0.02"].loss.alpha == pytest.approx(4 * configs["plain, 0.02"].loss.alpha)
    assert configs["alpha to 0, 0.02"].loss.alpha["end"] == 0.0
    assert configs["second at temperature 2, 0"].sampling.second_temperature == 2.0
    of_humans = configs["two of the policy, replay, bounded, 0.02"]
    assert (of_humans.loss.second_candidate, of_humans.loss.bonus) == ("policy", "bounded")
    assert (of_humans.replay.updates, of_humans.judging.max_indecisive_steps) == (4, None)
    assert of_humans.loss.alpha == configs["bounded, 0.02"].loss.alpha
    sgd = configs["SGD, 0"].optimizer
    assert sgd.learning_rate / sgd.eps == pytest.approx(rare_mode.SGD_RATE)


def test_main_invalid_input_is_one_line(capsys):
    assert rare_mode.main([]) == 2
    assert "--out" in capsys.readouterr().err
