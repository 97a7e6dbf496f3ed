"""A run that is interrupted and resumed produces the same bits as an uninterrupted run."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fakes import Counting
from shared_fixtures import STEPS
from tiny_run import killed_at_update, run_contents

from xpo_jax.algorithm.programs import fingerprint
from xpo_jax.checkpointing import checkpoint
from xpo_jax.experiment.verdict_journal import JOURNAL, Journal, cut_metrics, cut_pairs
from xpo_jax.runtime.interruption import STUCK, Signals, Stopped, Watchdog

pytestmark = pytest.mark.usefixtures("one_device")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def reset_judge():
    Counting.reset()


@pytest.fixture(scope="module")
def whole(run, folder):
    """Return the files of an uninterrupted run, and the number of its comparisons."""
    status, _, err, queries = run("whole")
    assert status == 0, err
    return run_contents(folder / "whole"), queries


@pytest.mark.parametrize("at", [2, 5])
def test_resume_after_a_kill_gives_the_same_bits(run, whole, folder, at):
    """The kill comes at an update, after the verdicts; the last checkpoint is one step older, or not older."""
    expected, queries = whole
    with killed_at_update(at):
        run(f"killed_{at}")
    first = len(Counting.comparisons)
    path = folder / f"killed_{at}"
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "torn')  # as a kill in the middle of a write leaves it
    status, out, err, second = run(f"killed_{at}")
    assert status == 0, err
    assert f"after step {at - at % 2}, whose checkpoint is complete" in out
    assert run_contents(path) == expected
    assert first + second == queries  # no verdict was paid for twice
    assert not (path / JOURNAL).exists()
    environment = json.loads((path / "environment.json").read_text())
    assert len(environment["earlier"]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal_gives_the_same_bits(run, whole, folder, number):
    expected, queries = whole
    name = f"stopped_{number}"
    Counting.signal_at = (18, number)  # the first evaluation has 2 x 8 batches, so this is in the third step
    status, _, err, first = run(name)
    assert status == 128 + number
    word = signal.Signals(number).name
    assert err.rstrip("\n").split("\n")[-1].startswith(f"xpo_jax: stopped by {word} after step ")
    steps = sorted(int(f.name) for f in (folder / name / "checkpoints").iterdir())
    assert f"after step {steps[-1]} of {STEPS}, which is saved; run the same command to resume" in err
    Counting.signal_at = None
    status, out, err, second = run(name)
    assert status == 0, err
    assert f"after step {steps[-1]}, whose checkpoint is complete" in out
    assert run_contents(folder / name) == expected and first + second == queries


def test_resume_after_a_signal_before_the_first_checkpoint_gives_the_same_bits(run, whole, folder):
    Counting.signal_at = (2, signal.SIGTERM)  # in the first evaluation
    status, _, err, _ = run("early")
    assert status == 143 and "xpo_jax: stopped by SIGTERM; run the same command to resume" in err
    Counting.signal_at = None
    assert run("early")[0] == 0
    assert run_contents(folder / "early") == whole[0]


def test_resume_after_a_failing_judge_gives_the_same_bits(run, whole, folder):
    """The failure ends the run with its state saved; once the judge works again, nothing shows the failure."""
    expected, _ = whole
    Counting.fail_at = 20
    status, _, err, _ = run("out", judging__max_failed_batches=1)
    assert status == 2 and "the judge is out" in err and "the last weights are in" in err
    Counting.fail_at = None
    status, _, err, _ = run("out", judging__max_failed_batches=1)
    assert status == 0, err
    assert run_contents(folder / "out") == expected


def test_resume_of_a_finished_run_with_more_steps_continues(run, whole, folder):
    """The bits differ from six steps at once, since the learning rate falls over all steps; but no step is missing."""
    assert run("longer", steps=4)[0] == 0
    status, out, err, _ = run("longer")
    assert status == 0, err
    assert "steps: 4 there, 6 here" in out and "after step 4" in out
    contents = run_contents(folder / "longer")
    assert [row["step"] for row in contents["metrics"]] == list(range(STEPS + 1))
    assert contents["result"]["steps"] == STEPS and len(contents["pairs"].splitlines()) == len(
        whole[0]["pairs"].splitlines()
    )
    status, _, err, _ = run("longer", steps=3)
    assert status == 2 and "is beyond the last step, 3; raise steps" in err


def test_export_best_is_the_state_of_the_best_evaluation(run, whole, folder):
    """The best evaluation is at the third or the sixth step."""
    assert run("best", checkpoint__export="best")[0] == 0
    contents = run_contents(folder / "best")
    rates = {
        name: json.loads(text)["evaluation"]["win_rate"] for name, text in contents["evaluations"].items()
    }
    best = max((3, 6), key=lambda step: (rates[f"{step}.json"], step))
    assert (
        contents["result"]["exported_step"] == best
        and contents["result"]["win_rate"] == rates[f"{best}.json"]
    )
    assert (contents["weights"] == whole[0]["weights"]) == (best == STEPS)
    assert run("third", steps=3, optimizer__schedule="constant")[0] == 0
    assert run("best_3", optimizer__schedule="constant", checkpoint__export="best")[0] == 0
    chosen = run_contents(folder / "best_3")["result"]["exported_step"]
    same = run_contents(folder / "best_3")["weights"] == run_contents(folder / "third")["weights"]
    assert same == (chosen == 3)
    assert 3 in (best, chosen), "neither shows that the last is not taken: choose another seed"


def test_resume_with_a_changed_loss_needs_accept_changes(run, folder):
    Counting.signal_at = (18, signal.SIGTERM)
    assert run("changed")[0] == 143
    Counting.signal_at = None
    status, _, err, _ = run("changed", loss__beta=0.2)
    assert status == 2 and "(loss.beta: 0.1 there, 0.2 here)" in err and "--accept-changes" in err
    status, out, err, _ = run("changed", "--accept-changes", loss__beta=0.2)
    assert status == 0, err
    assert "loss.beta: 0.1 there, 0.2 here" in out
    rows = [json.loads(line) for line in (folder / "changed" / "metrics.jsonl").read_text().splitlines()]
    betas = [row["beta"] for row in rows[1:]]
    assert betas[0] == 0.1 and betas[-1] == 0.2 and betas == sorted(betas)


def test_resume_with_another_config_asks_for_its_verdicts_again(run, folder):
    """The config may have another judge; here the pairs of the repeated step are the same."""
    with killed_at_update(4):
        run("judged_again")
    lines = (folder / "judged_again" / "pairs.jsonl").read_text().splitlines()
    paid = [json.loads(line) for line in lines]
    texts = {
        tuple(r["text"] for r in pair["responses"]) for pair in paid if pair["step"] == 4 and pair["shown"]
    }
    status, _, err, _ = run("judged_again", "--accept-changes", loss__bonus_clip=400.0)
    assert status == 0, err
    judged = {(c.a, c.b) for c in Counting.comparisons} | {(c.b, c.a) for c in Counting.comparisons}
    assert texts and texts <= judged


def test_resume_on_another_mesh_and_in_another_layout_continues(run, whole, folder):
    """The values are equal (test_checkpoint.py) but later bits are not: rounding may change a sample."""
    Counting.signal_at = (18, signal.SIGTERM)
    assert run("mesh")[0] == 143
    before = (folder / "mesh" / "pairs.jsonl").read_text()
    Counting.signal_at = None
    changed = {
        "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
        "layout__micro_batch_rows": 1,
        "layout__remat": True,
    }
    status, out, err, _ = run("mesh", **changed)
    assert status == 0, err
    assert "mesh.data: 2 there, 8 here" in out and "mesh data 8, fsdp 1, tensor 1" in out  # from one device
    assert "layout.remat: false there, true here" in out
    contents = run_contents(folder / "mesh")
    assert contents["pairs"].startswith(before) and whole[0]["pairs"].startswith(before)
    assert [row["step"] for row in contents["metrics"]] == list(range(STEPS + 1))


def test_resume_with_another_reference_is_refused(run, folder):
    Counting.signal_at = (18, signal.SIGTERM)
    assert run("reference")[0] == 143
    Counting.signal_at = None
    newest = max((folder / "reference" / "checkpoints").iterdir(), key=lambda f: int(f.name))
    path = newest / "checkpoint.json"
    stored = json.loads(path.read_text())["extra"]["reference"]
    old = path.read_bytes()
    path.write_bytes(old.replace(f'"reference": {stored}'.encode(), b'"reference": 17'))
    manifest = newest / "manifest.sha256"
    digests = [hashlib.sha256(text).hexdigest() for text in (old, path.read_bytes())]
    manifest.write_text(manifest.read_text().replace(*digests))
    status, _, err, _ = run("reference")
    assert status == 2 and "was trained with another reference (fingerprint 17 there, " in err


# ---- the parts ------------------------------------------------------------------------------------


def test_fingerprint_depends_on_bits_and_positions_but_not_on_sharding():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(4, 6)).astype(np.float32), "b": rng.normal(size=(8,)).astype(np.float32)}

    def by_hand(tree):
        total = 0
        for number, leaf in enumerate(jax.tree.leaves(tree)):
            for place, bits in enumerate(leaf.view(np.uint32).ravel().tolist()):
                at = (number * leaf.size + place) % 2**32
                total += bits * (at * 2654435761 % 2**32 | 1)
        return total % 2**32

    value = int(jax.jit(fingerprint)(tree))
    assert value == by_hand(tree)
    flipped = {**tree, "b": tree["b"].copy()}
    flipped["b"].view(np.uint32)[5] ^= 1
    swapped = {**tree, "a": tree["a"][::-1].copy()}
    assert len({value, int(jax.jit(fingerprint)(flipped)), int(jax.jit(fingerprint)(swapped))}) == 3
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    assert int(jax.jit(fingerprint)({**tree, "b": jax.device_put(tree["b"], split)})) == value


def test_cut_metrics_keeps_the_steps_of_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(tmp_path, 3)  # none there yet
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in (0, 1, 2, 3)) + '{"step"')
    cut_metrics(tmp_path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    cut_metrics(tmp_path, -1)
    assert path.read_text() == ""


def test_cut_pairs_moves_later_steps_into_the_journal(run, whole, folder, tmp_path):
    """This happens twice, as if the run were killed again before its next checkpoint."""
    lines = whole[0]["pairs"].splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines]
    first = steps.index(2)
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    offset = len("".join(lines[:first]).encode())
    for _ in range(2):
        cut_pairs(tmp_path, 2, {"pairs.jsonl": offset})
        assert (tmp_path / "pairs.jsonl").read_text() == "".join(lines[:first])
        assert (tmp_path / JOURNAL).read_text() == "".join(lines[first:])
    assert len(Journal(tmp_path)) == sum(json.loads(line)["shown"] is not None for line in lines[first:])
    cut_pairs(tmp_path, 4, {"pairs.jsonl": offset})
    journal_steps = [json.loads(line)["step"] for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert min(journal_steps) == 4
    cut_pairs(tmp_path, STEPS, {"pairs.jsonl": offset})
    assert not (tmp_path / JOURNAL).exists()


def test_signals_outside_a_loop_stop_and_in_it_are_deferred():
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell starts the tests in the background
    with Signals() as signals:
        with pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.status == 143 and not caught.value.on_all_processes
    with Signals() as signals, signals.deferred():
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=lambda: Signals().__enter__())  # only the main thread may set handlers
    thread.start()
    thread.join()


def python(code, *, expect):
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ
    )
    assert process.returncode == expect, process.stderr
    return process.stderr


def test_a_second_signal_leaves_at_once():
    err = python(
        """
