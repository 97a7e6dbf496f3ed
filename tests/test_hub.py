"""Models by name, fetched from a hub on this machine: what is fetched, recorded and printed."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_hub import Hub
from fake_models import SPEAKING, write_model
from huggingface_hub import constants
from tiny_run import tiny_config, write_config

from xpo_jax.models.hf import hub, model_folder

REPOSITORY = Path(__file__).parents[1]
NAME, MAIN, TAGGED = "some-one/Tiny_2.5", "a" * 40, "b" * 40
TOKEN = "hf_do_not_tell"
MODEL = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
TEXTS = {"LICENSE", "chat_template.jinja", "merges.txt"}
DANGEROUS = (
    "pytorch_model.bin",
    "modeling.py",
    "README.md",
    "onnx/config.json",
    "original/model.safetensors",
)


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """Return the files on the hub: a model, texts that belong to it, and files that must not be fetched."""
    folder = write_model(tmp_path_factory.mktemp("offered"))
    for name in (*TEXTS, *DANGEROUS):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    (folder / "chat_template.jinja").write_text(
        json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    )
    return folder


@pytest.fixture
def server(offered, tmp_path, monkeypatch):
    """Yield a fake hub; huggingface_hub is patched as its environment variables would configure it at import."""
    with Hub(NAME, offered).running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)  # where no folder has the model's name
        yield server


def refused(given):
    with pytest.raises(ValueError) as raised:
        hub.find(given)
    message = str(raised.value)
    assert message.startswith(f"{given}: ") and "\n" not in message and len(message) < 450
    assert TOKEN not in message and "127.0.0.1" not in message
    return message.removeprefix(f"{given}: ")


def digests(folder):
    """Return the SHA-256 of the files that make up the model."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in MODEL | TEXTS}


def test_only_what_a_model_is_made_of_is_fetched(server, offered, capsys):
    model = hub.find(NAME)
    assert server.fetched() == MODEL | TEXTS
    assert digests(model.folder) == digests(offered)
    assert {file.name for file in model.folder.iterdir()} == MODEL | TEXTS
    assert model_folder.read_config(model.folder) == SPEAKING
    assert len(model_folder.load_tokenizer(model.folder, SPEAKING)) == 259
    assert "fetching what the local cache lacks ..." in capsys.readouterr().err


def test_a_revision_is_resolved_to_its_commit(server):
    model = hub.find(NAME)
    assert (model.commit, model.name) == (MAIN, NAME)
    assert model.described == f"{NAME} (commit {MAIN})"
    tagged = hub.find(f"{NAME}@v1")
    assert (tagged.commit, tagged.name, tagged.folder.name) == (TAGGED, NAME, TAGGED)
    assert hub.find(f"{NAME}@{TAGGED}") == (f"{NAME}@{TAGGED}", *tagged[1:])
    assert {path.split("/")[4] for _, path, _ in server.requests if "/resolve/" in path} == {
        MAIN,
        TAGGED,
    }  # never "main"
    server.revisions["main"] = "c" * 40  # the branch moves
    assert hub.find(NAME).commit == "c" * 40


def test_the_token_goes_to_the_hub_and_nowhere_else(server, tmp_path, capsys):
    model = hub.find(NAME)
    assert {token for _, path, token in server.requests if NAME in path} == {f"Bearer {TOKEN}"}
    assert TOKEN not in repr(model) and TOKEN not in "".join(capsys.readouterr())
    assert not [
        file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()
    ]


def test_a_folder_comes_first(server, offered, tmp_path):
    (tmp_path / NAME).parent.mkdir()
    (tmp_path / NAME).symlink_to(offered)
    assert hub.find(NAME) == (NAME, Path(NAME), None, "")
    assert hub.find(NAME).name == "Tiny_2.5"
    assert hub.find("embedded").folder == REPOSITORY / "xpo_jax" / "embedded" / "model"
    for given in ("nowhere", "./a/b", "a/b/c", "a/b@", "a b/c", "/a/b"):
        with pytest.raises(ValueError, match="is not a folder; give a Hugging Face model folder, a hub name"):
            hub.find(given)
    assert server.requests == []


