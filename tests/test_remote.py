"""Run directories in a bucket: checkpoints written there, the other files mirrored, one run at a time."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from etils import epath
from fake_gcs import bucket
from fake_state import abstract, assert_bits_equal, failure, make_state
from fakes import LongerText
from tiny_run import run_main, tiny_config, write_config

from xpo_jax.checkpointing.checkpoint import Checkpoints, latest, restore, save, verify
from xpo_jax.experiment.bucket_lease import LEASE, Lease, RemoteError
from xpo_jax.experiment.bucket_mirror import Mirror
from xpo_jax.io import paths

WHO = {"host": "a", "pid": 1}


@pytest.fixture
def remote(request):
    """Return gs://bucket/<test> and the objects below it by name."""
    server, name = bucket(), request.node.name.split("[")[0]

    pytest.importorskip("gcsfs")  # which reads the bucket's address once, at import

    class RemoteFolder:
        path = f"gs://bucket/{name}"

        @property
        def objects(self):
            objects = {n: content for n, (content, _) in server.objects.items() if n.startswith(f"{name}/")}
            return {n.removeprefix(f"{name}/"): content for n, content in objects.items()}

        def put(self, file, content):
            server.put(f"{name}/{file}", content, None)

    yield RemoteFolder()
    server.full = False


# ---- checkpoints --------------------------------------------------------------------------------


def test_checkpoints_in_a_bucket(remote, caplog):
    path = f"{remote.path}/checkpoints"
    with Checkpoints(path, keep_last=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"step": step}, score=0.5 if step == 1 else 0.25)
    assert latest(path) == 3
    assert {name.split("/")[1] for name in remote.objects} == {"1", "3"}
    for step in (1, 3):
        state, extra = restore(path, step, abstract(make_state()))
        assert_bits_equal(state, make_state(step))
        assert extra == {"step": step}
    lines = remote.objects["checkpoints/3/manifest.sha256"].decode().splitlines()
    assert {f"checkpoints/3/{line[66:]}" for line in lines} | {"checkpoints/3/manifest.sha256"} == {
        name for name in remote.objects if name.startswith("checkpoints/3/")
    }
    assert (
        failure(save, path, 3, make_state(), {})
        == f"{path}/3: already exists; delete it to save that step again"
    )

    largest = max(
        remote.objects,
        key=lambda n: len(remote.objects[n]) * n.startswith("checkpoints/3/state"),
    )
    content = bytearray(remote.objects[largest])
    content[len(content) // 2] ^= 16
    remote.put(largest, bytes(content))
    assert failure(verify, path, 3).startswith(f"{remote.path}/{largest}: is damaged")
    remote.put("checkpoints/1/state/notes.txt", b"")
    assert failure(verify, path, 1).startswith(f"{path}/1/state/notes.txt: is not a file of this checkpoint")
    assert latest(path) is None and len(caplog.messages) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as in test_checkpoint.py
def test_a_bucket_that_cannot_be_written(remote):
    bucket().full = True
    message = failure(save, f"{remote.path}/checkpoints", 1, make_state(), {})
    assert message.startswith(f"{remote.path}/checkpoints/1: cannot be saved (") and "\n" not in message
    assert remote.objects == {}


def test_absolute_without_gcsfs_names_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    paths._prepare_buckets.cache_clear()
    with pytest.raises(ValueError, match=r"^gs:// paths need gcsfs; install xpo-jax\[gcs\]$"):
        paths.absolute("gs://bucket/run")
    assert str(paths.absolute("run")) == os.path.abspath("run")


# ---- the mirror -----------------------------------------------------------------------------------


def write(folder, **files):
    for name, text in files.items():
        file = Path(folder) / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in Path(folder).rglob("*")
        if file.is_file()
    }


