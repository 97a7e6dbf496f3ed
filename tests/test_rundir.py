"""The run directory: what is created, recognised, refused, and removed again."""

import json
import os
import signal
import subprocess
import sys

import pytest
from file_helpers import files_of_at_most, strict

from xpo_jax.experiment import environment, run_folder
from xpo_jax.experiment.environment import redact
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.run_folder import MARKER

CONFIG = '{"loss": {"alpha": 1e-05, "kind": "xpo"}, "run_dir": "runs/a", "seed": 0}'


def tree(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def refusal(path, config=CONFIG):
    with pytest.raises(ValueError) as caught:
        RunDir.open(path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run(tmp_path):
    path = tmp_path / "a" / "b"
    with RunDir.open(path, CONFIG) as run:
        assert run.path == path
        assert run.result is None
        assert tree(path) == ["config.json", "inputs.json", MARKER]
        assert (path / "config.json").read_text() == CONFIG + "\n"
        assert json.loads((path / MARKER).read_text())["format"] == "xpo_jax run directory"


def test_an_empty_folder_serves_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with RunDir.open("~/empty", CONFIG) as run:
        assert run.path == tmp_path / "empty"


def test_a_finished_run_says_so(tmp_path):
    with RunDir.open(tmp_path / "a", CONFIG) as run:
        run.finish({"win_rate": 0.75, "kl": float("nan")})
        assert run.result == {"win_rate": 0.75, "kl": None}
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = CONFIG.replace("runs/a", "moved")
    with RunDir.open(tmp_path / "moved", json.dumps(json.loads(moved), indent=4)) as run:
        assert run.result == {"win_rate": 0.75, "kl": None}


def test_an_unfinished_run_is_opened_again(tmp_path):
    with RunDir.open(tmp_path, CONFIG) as run:
        (tmp_path / "metrics.jsonl").touch()
        fixed = run.fixed
    other = CONFIG.replace("xpo", "ipo")
    before = tree(tmp_path)
    assert refusal(tmp_path, other) == (
        f'{tmp_path}: is a run of another config (loss.kind: "xpo" there, "ipo" here); give another --config.run_dir,'
        " or add --accept-changes to resume with this config"
    )
    assert tree(tmp_path) == before and (tmp_path / "config.json").read_text() == CONFIG + "\n"
    with RunDir.open(tmp_path, CONFIG) as run:
        assert (run.result, run.changes, run.fixed) == (None, (), fixed)
    with RunDir.open(tmp_path, other, accept_changes=True) as run:
        assert run.changes == ('loss.kind: "xpo" there, "ipo" here',) and run.fixed != fixed
    assert (tmp_path / "config.json").read_text() == other + "\n"


def test_a_run_continues_with_changed_fields_that_may_change(tmp_path):
    first = json.loads(CONFIG) | {"steps": 4, "logging": {"tensorboard": False}, "mesh": {"data": 1}}
    with RunDir.open(tmp_path, json.dumps(first)) as run:
        fixed = run.fixed
        (tmp_path / "metrics.jsonl").touch()
        run.finish({"steps": 4})
    more = first | {"steps": 8}
    other = json.dumps(first | {"logging": {"tensorboard": True}})
    assert "is a run of another config (logging.tensorboard: false there, true here)" in refusal(
        tmp_path, other
    )
    with RunDir.open(tmp_path, json.dumps(more)) as run:  # a finished run continues with more steps only
        assert run.result is None and run.changes == ("steps: 4 there, 8 here",)
    assert not (tmp_path / "result.json").exists()
    changed = json.dumps(more | {"logging": {"tensorboard": True}, "mesh": {"data": 2}})
    with RunDir.open(tmp_path, changed) as run:
        assert [line.split(":")[0] for line in run.changes] == ["logging.tensorboard", "mesh.data"]
        assert run.fixed == fixed
    seed = json.dumps(more | {"seed": 1, "logging": {"tensorboard": True}, "mesh": {"data": 2}})
    assert "(seed: 0 there, 1 here)" in refusal(tmp_path, seed)


def test_a_new_field_that_is_off_keeps_no_older_run_from_resuming(tmp_path):
    with RunDir.open(tmp_path, CONFIG):
        (tmp_path / "metrics.jsonl").touch()
    newer = json.loads(CONFIG) | {"sampling": {"second_temperature": None}}
    with RunDir.open(tmp_path, json.dumps(newer)) as run:
        assert run.changes == () and run.result is None
    of_users_code = newer | {"judge": {"timeout": None}}
    assert "(judge.timeout: absent there, null here)" in refusal(tmp_path, json.dumps(of_users_code))
    newer["sampling"]["second_temperature"] = 2.0
    assert "(sampling.second_temperature: absent there, 2.0 here)" in refusal(tmp_path, json.dumps(newer))


def test_a_run_that_did_no_work_starts_again(tmp_path):
    with RunDir.open(tmp_path, CONFIG) as run:
        run.write_environment({})
        (tmp_path / ".environment.json.tmp").touch()
    other = CONFIG.replace("xpo", "dpo")
    with RunDir.open(tmp_path, other) as run:
        assert (tmp_path / "config.json").read_text() == other + "\n"
        assert run.result is None


def test_another_config(tmp_path):
    with RunDir.open(tmp_path, CONFIG) as run:
        run.finish({})
    other = '{"loss": {"alpha": 2e-05, "kind": "ipo"}, "run_dir": "x", "seed": 1, "model": {"path": "ü"}}'
    assert refusal(tmp_path, other) == (
        f"{tmp_path}: is a run of another config (loss.alpha: 1e-05 there, 2e-05 here; "
        'loss.kind: "xpo" there, "ipo" here; seed: 0 there, 1 here; and 1 more); '
        "give another --config.run_dir"
    )
    assert 'model.path: absent there, "ü" here' in refusal(
        tmp_path, CONFIG[:-1] + ', "model": {"path": "ü"}}'
    )
    assert "loss.kind: " in refusal(tmp_path, CONFIG.replace(', "kind": "xpo"', ""))


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": CONFIG, "model.safetensors": ""},  # a Hugging Face folder
        {"config.json": CONFIG},
        {"notes.txt": ""},
        {".hidden": ""},
        {MARKER: "{}", "config.json": CONFIG},
        {MARKER: "", "notes.txt": ""},
        {MARKER: "\xff not json"},
        {"result.json": "{}", "config.json": CONFIG, "environment.json": "{}"},
    ],
)
def test_a_foreign_folder_is_never_written_into(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    shown = ", ".join(sorted(files))
    assert refusal(tmp_path) == (
        f"{tmp_path}: is not empty and not a run of xpo_jax (it holds {shown}); give another --config.run_dir"
    )
    assert {p.name: p.read_text(encoding="latin-1") for p in tmp_path.iterdir()} == files


def test_another_version(tmp_path):
    (tmp_path / MARKER).write_text('{"format": "xpo_jax run directory", "version": 2}')
    assert refusal(tmp_path).startswith(f"{tmp_path}: was written by another version of xpo_jax; ")


def test_a_file_a_file_on_the_way_nothing_and_a_bucket(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"{tmp_path}/file: is not a folder; give another --config.run_dir"
    assert refusal(tmp_path / "file" / "a" / "b") == (
        f"{tmp_path}/file/a/b: cannot be created (Not a directory); give another --config.run_dir"
    )
    assert refusal(" ") == "run_dir: is empty; give a folder with --config.run_dir"
    with pytest.raises(ValueError) as caught:
        RunDir.join("s3://bucket/a", CONFIG, {})
    assert str(caught.value) == (
        "s3://bucket/a: a run directory is a folder or a gs:// path; give another --config.run_dir"
    )
    assert tree(tmp_path) == ["file"]


def test_unwritable(tmp_path, monkeypatch):
    def refuse(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # chmod does not stop root
        patch.setattr(run_folder.Path, "mkdir", refuse)
        assert refusal(tmp_path / "a") == (
            f"{tmp_path}/a: cannot be created (Permission denied); give another --config.run_dir"
        )
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "open", refuse)
        assert refusal(tmp_path / "a" / "b") == (
            f"{tmp_path}/a/b: cannot be used (Permission denied); give another --config.run_dir"
        )
    assert tree(tmp_path) == []


def test_nothing_is_left_of_a_full_disk(tmp_path):
    (tmp_path / "empty").mkdir()
    for size in (10, 200):  # too small for the marker, then for the config
        with files_of_at_most(size):
            for path in (tmp_path / "a" / "b", tmp_path / "empty"):
                with pytest.raises(ValueError, match="File too large"):
                    RunDir.open(path, json.dumps({"text": "x" * 1000}))
    assert tree(tmp_path) == ["empty"]


def test_in_use(tmp_path):
    with RunDir.open(tmp_path, CONFIG) as run:
        message = f"{tmp_path}: is in use by another process; stop it or give another --config.run_dir"
        assert refusal(tmp_path) == message
        run.write_environment({})
        assert f"is in use by another process (number {os.getpid()} on " in refusal(tmp_path)
        run.finish({})
    RunDir.open(tmp_path, CONFIG).close()


def test_the_lock_dies_with_its_process(tmp_path):
    imports = "from xpo_jax.experiment.run_directory import RunDir"
    code = f"{imports}\nrun = RunDir.open({str(tmp_path)!r}, {CONFIG!r})\nprint(flush=True)"
    command = [sys.executable, "-c", code + "\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert "is in use by another process" in refusal(tmp_path)
        process.send_signal(signal.SIGKILL)
    RunDir.open(tmp_path, CONFIG).close()


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sentinel-1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    arguments = ["main.py", "--config.judge.url=https://me:sentinel-2@host/v1?key=sentinel-3"]
    monkeypatch.setattr(
        sys, "argv", [*arguments, "--config.judge.api_key=sentinel-4", "--config.a.max_tokens=5"]
    )
    with RunDir.open(tmp_path, CONFIG) as run:
        run.write_environment({"data": {"sha256": "abc"}})
    text = (tmp_path / "environment.json").read_text()
    assert "sentinel" not in text
    recorded = strict(text)
    assert recorded["command"] == [
        "main.py",
        "--config.judge.url=https://***@host/v1?***",
        "--config.judge.api_key=***",
        "--config.a.max_tokens=5",
    ]
    assert recorded["data"] == {"sha256": "abc"}
    assert recorded["variables"]["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"
    assert set(recorded["variables"]) <= set(environment.RECORDED_VARIABLES)
    assert recorded["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "flax", "optax", "numpy"} <= set(recorded["packages"])
    assert sum(recorded["devices"].values()) >= 1
    assert redact("--config.loss.alpha=1e-4") == "--config.loss.alpha=1e-4"


def test_git_state(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a git hook; must not mislead
    assert environment._git_state(tmp_path) is None
    monkeypatch.delenv("GIT_DIR")
    git("init")
    code = tmp_path / "environment.py"
    code.write_text("a\n")
    assert environment._git_state(tmp_path) is None  # a file that the checkout does not track
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    clean = environment._git_state(tmp_path)
    assert len(clean["commit"]) == 40 and not clean["dirty"] and clean["diff_sha256"] is None
    code.write_text("b\n")
    changed = environment._git_state(tmp_path)
    code.write_text("c\n")
    again = environment._git_state(tmp_path)
    assert changed["dirty"] and changed["commit"] == clean["commit"]
    assert len(changed["diff_sha256"]) == 64 and changed["diff_sha256"] != again["diff_sha256"]
    assert clean["diff"] is None and changed["diff"].endswith("-a\n+b\n")
    code.write_text("c\n" * environment.DIFF_BYTES)
    assert environment._git_state(tmp_path)["diff"] is None


def test_samples(tmp_path):
    with RunDir.open(tmp_path, CONFIG) as run:
        path = run.write_samples("step-10", [{"prompt": "a|b", "before": "c\nd"}])
        assert path == tmp_path / "samples" / "step-10.md"
        assert path.read_text() == "| prompt | before |\n| --- | --- |\n| a\\|b | c<br>d |\n"
        for name in ("../x", "a/b", "", ".x"):
            with pytest.raises(ValueError, match="a name for samples has letters"):
                run.write_samples(name, [])
