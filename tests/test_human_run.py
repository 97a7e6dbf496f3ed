"""Whole runs of a tiny model with a human judge: somebody clicks, is interrupted, and is asked nothing twice."""

import json
import os
import signal
import threading

import pytest
from fakes import LongerText
from tiny_run import changed_config, run_name

from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.judges.human import Human
from xpo_jax.values import Comparison

pytestmark = pytest.mark.usefixtures("shared_programs", "one_device")

OPEN = Human._open
JUDGE = {"name": "human", "port": 0, "votes": 1}


class Clicker:
    """Chooses the longer answer on the page of each human judge that a run opens.

    Args:
      monkeypatch: of pytest.
      stop_after: sends SIGTERM to this process after this many votes.
    """

    def __init__(self, monkeypatch, stop_after=None):
        self._stop_after, self.asked, self.progress, self.taken = stop_after, [], [], []

        def open_page(judge):
            is_new = judge._board is None
            board = OPEN(judge)
            if is_new:
                threading.Thread(target=self._click, args=(board, judge), daemon=True).start()
            return board

        monkeypatch.setattr(Human, "_open", open_page)

    def _click(self, board, judge):
        while True:
            shown = board.next("a" * 16)
            if shown is None:
                threading.Event().wait(0.002)
                continue
            self.asked.append(shown.id)
            self.progress.append(judge._status()["progress"])
            self.taken.append(judge._status()["taken"])
            (verdict,) = LongerText()([Comparison(*shown.comparison)])
            board.vote("a" * 16, shown.id, {1.0: "A", 0.0: "B", 0.5: "tie"}[verdict.p])
            if len(self.asked) == self._stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
                return


@pytest.fixture
def config(tmp_path):
    return changed_config(
        tmp_path,
        steps=3,
        judge=JUDGE | {"votes_folder": str(tmp_path / "votes")},
        evaluation__judge={"name": "fakes:LongerText"},
        evaluation__prompts=4,
        evaluation__reference_samples=1,
        evaluation__every_steps=0,
    )


def pairs(folder):
    return [
        (pair["step"], pair["position"], pair["p_first"], pair["responses"][0]["tokens"])
        for pair in read_pairs(folder / "pairs.jsonl")
    ]


@pytest.mark.parametrize("behind", [0, 1])
def test_run_with_a_human_judge_that_is_stopped_resumes_where_the_person_was(
    config, tmp_path, monkeypatch, behind
):
    config.judging.steps_behind = behind
    whole = Clicker(monkeypatch)
    status, out, err = run_name(tmp_path, "whole", config)
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["judge_queries"] == len(whole.asked) == len(set(whole.asked))
    assert result["evaluation_queries"] > 0 and "of evaluations: fakes:LongerText" in out
    steps = [None if progress is None else progress["step"] for progress in whole.progress]
    # one step behind, the page shows the next pairs at once, and the progress that is known then
    assert set(steps) <= {0, 1, 2} and steps == sorted(steps) and (behind or set(steps) == {0, 1, 2})
    assert whole.progress[0]["win_rate"] is None
    assert behind or whole.progress[-1]["pairs"] == 16
    first, last = whole.progress[0]["examples"], whole.progress[-1]["examples"]
    assert [prompt for prompt, _, _ in first] == [prompt for prompt, _, _ in last]
    assert [sample for _, sample, _ in first] == [sample for _, sample, _ in last]

    config.judge.votes_folder = str(tmp_path / "other_votes")
    stopped = Clicker(monkeypatch, stop_after=11)  # in the second round
    status, _, err = run_name(tmp_path, "stopped", config)
    assert status == 143 and "stopped by SIGTERM" in err
    resumed = Clicker(monkeypatch)
    status, out, err = run_name(tmp_path, "stopped", config)
    assert status == 0, err
    assert "after step 1" in out  # the first round's update was saved
    assert stopped.asked + resumed.asked == whole.asked
    assert stopped.taken + resumed.taken == whole.taken == list(range(len(whole.asked)))
    assert pairs(tmp_path / "stopped") == pairs(tmp_path / "whole")


def test_page_shows_the_held_out_win_rate_where_pairs_have_none(config, tmp_path, monkeypatch):
    """Between two samples of the policy its win rate is one half, also where it has learned much."""
    config.loss.second_candidate, config.evaluation.every_steps = "policy", 1
    clicker = Clicker(monkeypatch)
    status, _, err = run_name(tmp_path, "both", config)
    assert status == 0, err
    assert all(progress["win_rate"] is None for progress in clicker.progress)
    files = [tmp_path / "both" / "evaluations" / f"{step}.json" for step in range(3)]
    rates = {step: json.loads(file.read_text())["evaluation"]["win_rate"] for step, file in enumerate(files)}
    assert {progress["held_out"][::3] for progress in clicker.progress} == {(rates[i], i) for i in range(3)}


def test_evaluation_judge_that_runs_on_devices_is_refused(config, tmp_path):
    config.evaluation.judge = {"name": "reward_model", "path": "x"}
    status, _, err = run_name(tmp_path, "refused", config)
    assert status == 2 and "evaluation.judge" in err and "\n" not in err.strip()


def test_evaluation_judge_that_combines_judges_of_the_host_is_accepted(config, tmp_path):
    part = {"name": "fakes:LongerText", "weight": 1.0}
    config.judge = {"name": "fakes:LongerText"}
    config.evaluation.judge = {"name": "combine", "kind": "mean", "judges": (part,)}
    config.judging.max_queries = 7
    status, _, err = run_name(tmp_path, "small", config)
    assert status == 2 and "a step may need 8 queries" in err
    config.judging.max_queries = 8
    status, out, err = run_name(tmp_path, "combined", config)
    assert status == 0 and json.loads(out.splitlines()[-1])["steps"] == 1, err


def test_evaluation_judge_without_a_name_is_refused(config, tmp_path):
    config.evaluation.judge = {"margin": 1}
    status, _, err = run_name(tmp_path, "refused", config)
    assert status == 2 and "evaluation: judge.name is missing" in err
