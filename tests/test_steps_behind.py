"""judging.steps_behind: pairs drawn one update early, and a judge that decides on them beside the update."""

import json
import signal
import threading
import time

import pytest
from fakes import Counting
from shared_fixtures import STEPS
from tiny_run import changed_config, killed_at_update, read_metrics, run_contents, run_name

from xpo_jax.judges.contract import JudgeError
from xpo_jax.runtime.background import BackgroundCall
from xpo_jax.runtime.interruption import Signals, Stopped, interruptible

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def reset_judge():
    Counting.reset()
    Watched.reset()


@pytest.fixture(scope="module")
def whole(run, folder):
    """Return the files of an uninterrupted run, and the number of its comparisons."""
    status, _, err, queries = run("whole", judging__steps_behind=1)
    assert status == 0, err
    return run_contents(folder / "whole"), queries


class Watched:
    """Prefers the longer text, slowly; notes the thread of each call, and whether two calls ever met."""

    threads: list[str] = []
    inside, met, fail_at = 0, False, None

    @classmethod
    def reset(cls):
        cls.threads, cls.inside, cls.met, cls.fail_at = [], 0, False, None

    def __call__(self, comparisons):
        cls = type(self)
        cls.inside += 1
        cls.met |= cls.inside > 1
        cls.threads.append(threading.current_thread().name)
        time.sleep(0.3 if cls.threads[-1] == "judge" else 0.03)
        cls.inside -= 1
        if len(cls.threads) == cls.fail_at:
            raise JudgeError("the server is gone")
        return [1.0 if len(c.a) > len(c.b) else 0.25 if len(c.a) < len(c.b) else "tie" for c in comparisons]