def test_what_changed_is_pushed_and_pulled_elsewhere(remote, tmp_path):
    here, later = tmp_path / "here", tmp_path / "later"
    mirror = Mirror(remote.path, here)
    mirror.pull()  # of a run that is not there yet
    write(
        here,
        result_dot_json="{}",
        xpo_jax_run_dot_json="{}",
        metrics_dot_jsonl="1\n",
        export__a_dot_bin="x" * 10**6,
    )
    write(here, checkpoints__1__x="no", _dot_config_dot_json_dot_tmp="no", samples__held_out_dot_md="|ü|")
    order = ["xpo_jax_run.json", "export/a.bin", "metrics.jsonl", "samples/held_out.md", "result.json"]
    assert mirror.push() == order
    assert mirror.push() == []
    with open(here / "metrics.jsonl", "a") as file:
        file.write("2\n")
    assert mirror.push() == ["metrics.jsonl"]
    (here / "samples" / "held_out.md").unlink()
    assert mirror.push() == []
    expected = {**contents(here), "samples/held_out.md": "|ü|".encode()}
    del expected["checkpoints/1/x"], expected[".config.json.tmp"]
    assert remote.objects == expected

    remote.put("checkpoints/1/state/d", b"large")
    remote.put(LEASE, b"{}")
    second = Mirror(remote.path, later)
    second.pull()
    assert contents(later) == expected
    assert second.push() == []
    (later / "metrics.jsonl").write_text("1\n")  # cut back
    assert second.push() == ["metrics.jsonl"]
    assert remote.objects["metrics.jsonl"] == b"1\n"


def test_a_push_that_fails_is_done_again(remote, tmp_path):
    write(tmp_path, metrics_dot_jsonl="1\n")
    mirror = Mirror(remote.path, tmp_path)
    bucket().full = True
    with pytest.raises(RemoteError) as caught:
        mirror.push()
    assert str(caught.value).startswith(f"{remote.path}/metrics.jsonl: cannot be written (")
    assert "\n" not in str(caught.value)
    bucket().full = False
    assert mirror.push() == ["metrics.jsonl"] and remote.objects == {"metrics.jsonl": b"1\n"}


def test_no_name_leads_out_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    mirror = Mirror(tmp_path / "there", tmp_path / "here")
    monkeypatch.setattr(mirror, "_remote_names", lambda: ["../stolen"])
    with pytest.raises(RemoteError, match=r"there/../stolen: leads out of its folder; remove that object$"):
        mirror.pull()
    assert not (tmp_path / "stolen").exists()


# ---- the lease --------------------------------------------------------------------------------------


def refusal(path, **options):
    with pytest.raises(RemoteError) as caught:
        Lease(path, {"host": "b", "pid": 2}, **options)
    return str(caught.value)


@pytest.mark.parametrize("where", ["in a bucket", "in a folder"])
def test_one_run_at_a_time(request, tmp_path, where):
    path = str(tmp_path) if where == "in a folder" else request.getfixturevalue("remote").path
    with Lease(path, WHO, seconds=1000) as first:
        message = refusal(path, seconds=1000)
        assert message.startswith(f"{path}: is in use by process 1 on a, last heard of ")
        assert message.endswith(" s") and "\n" not in message
        first.check()
    with Lease(path, WHO):
        pass
    assert not (epath.Path(path) / LEASE).exists()


def test_a_dead_one_is_taken_over_and_learns_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Lease, "_renew", lambda self: None)  # a process that is stopped
    first = Lease(tmp_path, WHO, seconds=0.2)
    time.sleep(0.3)
    second = Lease(tmp_path, {"host": "b", "pid": 2}, seconds=0.2)
    monkeypatch.undo()
    turns = iter((False, True))
    first._released.wait = lambda seconds: next(turns)
    first._renew()  # resumes
    with pytest.raises(RemoteError, match="was taken over by another run, so this one ends$"):
        first.check()
    first.release()  # it leaves another run's lease alone
    assert json.loads((tmp_path / LEASE).read_text())["host"] == "b"
    second.check()


def test_of_two_that_find_it_free_one_gets_it(tmp_path, monkeypatch):
    write_lease = Lease._write

    def late(self, generation):
        monkeypatch.setattr(Lease, "_write", write_lease)
        Lease(tmp_path, WHO)  # between the other's read and write
        return write_lease(self, generation)

    monkeypatch.setattr(Lease, "_write", late)
    assert (
        refusal(tmp_path) == f"{tmp_path}: another run was faster to take it; give another --config.run_dir"
    )


