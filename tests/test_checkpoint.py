"""Checkpoints: what comes back is bit for bit what was saved, or one line that names the file."""

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from fake_state import abstract, assert_bits_equal, failure, make_state
from file_helpers import files_of_at_most

from xpo_jax.checkpointing import manifest
from xpo_jax.checkpointing.checkpoint import CheckpointError, Checkpoints, latest, restore, save, verify
from xpo_jax.checkpointing.manifest import MANIFEST
from xpo_jax.checkpointing.retention import best_step, kept_steps, steps_in


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save(path, 7, make_state(), {"queries": 12, "best": [0.1, None]})
    return path


@pytest.fixture
def path(saved, tmp_path):
    """Return a copy that a test may damage."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_restore_returns_the_saved_bits(saved):
    state = make_state()
    back, extra = restore(saved, 7, abstract(state))
    assert_bits_equal(back, state)
    assert extra == {"queries": 12, "best": [0.1, None]}
    assert latest(saved) == 7


def test_restore_into_other_shardings_returns_the_saved_bits(saved):
    """What is saved from one device is restored over two, and what is saved from these is restored on one."""
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=over if a.shape[:1] == (2,) else whole),
        abstract(make_state()),
    )
    back, _ = restore(saved, 7, like)
    assert_bits_equal(back, make_state())
    assert all(
        b.sharding == a.sharding for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(back), strict=True)
    )
    kernel = back.params["layers"]["q"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(1, 8, 4), (1, 8, 4)]


def test_save_sharded_state_restores_on_one_device(tmp_path):
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    state = make_state()
    params = {**state.params, "norm": jax.device_put(state.params["norm"], over)}
    save(tmp_path, 0, state._replace(params=params), {})
    assert_bits_equal(restore(tmp_path, 0, abstract(state))[0], state)


def test_manifest_has_the_format_of_sha256sum(saved):
    folder = saved / "7"
    lines = (folder / MANIFEST).read_text().splitlines()
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    assert {line[66:] for line in lines} == present and "checkpoint.json" in present
    for line in lines:
        assert line[:66] == hashlib.sha256((folder / line[66:]).read_bytes()).hexdigest() + "  "


def test_verify_any_flipped_bit_is_named(path):
    folder = path / "7"
    for name in [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]:
        whole = (folder / name).read_bytes()
        if not whole:
            continue
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 16
        (folder / name).write_bytes(damaged)
        message = failure(verify, path, 7)
        if name != MANIFEST:  # which makes another file look wrong
            assert message == (
                f"{folder / name}: is damaged (its SHA-256 differs); delete that checkpoint to use an older one"
            )
        assert failure(restore, path, 7, abstract(make_state())) == message
        (folder / name).write_bytes(whole)
    verify(path, 7)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_verify_truncated_missing_foreign_or_no_manifest_is_named(path):
    folder = path / "7"
    file = largest(folder / "state")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert failure(verify, path, 7).startswith(f"{file}: is damaged (its SHA-256 differs); ")
    file.unlink()
    assert failure(verify, path, 7).startswith(f"{file}: is missing; delete that checkpoint")
    file.write_bytes(whole)
    (folder / "state" / "notes.txt").touch()
    assert failure(verify, path, 7).startswith(
        f"{folder}/state/notes.txt: is not a file of this checkpoint; remove it"
    )
    (folder / "state" / "notes.txt").unlink()
    verify(path, 7)
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(lines[:-1]))
    assert "is not a file of this checkpoint" in failure(verify, path, 7)
    (folder / MANIFEST).unlink()
    assert failure(restore, path, 7, abstract(make_state())) == (
        f"{folder / MANIFEST}: is missing, so the checkpoint cannot be verified;"
        " delete that checkpoint to use an older one"
    )


def test_latest_passes_over_what_does_not_verify(path, caplog):
    shutil.copytree(path / "7", path / "8")
    (path / "8" / "checkpoint.json").write_text("{}")
    (path / "10").mkdir()
    (path / "notes").mkdir()
    (path / "99").touch()
    assert latest(path) == 7
    assert [message.split(":")[0] for message in caplog.messages] == [
        "checkpoint 10 is passed over",
        "checkpoint 8 is passed over",
    ]
    assert str(path / "8" / "checkpoint.json") in caplog.messages[1]
    assert latest(path / "none") is None


def test_restore_checkpoint_of_another_step_is_refused(path):
    (path / "7").rename(path / "8")
    assert failure(restore, path, 8, abstract(make_state())) == (
        f"{path}/8: is not the checkpoint of step 8; put back the right folder"
    )


def test_restore_other_dtypes_shapes_or_leaves_are_refused(saved):
    like = abstract(make_state())

    def message(**change):
        return failure(restore, saved, 7, like._replace(params={**like.params, **change}))

    def leaf(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=like.step.sharding)

    beginning = f"{saved}/7: does not fit this model or optimizer "
    assert message(norm=leaf((8,), jnp.float32)) == (
        beginning + "(params/norm is bfloat16[8] in the checkpoint, float32[8] here); use its config"
    )
    assert "(params/norm is bfloat16[8] in the checkpoint, bfloat16[4,2] here)" in message(
        norm=leaf((4, 2), jnp.bfloat16)
    )
    assert "(params/more is absent in the checkpoint, float32[] here)" in message(more=leaf((), jnp.float32))
    without = {name: leaf for name, leaf in like.params.items() if name != "norm"}
    assert "(params/norm is bfloat16[8] in the checkpoint, absent here)" in failure(
        restore, saved, 7, like._replace(params=without)
    )
    other = abstract(optax.sgd(0.1, momentum=0.9).init(make_state().params))
    assert failure(restore, saved, 7, like._replace(opt_state=other)).endswith(" more); use its config")
    bare = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
    assert failure(restore, saved, 7, bare).endswith("7: step has no sharding; give one for each leaf")


# Orbax closes its event loop while writes of other arrays still fail; Python 3.12 mentions each.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_save_failed_write_is_one_line_and_leaves_nothing(tmp_path, capfd, caplog):
    state = make_state()
    big = state._replace(
        params={"w": jnp.asarray(np.random.default_rng(0).normal(size=(100, 100)), jnp.float32)}
    )
    with files_of_at_most(20_000):
        message = failure(save, tmp_path, 3, big, {})
    assert message.startswith(f"{tmp_path}/3: cannot be saved (") and "File too large" in message
    assert message.endswith("; free space or fix the permissions")
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, 2, state, {})
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    with files_of_at_most(20_000):  # and in the background: raised by the next call
        checkpoints.save(3, big, {})
        assert failure(checkpoints.save, 4, state, {})[:99] == message[:99]
    assert [p.name for p in tmp_path.iterdir()] == ["2"] and latest(tmp_path) == 2
    shutil.rmtree(tmp_path / "2")
    gc.collect()  # errors that nobody took are reported when they are collected
    assert capfd.readouterr().err == "" and caplog.messages == []
    (tmp_path / "file").touch()
    assert "Not a directory" in failure(save, tmp_path / "file", 3, state, {})
    assert "not JSON compliant" in failure(save, tmp_path, 3, state, {"best": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_save_existing_step_is_refused_unless_incomplete(path):
    state = make_state(1)
    assert failure(save, path, 7, state, {}) == f"{path}/7: already exists; delete it to save that step again"
    assert_bits_equal(restore(path, 7, abstract(state))[0], make_state(0))
    (path / "7" / MANIFEST).unlink()  # as after a kill
    assert save(path, 7, state, {"a": 1}) == path / "7"
    back, extra = restore(path, 7, abstract(state))
    assert_bits_equal(back, state)
    assert extra == {"a": 1}
    assert json.loads((path / "7" / "checkpoint.json").read_text())["leaves"]["params/norm"] == "bfloat16[8]"


# ---- in the background --------------------------------------------------------------------------


def steps(path):
    return sorted(int(folder.name) for folder in path.iterdir())


@pytest.fixture
def gate(monkeypatch):
    """Yield an event that sealing waits for."""
    opened, seal = threading.Event(), manifest.seal

    def wait_and_seal(folder):
        assert opened.wait(60)
        seal(folder)

    monkeypatch.setattr(manifest, "seal", wait_and_seal)
    yield opened
    opened.set()


def test_save_returns_early_and_its_buffers_may_be_donated(tmp_path, gate):
    state, extra = make_state(), {"queries": 1}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 9, s), donate_argnums=0)
    host = state.skipped
    state = state._replace(skipped=np.array(1, np.int32))
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(7, state, extra)
        params = jax.block_until_ready(overwrite(state.params))
        state.skipped[...] = 5
        extra["queries"] = 2
        assert latest(tmp_path) is None
        gate.set()
        checkpoints.wait()
        assert latest(tmp_path) == 7
    back, extra = restore(tmp_path, 7, abstract(make_state()))
    assert_bits_equal(back, make_state()._replace(skipped=host))
    assert extra == {"queries": 1}
    assert (np.asarray(params["zeros"]) == 9).all()


def test_save_waits_for_the_one_before(tmp_path, gate):
    with Checkpoints(tmp_path, keep_last=None) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        second = threading.Thread(target=lambda: checkpoints.save(2, make_state(2), {}))
        second.start()
        second.join(0.2)
        assert second.is_alive() and steps(tmp_path) == [1]
        gate.set()
        second.join()
    assert latest(tmp_path) == 2 and steps(tmp_path) == [1, 2]


def fails_in_the_background(tmp_path, monkeypatch, caplog, then):
    """Let the sealing of a save fail in the background; its error must be raised by `then`."""

    def full(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "seal", full)
        checkpoints = Checkpoints(tmp_path, keep_last=1)
        checkpoints.save(2, make_state(2), {})
        checkpoints._thread.join()
    with pytest.raises(CheckpointError) as caught:
        then(checkpoints)
    assert str(caught.value) == (
        f"{tmp_path}/2: cannot be saved ([Errno 28] No space left on device); free space or fix the permissions"
    )
    checkpoints.wait()  # raised once
    assert steps(tmp_path) == [1]  # nothing older is removed for one that is not complete


def test_checkpoints_background_error_is_raised_by_the_next_call(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, make_state(1), {})

    def leave_block(checkpoints):
        with checkpoints:
            pass

    for then in (
        lambda checkpoints: checkpoints.save(3, make_state(3), {}),
        lambda checkpoints: checkpoints.wait(),
        lambda checkpoints: checkpoints.close(),
        leave_block,
    ):
        fails_in_the_background(tmp_path, monkeypatch, caplog, then)
    assert latest(tmp_path) == 1 and caplog.messages == []

    def broken(folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "seal", broken)
    with pytest.raises(KeyError, match="judge"), Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(2, make_state(2), {})
        raise KeyError("judge")  # this one is raised; the other is not lost
    assert caplog.messages == [
        f"{tmp_path}/2: cannot be saved ([Errno 5] Input/output error); free space or fix the permissions"
    ]


def test_remove_outlasts_other_writers(saved, tmp_path, monkeypatch):
    """It also removes what other writers add meanwhile, as Orbax's do when one of them has failed."""
    folder = epath.Path(tmp_path) / "7"
    shutil.copytree(saved / "7", folder)
    rmtree, late = type(folder).rmtree, ["a", "b"]

    def written_into(self, missing_ok=False):
        rmtree(self, missing_ok)
        if late:
            self.mkdir()
            (self / late.pop()).touch()

    monkeypatch.setattr(type(folder), "rmtree", written_into)
    manifest.remove(folder)
    assert list(tmp_path.iterdir()) == late == []
    manifest.remove(folder)  # of one that is gone


