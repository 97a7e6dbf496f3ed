"""Metrics: the file, the event files, the console, progress, timers and tables."""

import importlib.machinery
import io
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from test_files import files_of_at_most, strict

from xpo_jax.config import settings
from xpo_jax.reporting.metrics import Metrics, Timer, final_line, show, summary_table, text_table


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_file(tmp_path):
    with Metrics(tmp_path, tensorboard=False, wandb=False, total_steps=2) as metrics:
        metrics.log(1, {"loss/dpo": np.float32(0.1), "kl": 1 / 3, "loss": float("nan"), "pairs": 64})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed while it is open
        assert lines == ['{"step": 1, "loss/dpo": 0.1, "kl": 0.3333333333333333, "loss": null, "pairs": 64}']
        metrics.log(2, {"loss/dpo": jnp.float32(-1e-8)})
    with Metrics(tmp_path, tensorboard=False, wandb=False, total_steps=3) as metrics:
        metrics.log(3, {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line)["step"] for line in lines] == [1, 2, 3]
    assert np.float32(json.loads(lines[1])["loss/dpo"]) == np.float32(-1e-8)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_no_number_is_refused(tmp_path):
    with Metrics(tmp_path, tensorboard=False, wandb=False, total_steps=1) as metrics:
        for value in ("0.5", np.zeros(2), None, [1]):
            with pytest.raises(ValueError, match="^metric kl at step 1: .* is not a number; give a scalar$"):
                metrics.log(1, {"kl": value})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
        with files_of_at_most(3), pytest.raises(ValueError, match="cannot be written .File too large.; free"):
            metrics.log(1, {"kl": 1.0})


def test_event_files(tmp_path):
    with Metrics(tmp_path, tensorboard=True, wandb=False, total_steps=2) as metrics:
        metrics.log(1, {"loss/dpo": 0.5, "bad": float("nan")})
        metrics.log(2, {"loss/dpo": np.float32(0.25), "bad": 3})
    assert scalars(tmp_path / "tensorboard") == [("loss/dpo", 1, 0.5), ("loss/dpo", 2, 0.25), ("bad", 2, 3.0)]


def test_sample_texts_are_sent_to_the_event_file(tmp_path):
    rows = [{"prompt": "a|b", "won": 0.5, "scores": {"left": "out"}}]
    with Metrics(tmp_path, tensorboard=True, wandb=False, total_steps=2) as metrics:
        metrics.samples(1, "held_out", rows)
        metrics.log(1, {"loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    assert b"samples/held_out/text_summary" in data
    assert b"| prompt | won |\n| --- | --- |\n| a\\|b | 0.5 |" in data and b"left" not in data


class FakeRun:
    def __init__(self, heard):
        self.heard = heard

    def log(self, values, step):
        self.heard.append((step, values))

    def finish(self):
        self.heard.append("finished")


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package; `heard` is what it was told."""
    package = types.ModuleType("wandb")
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    package.heard = []
    package.init = lambda **given: package.heard.append(given) or FakeRun(package.heard)
    package.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_weights_and_biases_gets_the_same_and_nothing_else(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key-of-somebody")
    with Metrics(tmp_path, tensorboard=True, wandb=True, total_steps=2) as metrics:
        metrics.samples(1, "held_out", [{"prompt": "a", "won": 0.5, "scores": {"left": "out"}}])
        metrics.log(1, {"loss/dpo": np.float32(0.5), "pairs": 64})
    quiet = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}
    assert wandb.heard == [
        {"name": tmp_path.name, "dir": str(tmp_path), "settings": quiet},
        (1, {"samples/held_out": (["prompt", "won"], [["a", 0.5]])}),
        (1, {"loss/dpo": 0.5, "pairs": 64.0}),
        "finished",
    ]
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 2 and not any(b"key-of-somebody" in data for data in written)


def test_processes_that_do_not_write_send_nothing(tmp_path, wandb):
    with Metrics(tmp_path, tensorboard=True, wandb=True, total_steps=2, writes=False) as metrics:
        metrics.log(1, {"loss": 0.5})
    assert wandb.heard == [] and list(tmp_path.iterdir()) == []


def test_weights_and_biases_is_refused_where_it_is_not_installed(wandb, monkeypatch):
    group = {"table_every_steps": 1, "tensorboard": False, "wandb": True, "profile": False}
    settings.Logging(**group)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="^wandb is true, but that package is not installed: pip install wandb"
    ):
        settings.Logging(**group)
    settings.Logging(**{**group, "wandb": False})


def scalars(folder):
    """The scalars in the event file: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    return found


def test_the_console_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    names = ["loss/dpo", "judge/win_rate", "eval/win_rate", "time/a", "time/b"]
    with Metrics(
        tmp_path, tensorboard=False, wandb=False, total_steps=5, console=names, console_every_steps=2
    ) as metrics:
        for step in range(1, 6):
            metrics.log(step, {"loss/dpo": 0.6931471, "judge/win_rate": 0.5 * step, "eval/win_rate": 1e-5})
        metrics.say("done")
    assert capsys.readouterr().out.splitlines() == [
        "  step        dpo  judge/win_rate  eval/win_rate          a",
        "     2     0.6931          1.0000       1.00e-05          -",
        "     4     0.6931          2.0000       1.00e-05          -",
        "     5     0.6931          2.5000       1.00e-05          -",
        "done",
    ]


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (float("nan"), "nan"), (float("-inf"), "-inf"), (-0.05, "-0.0500"), (123.456, "123.46")]
    + [
        (12345.678, "12345.7"),
        (2e-4, "2.00e-04"),
        (1e8, "1.00e+08"),
        (np.float32(0.1), "0.1000"),
        (64, "64"),
    ],
)
def test_a_cell(tmp_path, capsys, value, text):
    with Metrics(tmp_path, tensorboard=False, wandb=False, total_steps=1, console=["kl"]) as metrics:
        metrics.log(1, {"kl": value})
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", text]


