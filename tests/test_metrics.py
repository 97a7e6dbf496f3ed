"""Metrics: the file, the event files, Weights & Biases, and timers."""

import contextlib
import importlib.machinery
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from file_helpers import files_of_at_most, strict

from xpo_jax.config import settings
from xpo_jax.reporting import writers
from xpo_jax.reporting.metrics import Metrics, Timer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@contextlib.contextmanager
def logging_to(path, *, tensorboard=False, wandb=False, **options):
    """Log metrics to a file and to other writers."""
    with (
        writers.opened(path, tensorboard=tensorboard, wandb=wandb) as others,
        Metrics(path, others=others, **options) as metrics,
    ):
        yield metrics


def test_metrics_file_holds_strict_json_and_is_appended_to(tmp_path):
    with Metrics(tmp_path, total_steps=2) as metrics:
        metrics.log(1, {"loss/dpo": np.float32(0.1), "kl": 1 / 3, "loss": float("nan"), "pairs": 64})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed while it is open
        assert lines == ['{"step": 1, "loss/dpo": 0.1, "kl": 0.3333333333333333, "loss": null, "pairs": 64}']
        metrics.log(2, {"loss/dpo": jnp.float32(-1e-8)})
    with Metrics(tmp_path, total_steps=3) as metrics:
        metrics.log(3, {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line)["step"] for line in lines] == [1, 2, 3]
    assert np.float32(json.loads(lines[1])["loss/dpo"]) == np.float32(-1e-8)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_value_that_is_no_number_is_refused(tmp_path):
    with Metrics(tmp_path, total_steps=1) as metrics:
        for value in ("0.5", np.zeros(2), None, [1]):
            with pytest.raises(ValueError, match="^metric kl at step 1: .* is not a number; give a scalar$"):
                metrics.log(1, {"kl": value})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
        with files_of_at_most(3), pytest.raises(ValueError, match="cannot be written .File too large.; free"):
            metrics.log(1, {"kl": 1.0})


def test_metrics_event_files_leave_out_what_is_not_finite(tmp_path):
    with logging_to(tmp_path, tensorboard=True, wandb=False, total_steps=2) as metrics:
        metrics.log(1, {"loss/dpo": 0.5, "bad": float("nan")})
        metrics.log(2, {"loss/dpo": np.float32(0.25), "bad": 3})
    assert scalars(tmp_path / "tensorboard") == [("loss/dpo", 1, 0.5), ("loss/dpo", 2, 0.25), ("bad", 2, 3.0)]