def test_find_without_network_uses_a_complete_cached_model_and_notes_it(server, monkeypatch, capsys):
    online = hub.find(NAME)
    tagged = hub.find(f"{NAME}@v1")
    capsys.readouterr()
    requests = len(server.requests)
    server.shutdown()
    server.server_close()
    offline = hub.find(NAME)
    assert offline[:3] == online[:3]
    assert offline.note == f"commit {MAIN}, from the local cache: the hub was not reached (ConnectError)"
    assert hub.find(f"{NAME}@{TAGGED}").folder == tagged.folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.find(f"{NAME}@v1").note.endswith("the hub was not reached (HF_HUB_OFFLINE is set)")
    assert len(server.requests) == requests and capsys.readouterr().err == ""

    (online.folder / "model.safetensors").unlink()  # as after a download that was cut off
    assert refused(NAME).startswith(
        "no such folder, the hub was not reached (HF_HUB_OFFLINE is set), and the local"
    )
    assert "no such folder" in refused(f"{NAME}@v2")


def test_without_network_and_without_the_model(server):
    server.shutdown()
    server.server_close()
    text = refused(f"{NAME}@v1")
    remedies = (f"`hf download {NAME} --revision v1`", "HF_HOME", "or give a local folder")
    assert all(part in text for part in ("hub was not reached (ConnectError)", "local cache", *remedies))


def test_what_the_hub_does_not_give(server, monkeypatch):
    assert re.search(r"no such model.*check the name, set HF_TOKEN.*local folder", refused("some-one/else"))
    assert re.search(r"no such revision; name a branch, a tag or a commit after the @", refused(f"{NAME}@v2"))
    assert re.search(r"no such folder, and not a valid name.*check it", refused("a--b/c..d"))
    server.gated = True
    assert re.search(r"terms must be accepted.*on its page, set HF_TOKEN.*local folder", refused(NAME))


def test_a_download_that_stops(server, monkeypatch):
    """The first attempt ends in the middle, with the disk full; the next one completes the download."""
    import huggingface_hub.file_download as inner

    original = inner._download_to_tmp_and_move

    def full(*, filename, **rest):
        if filename == "model.safetensors":
            raise OSError(28, "No space left on device", "/somewhere")
        original(filename=filename, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(inner, "_download_to_tmp_and_move", full)
        assert refused(NAME).startswith(
            f"fetching commit {MAIN} stopped (No space left on device); run the same"
        )
    assert "model.safetensors" in MODEL - server.fetched()
    assert hub.find(NAME).commit == MAIN
    assert server.fetched() == MODEL | TEXTS


def environment(server, folder):
    """Return the environment of a process that finds the hub by it alone."""
    rest = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")
    }
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    return {**rest, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": path}


def test_two_processes_fetch_the_same_model_at_once(server, offered, tmp_path):
    server.barrier = threading.Barrier(2)
    code = f"from xpo_jax.models.hf import hub; print(hub.find({NAME!r}).folder)"
    command = [sys.executable, "-c", code]
    both = [
        subprocess.Popen(command, env=environment(server, tmp_path), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    (folder,) = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert digests(Path(folder)) == digests(offered)
    assert [file for file in (tmp_path / "home").rglob("*") if file.name.endswith(".incomplete")] == []


@pytest.mark.slow
def test_a_whole_run_of_a_model_from_the_hub(server, tmp_path):
    config = tiny_config(tmp_path)
    config.model.path = f"{NAME}@v1"
    judge = {"template": "{A}{B}", "labels": ("A", "B"), "batch_size": 8, "buckets": (32,)}
    config.judge = {"name": "llm", "path": NAME, **judge, "on_long": "no_verdict", "rules": None}
    config.judge["chat_template_arguments"] = None
    config.steps = 1
    config.optimizer.warmup_steps = 0
    config.data.buckets = (40,)
    config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    config.evaluation.prompts = 2
    argv = [sys.executable, "-m", "xpo_jax.main", f"--config={write_config(tmp_path / 'config.py', config)}"]
    variables = {**environment(server, tmp_path), "XLA_FLAGS": ""}
    done = subprocess.run(argv, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"model {NAME}@v1 (commit {TAGGED}); reference: a frozen copy of it" in " ".join(
        done.stdout.split()
    )
    assert f"{NAME}: commit {TAGGED}; fetching" in done.stderr
    run = tmp_path / "run"
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["model"] == recorded["reference"] == {"path": f"{NAME}@v1", "commit": TAGGED}
    assert recorded["judge"] == [{"path": NAME, "commit": MAIN}]
    assert model_folder.read_config(run / "export") == SPEAKING
    assert (run / "export" / "LICENSE").read_text() == "this is LICENSE"
    assert (run / "export" / "chat_template.jinja").is_file()
    texts = [file.read_bytes() for file in run.rglob("*") if file.is_file()]
    assert not [
        text for text in (*texts, done.stdout.encode(), done.stderr.encode()) if TOKEN.encode() in text
    ]
