"""judging.steps_behind: pairs drawn one update early, and a judge that decides on them beside the update."""

import json
import signal
import threading
import time

import numpy as np
import pytest
from fakes import Counting
from shared_fixtures import STEPS
from tiny_run import Killed, changed_config, killed_at_update, read_metrics, run_contents, run_name

from xpo_jax.experiment import session
from xpo_jax.experiment.early_samples import EarlySamples, fingerprint
from xpo_jax.judges.contract import JudgeError
from xpo_jax.runtime.background import BackgroundCall
from xpo_jax.runtime.interruption import Signals, Stopped, interruptible
from xpo_jax.values import Prompts, Samples

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


def test_run_that_ends_early_and_is_killed_in_its_export_resumes_to_the_same(run, folder, monkeypatch):
    """The next step's pairs were begun; they are judged and logged, and counted, though nothing learns from them."""
    early = {"judging__steps_behind": 1, "evaluation__stop_kl": 1e-9, "optimizer__learning_rate": 0.3}
    early |= {"optimizer__warmup_steps": 0, "evaluation__judge": {"name": "fakes:LongerText"}}
    assert run("early", **early)[0] == 0
    expected = run_contents(folder / "early")
    assert expected["result"]["steps"] == 3 and max(texts(folder / "early")) == 3

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(session, "export", killed)
        run("early_killed", **early)
    assert run("early_killed", **early)[0] == 0
    assert run_contents(folder / "early_killed") == expected


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


# ---- what a checkpoint keeps ------------------------------------------------------------------------


def test_early_samples_come_back_as_they_were_through_json():
    rng = np.random.default_rng(0)
    samples = tuple(
        Samples(rng.integers(0, 99, (6, 4), np.int32), np.int32([4, 1, 2, 3, 4, 4]), rng.random(6) < 0.5)
        for _ in range(2)
    )
    early = EarlySamples(7, "a hash", samples)
    back = EarlySamples.decoded(json.loads(json.dumps(early.encoded())))
    assert (back.step, back.prompts) == (7, "a hash") and EarlySamples.decoded({}) is None
    for one, other in zip(early.samples, back.samples, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_fingerprint_is_that_of_what_was_drawn_for():
    tokens, lengths = np.int32([[1, 2, 9], [3, 4, 5]]), np.int32([2, 3])
    prompts = Prompts(({}, {}), ((), ()), tokens, lengths, np.int32([0, 1]), np.array([True, True]))
    first = fingerprint(prompts, 8)
    padded = prompts._replace(tokens=np.int32([[1, 2, 0, 0], [3, 4, 5, 0]]))
    assert fingerprint(padded, 8) == first  # padding says nothing
    for other in (
        fingerprint(prompts, 9),
        fingerprint(prompts._replace(tokens=np.int32([[1, 7, 9], [3, 4, 5]])), 8),
        fingerprint(prompts._replace(valid=np.array([True, False])), 8),
        fingerprint(prompts._replace(lengths=np.int32([3, 2])), 8),
    ):
        assert other != first


def test_accepted_change_of_the_prompts_draws_again(run, folder):
    """Samples that were drawn early for other prompts are not used for these."""
    with killed_at_update(3):
        run("changed", judging__steps_behind=1)
    time.sleep(0.3)
    status, _, err, _ = run("changed", "--accept-changes", judging__steps_behind=1, batch_size=4)
    assert status == 0, err
    assert len(texts(folder / "changed")[3]) == 4