def test_metrics_samples_are_sent_to_the_event_file(tmp_path):
    rows = [{"prompt": "a|b", "won": 0.5, "scores": {"left": "out"}}]
    with logging_to(tmp_path, tensorboard=True, wandb=False, total_steps=2) as metrics:
        metrics.samples(1, "held_out", rows)
        metrics.log(1, {"loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    assert b"samples/held_out/text_summary" in data
    assert b"| prompt | won |\n| --- | --- |\n| a\\|b | 0.5 |" in data and b"left" not in data


class WandbRun:
    """A run of Weights & Biases that keeps what it is sent, checked as the package checks it."""

    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        assert not self.finished
        assert all(isinstance(value, float | WandbTable) for value in values.values()), values
        assert not self.logged or self.logged[-1][0] <= step, "an earlier step is dropped by the package"
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


class WandbTable:
    def __init__(self, columns, data):
        assert all(len(row) == len(columns) for row in data)
        self.columns, self.data = columns, data


@pytest.fixture
def wandb(monkeypatch):
    """Stand-in for the package; `runs` holds the arguments of each `init` and the run that it returned."""
    package = types.ModuleType("wandb")
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    package.runs = []

    def init(**arguments):
        package.runs.append((arguments, WandbRun()))
        return package.runs[-1][1]

    package.init, package.Table = init, WandbTable
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_wandb_receives_what_the_files_hold_and_nothing_else(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key-of-somebody")
    with logging_to(tmp_path, tensorboard=True, wandb=True, total_steps=2) as metrics:
        metrics.samples(1, "held_out", [{"prompt": "a", "won": 0.5, "scores": {"left": "out"}}])
        metrics.log(1, {"loss/dpo": np.float32(0.5), "pairs": 64})
        metrics.log(2, {"loss/dpo": np.float32(0.25), "pairs": 63})
    ((arguments, run),) = wandb.runs
    assert arguments["name"] == tmp_path.name and arguments["dir"] == str(tmp_path)
    # config, command line, console and code may hold paths, addresses and keys
    assert set(arguments) == {"name", "dir", "id", "resume", "settings"}
    off = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}
    assert arguments["settings"] == off
    (_, texts), *rows = run.logged
    assert list(texts) == ["samples/held_out"]
    assert (texts["samples/held_out"].columns, texts["samples/held_out"].data) == (
        ["prompt", "won"],
        [["a", 0.5]],
    )
    lines = map(strict, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [{"step": step, **values} for step, values in rows] == list(lines)
    numbers = [(name, step, value) for step, values in rows for name, value in values.items()]
    _, *events = scalars(tmp_path / "tensorboard")  # the first one is the text
    assert numbers == events
    assert run.finished
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 3 and not any(b"key-of-somebody" in data for data in written)


def test_metrics_of_a_process_that_does_not_write_are_sent_nowhere(tmp_path, wandb):
    other = writers.WeightsAndBiases(tmp_path)
    with Metrics(tmp_path, others=[other], total_steps=2, writes=False) as metrics:
        metrics.log(1, {"loss": 0.5})
    ((_, run),) = wandb.runs
    assert run.logged == [] and not (tmp_path / "metrics.jsonl").exists()


def test_wandb_of_a_resumed_run_is_the_same_run(tmp_path, wandb):
    for step in (1, 2):
        with logging_to(tmp_path, wandb=True, total_steps=2, first_step=step - 1) as metrics:
            metrics.log(step, {"loss": 0.5})
    (first, _), (second, _) = wandb.runs
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": first["id"]}
    other = tmp_path / "other"
    other.mkdir()
    with logging_to(other, wandb=True, total_steps=2):
        assert wandb.runs[-1][0]["id"] != first["id"]


def test_wandb_that_cannot_be_used_is_refused_in_one_line(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key-of-somebody")

    def init(**arguments):
        raise RuntimeError("No API key configured,\nkey-of-somebody is none")

    wandb.init = init
    with pytest.raises(ValueError, match="^logging.wandb: .*No API key.*WANDB_MODE=offline") as caught:
        writers.WeightsAndBiases(tmp_path)
    assert "key-of-somebody" not in str(caught.value) and "\n" not in str(caught.value)


def test_wandb_that_fails_later_costs_only_what_it_would_receive(tmp_path, wandb, capsys):
    with logging_to(tmp_path, wandb=True, total_steps=3) as metrics:
        wandb.runs[0][1].log = lambda values, step: 1 // 0
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 0.5})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and warnings[0].startswith(
        "xpo_jax: warning: Weights & Biases has failed (Zero"
    )


def test_tensorboard_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(ValueError, match=r"tensorboard: cannot be written \(.*logging.tensorboard to false$"):
        writers.TensorBoard(tmp_path)


def test_settings_wandb_not_installed_is_refused(wandb, monkeypatch):
    group = {"table_every_steps": 1, "tensorboard": False, "wandb": True, "profile": False}
    settings.Logging(**group)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="^wandb is true, but that package is not installed: pip install wandb"
    ):
        settings.Logging(**group)
    settings.Logging(**{**group, "wandb": False})


def scalars(folder):
    """Return the scalars in the event file, whose records are length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    data, values = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        values += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    return values


def test_timer_nested_and_raising_blocks_are_counted():
    clock = Clock()
    timer = Timer(clock=clock)
    for _ in range(2):
        with timer("sample"):
            clock.now += 1.5
            with timer("judge"):
                clock.now += 0.25
    with pytest.raises(KeyError), timer("judge"):
        clock.now += 1.0
        raise KeyError
    assert timer.take() == {"time/judge": 1.5, "time/sample": 3.5}
    assert timer.take() == {}