# ---- retention ----------------------------------------------------------------------------------


def test_best_by_another_criterion_is_unknown(tmp_path):
    """A run that resumes with another `checkpoint.export` does not compare a win rate with a reward."""
    for step, score, criterion in (
        (1, 0.9, "win rate"),
        (2, 0.3, "reward"),
        (3, 0.2, "reward"),
        (4, None, "reward"),
    ):
        with Checkpoints(tmp_path, keep_last=None, criterion=criterion) as checkpoints:
            checkpoints.save(step, make_state(step), {}, score=score)
    assert (
        best_step(tmp_path) == 1
        and best_step(tmp_path, "reward") == 2
        and best_step(tmp_path, "other") is None
    )
    with Checkpoints(tmp_path, keep_last=1, criterion="reward") as checkpoints:
        checkpoints.save(5, make_state(5), {}, score=0.1)
    assert steps_in(tmp_path) == [2, 5]


def test_kept_steps_are_newest_multiples_and_best():
    scores = {2: 0.5, 4: None, 6: 0.75, 8: 0.75, 10: 0.7, 12: None}
    assert kept_steps(scores, keep_last=1, keep_every=None) == {8, 12}
    assert kept_steps(scores, keep_last=3, keep_every=None) == {8, 10, 12}
    assert kept_steps(scores, keep_last=1, keep_every=6) == {6, 8, 12}
    assert kept_steps(scores, keep_last=None, keep_every=None) == set(scores)
    assert kept_steps({2: None, 4: None}, keep_last=1, keep_every=None) == {4}
    assert kept_steps({}, keep_last=1, keep_every=1) == set()