def texts(run_dir):
    """Return the texts of the pairs by step."""
    by_step = {}
    for line in (run_dir / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        by_step.setdefault(pair["step"], []).append([r["text"] for r in pair["responses"]])
    return by_step


def test_a_step_is_drawn_by_the_policy_before_the_last_update(run, folder, whole):
    """Random numbers belong to the step, so what is drawn shows which policy drew it."""
    assert run("still", optimizer__learning_rate=1e-30, optimizer__warmup_steps=0)[0] == 0
    assert run("present", optimizer__learning_rate=0.3, optimizer__warmup_steps=0)[0] == 0
    behind = {"judging__steps_behind": 1, "optimizer__learning_rate": 0.3, "optimizer__warmup_steps": 0}
    assert run("behind", **behind)[0] == 0
    still, present, early = (texts(folder / name) for name in ("still", "present", "behind"))
    assert early[0] == present[0] == still[0]
    assert early[1] == still[1] != present[1]  # by the start, although one update was made
    assert early[2] != still[2]
    assert sorted(early) == list(range(STEPS)) and len(early[5]) == len(present[5])
    assert read_metrics(folder / "behind")[-1]["step"] == STEPS


def test_policy_that_does_not_move_gives_the_run_without_it(run, folder):
    fixed = {"optimizer__learning_rate": 1e-30, "optimizer__warmup_steps": 0}
    assert run("fixed", **fixed)[0] == 0
    assert run("fixed_behind", judging__steps_behind=1, **fixed)[0] == 0
    one, other = (run_contents(folder / name) for name in ("fixed", "fixed_behind"))
    for name in ("metrics", "pairs", "weights", "evaluations"):
        assert one[name] == other[name], name


@pytest.mark.parametrize("at", [1, 2, 5])
def test_resume_after_a_kill_gives_the_same_bits(run, whole, folder, at):
    with killed_at_update(at):
        run(f"killed_{at}", judging__steps_behind=1)
    time.sleep(0.3)  # the judge's thread may outlive what stands for the process here
    status, out, err, _ = run(f"killed_{at}", judging__steps_behind=1)
    assert status == 0, err
    assert at < 2 or f"after step {at - at % 2}, whose checkpoint is complete" in out
    assert run_contents(folder / f"killed_{at}") == whole[0]


def test_resume_after_a_signal_gives_the_same_bits_and_asks_for_no_verdict_twice(run, whole, folder):
    Counting.signal_at = (19, signal.SIGTERM)  # after the first evaluation's 16 batches: in the third step
    status, _, err, first = run("stopped", judging__steps_behind=1)
    assert status == 128 + signal.SIGTERM, err
    steps = sorted(int(f.name) for f in (folder / "stopped" / "checkpoints").iterdir())
    Counting.signal_at = None
    status, out, err, second = run("stopped", judging__steps_behind=1)
    assert status == 0 and f"after step {steps[-1]}, whose checkpoint is complete" in out, err
    assert run_contents(folder / "stopped") == whole[0] and first + second == whole[1]


def test_judge_is_asked_in_one_thread_at_a_time_and_not_during_evaluations(folder):
    config = changed_config(
        folder,
        judge__name="test_steps_behind:Watched",
        judging__steps_behind=1,
        steps=4,
        evaluation__every_steps=1,
    )
    status, out, err = run_name(folder, "watched", config)
    assert status == 0, err
    assert not Watched.met
    assert "asked one step ahead" in out
    assert Watched.threads.count("judge") == 4 and "MainThread" in Watched.threads


def test_error_of_the_judge_ends_the_run_with_its_weights_saved(folder):
    config = changed_config(folder, judge__name="test_steps_behind:Watched", judging__steps_behind=1, steps=4)
    status, _, err = run_name(folder, "counted", config)
    before = Watched.threads.index("judge")
    Watched.reset()
    Watched.fail_at = before + 2  # the second step's pairs
    status, _, err = run_name(folder, "failed", config)
    assert status == 2 and "the server is gone; the last weights are in" in err, err
    Watched.reset()
    status, out, err = run_name(folder, "failed", config)
    assert status == 0 and "after step 1, whose checkpoint is complete" in out, err
    one, other = run_contents(folder / "counted"), run_contents(folder / "failed")
    assert one["weights"] == other["weights"] and one["metrics"] == other["metrics"]


def test_budget_counts_what_is_under_way(folder, run):
    """Of equal budgets the run makes as many steps as without it, and no more queries."""
    ends = {}
    for behind in (0, 1):
        changes = {
            "judging__max_queries": 28,
            "judging__steps_behind": behind,
            "evaluation__judge": {"name": "fakes:LongerText"},
        }
        status, out, err, _ = run(f"budget_{behind}", **changes)
        assert status == 0 and "judging.max_queries is 28" in out, err
        ends[behind] = run_contents(folder / f"budget_{behind}")["result"]
    assert ends[0]["steps"] == ends[1]["steps"] < STEPS
    assert ends[1]["judge_queries"] <= 28
    logged = (folder / "budget_1" / "pairs.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["shown"] is not None for line in logged) == ends[1]["judge_queries"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judging__steps_behind": 2}, "judging.steps_behind is 2, must be 0 or 1"),
        (
            {"loss__candidates": 2, "loss__pairing": "uncertain"},
            "judging.steps_behind is 1, but loss.pairing is 'uncertain'",
        ),
        (
            {"model__reference_every_steps": 2},
            "judging.steps_behind is 1, but model.reference_every_steps copies",
        ),
    ],
)
def test_setting_that_does_not_fit_is_refused_in_one_line(folder, changes, words):
    config = changed_config(folder, **{"judging__steps_behind": 1, **changes})
    status, _, err = run_name(folder, "refused", config)
    assert status == 2 and words in err and err.count("\n") == 1, err
    assert not (folder / "refused").exists()


# ---- the thread -------------------------------------------------------------------------------------


def test_background_calls_follow_each_other_and_raise_where_they_are_waited_for():
    order, go = [], threading.Event()

    def first():
        go.wait(5)
        order.append(1)
        return "one"

    def second():
        order.append(2)
        raise KeyError("two")

    one = BackgroundCall(first)
    two = BackgroundCall(second, after=one)
    assert not one.ended and not two.ended
    go.set()
    with pytest.raises(KeyError, match="two"):
        two.wait(lambda _: None)
    assert order == [1, 2] and one.ended and one.wait(lambda _: None) == "one"


def test_signal_ends_a_wait_for_a_thread_that_waits_for_a_person():
    go, waiting = threading.Event(), threading.Event()

    def person():
        with interruptible():
            waiting.set()
            go.wait(20)

    with Signals() as signals, signals.deferred():
        call = BackgroundCall(person)
        waiting.wait(5)
        signal.raise_signal(signal.SIGTERM)  # held back in this thread
        for waited_for in (call, BackgroundCall(person, after=call)):
            with pytest.raises(Stopped, match="stopped by SIGTERM"):
                waited_for.wait(signals.check_wait)
        go.set()
        call.wait(lambda _: None)
        signals.check_wait(None)  # nobody waits for a person any more