def test_it_is_renewed_and_an_answer_that_was_lost_does_no_harm(tmp_path, monkeypatch):
    write_lease, answers = Lease._write, []

    def unheard(self, generation):
        answers.append(write_lease(self, generation))
        return b"" if len(answers) == 3 else answers[-1]

    monkeypatch.setattr(Lease, "_write", unheard)
    with Lease(tmp_path, WHO, seconds=0.4) as lease:
        until = time.monotonic() + 20
        while len(answers) < 6 and time.monotonic() < until:
            time.sleep(0.02)
        assert len(answers) >= 6 and refusal(tmp_path, seconds=1000).endswith(" s")
        lease.check()


def test_a_bucket_that_is_out_of_reach(monkeypatch, tmp_path):
    with Lease(tmp_path, WHO, seconds=0.2) as lease:

        def unreachable(self, generation):
            raise ValueError("UNAVAILABLE: no\nroute")

        monkeypatch.setattr(Lease, "_write", unreachable)
        lease._thread.join(20)
        with pytest.raises(
            RemoteError, match=r"cannot be renewed \(UNAVAILABLE: no route\); fix the network$"
        ):
            lease.check()
    assert refusal(tmp_path / "b") == (
        f"{tmp_path}/b/{LEASE}: cannot be used (UNAVAILABLE: no route); fix the permissions or the network"
    )


# ---- a whole run ----------------------------------------------------------------------------------


def test_a_run_in_a_bucket_resumes(remote, tmp_path, one_device):
    """Stopped by a signal and started again, it leaves the same files as a run on a disk."""
    config = tiny_config(tmp_path)
    config.run_dir, config.checkpoint.every_steps = remote.path, 2
    config.judge.name = "test_remote:StopsOnce"
    spec = write_config(tmp_path / "config.py", config)
    StopsOnce.calls = 0
    status, out, err = run_main([f"--config={spec}"])
    assert status == 143, err
    first = remote.objects
    assert LEASE not in first and "result.json" not in first
    newest = max(int(name.split("/")[1]) for name in first if name.startswith("checkpoints/"))
    lines = first["metrics.jsonl"].decode().splitlines()
    assert json.loads(lines[-1])["step"] >= newest > 0 and f" {remote.path}\n" in out
    status, out, err = run_main([f"--config={spec}"])
    assert status == 0, err
    assert f"after step {newest}, whose checkpoint is complete" in out
    result = json.loads(out.splitlines()[-1])
    assert (result["run_dir"], result["export"]) == (remote.path, f"{remote.path}/export")
    assert json.loads(remote.objects["result.json"]) == result
    config.run_dir, StopsOnce.calls = str(tmp_path / "on_a_disk"), 99
    disk = run_main([f"--config={write_config(tmp_path / 'disk.py', config)}"])
    assert disk[0] == 0
    again = run_main([f"--config={spec}"])
    for name in ("pairs.jsonl", "samples/held_out.md", "export/model.safetensors"):
        assert remote.objects[name] == (tmp_path / "on_a_disk" / name).read_bytes(), name
    assert again[0] == 0 and f"{remote.path} holds this run, finished" in again[1]


class StopsOnce(LongerText):
    """Receives SIGTERM while it judges for the 10th time, which is in a step, and never again."""

    calls = 0

    def __call__(self, comparisons):
        type(self).calls += 1
        if type(self).calls == 10:
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(comparisons)


def test_a_folder_that_is_no_run_is_not_fetched(remote, tmp_path):
    remote.put("notes.txt", b"mine")
    with pytest.raises(RemoteError) as caught:
        Mirror(remote.path, tmp_path).pull()
    assert str(caught.value) == (
        f"{remote.path}: is not empty and not a run of xpo_jax (it holds notes.txt); give another --config.run_dir"
    )
    assert list(tmp_path.iterdir()) == []