def test_retention_keeps_last_best_multiples_and_held(tmp_path):
    scores = {1: 0.6, 2: None, 3: 0.4, 4: None, 5: 0.5, 6: 0.1, 7: 0.2}
    retained = {}
    for step, score in scores.items():  # as if the run were started again for each
        with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
            checkpoints.save(step, make_state(step), {}, score=score, hold=step == 3)
        retained[step] = steps(tmp_path)
    assert retained == {
        1: [1],
        2: [1, 2],
        3: [1, 2, 3],
        4: [1, 3, 4],
        5: [1, 3, 4, 5],
        6: [1, 3, 4, 5, 6],
        7: [1, 3, 4, 6, 7],
    }
    for step in retained[7]:
        assert_bits_equal(restore(tmp_path, step, abstract(make_state()))[0], make_state(step))


def test_retention_keeps_what_a_kept_one_needs(tmp_path):
    retained = {}
    for step, needs in {1: None, 2: 1, 3: 1, 4: 3, 5: 3, 6: 3}.items():
        with Checkpoints(tmp_path, keep_last=1) as checkpoints:
            checkpoints.save(step, make_state(step), {}, needs=needs)
        retained[step] = steps(tmp_path)
    assert retained == {1: [1], 2: [1, 2], 3: [1, 3], 4: [3, 4], 5: [3, 5], 6: [3, 6]}


