"""What is exported: the best by each measure, recomputed from the run's files; a resumed run exports the same."""

import json
import math
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import Counting
from tiny_run import run_contents

from xpo_jax.evaluation.selection import Selection
from xpo_jax.evaluation.statistics import reward

pytestmark = pytest.mark.usefixtures("shared_programs", "one_device")


@pytest.fixture(autouse=True)
def reset_judge():
    Counting.reset()


def evaluation(shares: list[float], kl: list[float], **policy: float) -> Any:
    """Return what `Selection` reads of an evaluation."""
    wins = [np.array([share]) for share in shares]
    return SimpleNamespace(
        win_rate=float(np.mean(shares)),
        low=0.1,
        high=0.9,
        kl=float(np.mean(kl)),
        reward=reward(wins, np.array(kl)),
        policy=policy,
        intervals={"score": 0.25},
    )


def test_measures_are_those_that_their_names_state():
    seen = evaluation([1.0, 0.0, 1.0, 1.0], [2.0, 1.0, 3.0, 2.0], score=0.5)
    chosen = {name: Selection(name, 0.1, 5) for name in ("last", "best", "best_score", "best_objective")}
    assert chosen["last"].measure(seen) == chosen["best"].measure(seen) == (0.75, 0.1, 0.9)
    assert chosen["best_score"].measure(seen) == (0.5, 0.25, 0.75)
    assert chosen["best_objective"].score(seen) == pytest.approx(math.log(0.7 / 0.3) - 0.1 * 2.0)
    assert chosen["best"].score(evaluation([math.nan] * 4, [1.0] * 4)) is None
    assert [selection.chooses for selection in chosen.values()] == [False, True, True, True]
    assert (
        chosen["last"].result(seen) == {}
        and chosen["last"].line(3, seen) == ""
        and not chosen["best"].metrics(seen)
    )
    assert chosen["best_score"].metrics(seen) == {
        "eval/export": 0.5,
        "eval/export_low": 0.25,
        "eval/export_high": 0.75,
    }
    assert chosen["best_score"].line(3, seen) == "exported: step 3, the best by mean score: 0.5 [0.25, 0.75]"
    assert chosen["best_score"].line(0, seen).startswith("exported: step 0, the untrained start, the best by")
    assert chosen["best_objective"].result(seen)["exported_by"] == "E[r] - beta KL, nats, beta 0.1"


def test_objective_and_win_rate_can_differ():
    """Winning a little more at four times the KL is no better once the KL has its price."""
    near, far = evaluation([1.0] * 7 + [0.0] * 3, [1.0] * 10), evaluation([1.0] * 8 + [0.0] * 2, [16.0] * 10)
    by_rate, by_objective = (Selection(name, 0.1, 5) for name in ("best", "best_objective"))
    assert by_rate.score(far) > by_rate.score(near) and by_objective.score(near) > by_objective.score(far)


def test_choice_without_choices_or_score_is_refused():
    with pytest.raises(ValueError, match=r"^checkpoint\.export is 'best', but evaluation\.every_steps is 0"):
        Selection("best", 0.1, 0)
    with pytest.raises(
        ValueError, match=r"^checkpoint\.export is 'best_score', but the judge's parts do not report"
    ):
        Selection("best_score", 0.1, 3).check(evaluation([1.0, 0.0], [1.0, 1.0]))
    Selection("last", 0.1, 0).check(evaluation([1.0, 0.0], [1.0, 1.0]))


def test_run_exports_the_best_objective_and_resumes_to_the_same(run, folder):
    """The objective is recomputed here from evaluations/ and the config's beta."""
    # with a beta so large the start's KL of 0 may win
    changes = {"loss__beta": 2.0, "checkpoint__export": "best_objective", "loss__alpha": 0.0}
    assert run("objective", **changes)[0] == 0
    contents = run_contents(folder / "objective")
    stored = {
        int(name.split(".")[0]): json.loads(text)["evaluation"]
        for name, text in contents["evaluations"].items()
    }
    n, values = 11, {}
    for step, entry in stored.items():
        rate = (n * entry["win_rate"] + 0.5) / (n + 1)
        values[step] = math.log(rate / (1 - rate)) - 2.0 * entry["kl"]
    result = contents["result"]
    assert sorted(values) == [0, 3, 6] and result["exported_step"] == max(
        values, key=lambda step: values[step]
    )
    assert result["exported_value"] == pytest.approx(values[result["exported_step"]])
    assert result["exported_value_low"] < result["exported_value"] < result["exported_value_high"]
    assert result["win_rate"] == stored[result["exported_step"]]["win_rate"]
    logged = {row["step"]: row["eval/export"] for row in contents["metrics"] if "eval/export" in row}
    assert logged == pytest.approx(values)
    card = (folder / "objective" / "export" / "README.md").read_text()
    assert (
        f"after {result['exported_step']} steps" in card and "chosen by: E[r] - beta KL, nats, beta 2" in card
    )
    assert "exported" in (folder / "objective" / "report.html").read_text()

    Counting.reset()
    Counting.signal_at = (21, signal.SIGTERM)  # in the fifth step
    assert run("stopped", **changes)[0] == 143
    Counting.signal_at = None
    assert run("stopped", **changes)[0] == 0
    assert run_contents(folder / "stopped") == contents


def test_run_exports_the_best_mean_score(run, folder):
    status, _, err, _ = run("counting", checkpoint__export="best_score")
    assert status == 2 and "the judge has no method parts(messages, text)" in err and err.count("\n") == 1
    assert not (folder / "counting").exists() and not Counting.batches
    assert run("score", judge={"name": "fakes:Scored"}, checkpoint__export="best_score")[0] == 0
    contents = run_contents(folder / "score")
    scores = {
        int(name.split(".")[0]): json.loads(text)["evaluation"]["policy"]["score"]
        for name, text in contents["evaluations"].items()
    }
    best = max(scores, key=lambda step: (scores[step], step))
    assert (contents["result"]["exported_step"], contents["result"]["exported_value"]) == (best, scores[best])