import signal
from xpo_jax.runtime.interruption import Signals
with Signals() as signals, signals.deferred():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    print("not reached")
""",
        expect=143,
    )
    assert err.splitlines() == [
        "xpo_jax: SIGTERM: finishing the current step, then saving; send it again to exit at once",
        "xpo_jax: SIGTERM again: exiting at once",
    ]


def test_watchdog_ends_a_stuck_step_and_prints_stacks():
    err = python(
        """
import time
from xpo_jax.runtime.interruption import Watchdog
def the_judge_that_never_answers():
    time.sleep(60)
with Watchdog(0.5) as watchdog:
    watchdog.beat("step 7")
    time.sleep(0.1)
    watchdog.beat("step 8")
    the_judge_that_never_answers()
""",
        expect=STUCK,
    )
    assert "in the_judge_that_never_answers" in err
    assert err.splitlines()[-1].startswith("xpo_jax: step 8 has taken more than 0.5 s (max_step_seconds); ")


def test_watchdog_with_heartbeats_or_off_does_nothing():
    for seconds in (60.0, None):
        with Watchdog(seconds) as watchdog:
            watchdog.beat("step 1")
            time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_uninterrupted_run_records_and_saves_what_is_due(whole, folder):
    """Every step is there once, with an evaluation every third step and the newest two of the checkpoints."""
    path = folder / "whole"
    assert [row["step"] for row in whole[0]["metrics"]] == list(range(STEPS + 1))
    evaluated = {row["step"] for row in whole[0]["metrics"] if "eval/win_rate" in row}
    assert evaluated == {0, 3, 6}
    for step in evaluated:
        recorded = json.loads((path / "evaluations" / f"{step}.json").read_text())["evaluation"]
        assert recorded["win_rate"] == whole[0]["metrics"][step]["eval/win_rate"]
    assert {f.name for f in (path / "evaluations").iterdir()} == {f"{step}.json" for step in evaluated}
    steps = sorted(int(folder.name) for folder in (path / "checkpoints").iterdir())
    assert steps == [4, 6]
    assert checkpoint.latest(path / "checkpoints") == STEPS