def test_progress_without_a_terminal(tmp_path, capsys):
    clock = Clock()
    with Metrics(
        tmp_path, tensorboard=False, wandb=False, total_steps=120, progress_every_seconds=10, clock=clock
    ) as metrics:
        for step in (1, 2, 3, 4, 5, 120):
            metrics.log(step, {})
            clock.now += 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "step 1/120 (1 %), time left ?",
        "step 4/120 (3 %), time left 07:44",  # three steps took 12 s, 116 are left
        "step 120/120 (100 %), time left 00:00",
    ]


def test_progress_on_a_terminal(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Metrics(tmp_path, tensorboard=False, wandb=False, total_steps=4) as metrics:
        for step in range(1, 5):
            metrics.log(step, {})
    bar = screen.getvalue()
    assert "1/4 [" in bar and "\r" in bar and "time left" not in bar


def test_timer():
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


def test_show():
    values = [None, True, 1234567, 0.123456, 12345.67, 1e-5, np.float32(0.1), "a\x1b[0m", (1, 2)]
    assert list(map(show, values)) == [
        "-",
        "yes",
        "1,234,567",
        "0.1235",
        "12345.7",
        "1e-05",
        "0.1",
        "a␛[0m",
        "(1, 2)",
    ]


def test_summary_table():
    table = summary_table(
        {"devices": "8 x cpu", "parameters": 1612345, "prompt buckets": "24, 32, 48"}, width=40
    )
    assert table == "devices         8 x cpu\nparameters      1,612,345\nprompt buckets  24, 32, 48"
    assert (
        summary_table({"a": "one two three four five six"}, width=23) == "a  one two three four\n   five six"
    )
    assert summary_table({}) == ""


def test_text_table():
    rows = [[1, "Der Hund beißt den Mann.", "Den Mann\nbeißt der Hund.", 0.5], [10, "Kurz.", "", None]]
    assert text_table(["#", "before", "after", "score"], rows, width=40).splitlines() == [
        " #  before          after          score",
        "--  --------------  -------------  -----",
        " 1  Der Hund beißt  Den Mann         0.5",
        "    den Mann.       beißt der",
        "                    Hund.",
        "10  Kurz.                              -",
    ]
    assert text_table(["a", "b"], []) == "a  b\n-  -"
    word = "Donaudampfschifffahrt"
    narrow = text_table(["a", "b"], [[word, "x"]], width=12).splitlines()
    assert all(len(line) <= 12 for line in narrow)
    assert "".join(line[:9].strip() for line in narrow[2:]) == word


def test_final_line():
    line = final_line({"steps": 3, "win_rate": np.float32(0.8), "kl": float("nan"), "run_dir": "a\nü"})
    assert line == '{"steps": 3, "win_rate": 0.8, "kl": null, "run_dir": "a\\nü"}'
    assert strict(line)["run_dir"] == "a\nü"