def test_retention_removes_half_written_and_leaves_newer(tmp_path, caplog):
    """A run went back to step 2, because 4 and 9 are damaged: until they are saved again, 2 and 3 are the newest."""
    for step in (2, 4, 9):
        save(tmp_path, step, make_state(step), {})
    for step in (4, 9):
        largest(tmp_path / str(step)).write_bytes(b"")
    (tmp_path / "1" / "state").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) == 2
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(3, make_state(3), {})
        checkpoints.wait()
        assert {folder.name for folder in tmp_path.iterdir()} == {"3", "4", "9", "notes"}
        checkpoints.save(4, make_state(5), {})
    assert {folder.name for folder in tmp_path.iterdir()} == {"4", "9", "notes"}
    caplog.clear()
    assert latest(tmp_path) == 4 and len(caplog.messages) == 1
    assert_bits_equal(restore(tmp_path, 4, abstract(make_state()))[0], make_state(5))


def test_latest_passes_over_a_checkpoint_whose_reference_is_damaged(tmp_path, caplog):
    """Step 4 needs the checkpoint of step 3; if that is damaged, the run resumes from step 2, not from a later one."""
    with Checkpoints(tmp_path, keep_last=None, background=False) as checkpoints:
        for step, needs in ((1, None), (2, 1), (3, None), (4, 3)):
            checkpoints.save(step, make_state(step), {}, needs=needs)
    assert latest(tmp_path) == 4
    file = next(path for path in (tmp_path / "3" / "state").rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    caplog.clear()
    assert latest(tmp_path) == 2
    assert [message.split(" is passed over")[0] for message in caplog.messages] == [
        "checkpoint 4",
        "checkpoint 3",
    ]


def test_retention_failed_removal_is_logged_and_repeated(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, make_state(1), {})

    def read_only():
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch, Checkpoints(tmp_path, keep_last=1) as checkpoints:
        patch.setattr(manifest, "remove", lambda folder: read_only() if folder.name == "1" else None)
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
    assert caplog.messages == [
        f"{tmp_path}: older checkpoints cannot be removed ([Errno 30] Read-only file system)"
    ]
    assert latest(tmp_path) == 2
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(3, make_state(3), {})
    assert steps(tmp_path) == [3]


# ---- kill -9 ------------------------------------------------------------------------------------

KILLS = {  # the moment of the kill: the step that is complete afterwards
    "while the arrays are written": 1,
    "while Orbax commits": 1,
    "before the manifest": 1,
    "while the manifest is written": 1,
    "while an old one is removed": 2,
}
CHILD = """
import os, signal, sys
import orbax.checkpoint as ocp
from etils import epath
from fake_state import make_state
from test_checkpoint import KILLS
from xpo_jax.io import files
from xpo_jax.checkpointing import manifest
from xpo_jax.checkpointing.checkpoint import Checkpoints, save

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def run(path, where):
    save(path, 1, make_state(1), {"step": 1})
    if where == "while the arrays are written":
        ocp.type_handlers.ArrayHandler.serialize = kill
    elif where == "while Orbax commits":
        ocp.PyTreeCheckpointHandler.finalize = kill
    elif where == "before the manifest":
        manifest.seal = kill
    elif where == "while the manifest is written":
        files.os.replace = lambda old, new: kill() if str(new).endswith("sha256") else os.rename(old, new)
    elif where == "while an old one is removed":
        type(epath.Path(path)).rmtree = kill
    with Checkpoints(path, keep_last=1) as checkpoints:
        checkpoints.save(2, make_state(2), {"step": 2})

for where, path in zip(KILLS, sys.argv[1:], strict=True):
    child = os.fork()  # imports take longest; no backend of JAX has started yet
    if child == 0:
        run(path, where)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else f"ended with {status}: {where}")
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    folders = {where: tmp_path_factory.mktemp("killed") for where in KILLS}
    command = [sys.executable, "-c", CHILD, *folders.values()]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split("\n")[:-1] == [str(int(signal.SIGKILL))] * len(KILLS), ended.stderr
    return folders


@pytest.mark.parametrize("where", KILLS)
def test_save_killed_process_leaves_a_complete_checkpoint(killed, where, caplog):
    path, whole = killed[where], KILLS[where]
    assert latest(path) == whole and steps(path) == [1, 2]
    assert [(path / str(step) / MANIFEST).exists() for step in (1, 2)] == [whole == 1, whole == 2]
    assert [message.split(":")[0] for message in caplog.messages] == ["checkpoint 2 is passed over"] * (
        2 - whole
    )
    state, extra = restore(path, whole, abstract(make_state()))
    assert_bits_equal(state, make_state(whole))
    assert extra == {"step": whole}
    with Checkpoints(path, keep_last=1) as checkpoints:  # the same command again
        checkpoints.save(whole + 1, make_state(5), {})
    assert latest(path) == whole + 1 and steps(path) == [whole + 1]
    assert_bits_equal(restore(path, whole + 1, abstract(make_state()))[0], make_state(5))
