"""Runs whose console is unusable, and runs that user code or a signal ends."""

import io
import json
import os
import signal
import sys

import pytest
from fakes import LongerText
from tiny_run import changed_config, run_contents, run_name, write_config

from xpo_jax.checkpointing import checkpoint
from xpo_jax.experiment.save_on_error import save_on_error
from xpo_jax.io import streams
from xpo_jax.judges import answers
from xpo_jax.judges.contract import JudgeError
from xpo_jax.main import main
from xpo_jax.runtime.interruption import Signals, Stopped
from xpo_jax.values import Comparison

pytestmark = pytest.mark.usefixtures("one_device")
STEPS = 3
COMPARISON = Comparison((), {}, "a", "b")


# ---- consoles -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(folder):
    """Return what a run with a usable console leaves."""
    status, out, _ = run_name(folder, "expected", changed_config(folder, steps=STEPS))
    assert status == 0 and json.loads(out.splitlines()[-1])["steps"] == STEPS
    return run_contents(folder / "expected")


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe():
    _, writer = os.pipe()  # the reader stays open and reads nothing
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"." * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    return writer


CONSOLES = {
    "closed": lambda: None,
    "gone": broken_pipe,
    "full": lambda: os.open("/dev/full", os.O_WRONLY),
    "slow": full_pipe,
    "ascii": lambda: os.open(os.devnull, os.O_WRONLY),
}


@pytest.mark.parametrize("name", CONSOLES)
def test_run_with_an_unusable_console_gives_the_same_results(folder, expected, monkeypatch, name):
    """Both streams are unusable; their encoding is ASCII, which the run's name is not."""
    finish = streams.Output.finish
    monkeypatch.setattr(streams.Output, "finish", lambda self, seconds: finish(self, 0.0))
    config = changed_config(folder, steps=STEPS, run_dir=str(folder / f"ä {name}"))
    spec = write_config(folder / f"{name}.py", config)
    with monkeypatch.context() as patched:
        for stream in ("stdout", "stderr"):
            number = CONSOLES[name]()
            file = None if number is None else io.TextIOWrapper(io.FileIO(number, "w"), encoding="ascii")
            patched.setattr(sys, stream, file)
        assert main([f"--config={spec}"]) == 0
    assert run_contents(folder / f"ä {name}") == expected


# ---- user code ----------------------------------------------------------------------------------------


class Misbehaving(LongerText):
    """Do at call number `at`, from 1 on, what `do` names."""

    def __init__(self, *, at: int, do: str):
        self._left, self._do = at, do

    def __call__(self, comparisons):
        self._left -= 1
        if self._left == 0:
            if self._do == "exit":
                sys.exit(0)
            if self._do == "interrupt":
                raise KeyboardInterrupt
            os.chdir("/")
        return super().__call__(comparisons)

    def parts(self, messages, text):
        if self._left < 0 and self._do == "warn":
            raise DeprecationWarning("this is old")
        return super().parts(messages, text)


@pytest.mark.parametrize(
    ("do", "status", "last_line"),
    [
        ("exit", 2, r"the judge: code of yours ended the program with sys.exit(0) (test_endings.py, line "),
        ("interrupt", 130, "interrupted"),
        ("warn", 2, "DeprecationWarning: this is old; PYTHONWARNINGS, "),
    ],
)
def test_step_is_saved_before_an_exception_of_user_code_ends_the_run(folder, do, status, last_line):
    config = changed_config(folder, steps=4, judge={"name": "test_endings:Misbehaving", "at": 12, "do": do})
    config.evaluation.every_steps = 2
    ended, _, err = run_name(folder, do, config)
    lines = err.splitlines()
    assert ended == status and lines[-1].startswith(f"xpo_jax: {last_line}"), err
    done = checkpoint.latest(folder / do / "checkpoints")
    assert done and f"the last weights are in {folder / do / 'checkpoints' / str(done)}" in err


def test_judge_that_changes_the_current_directory_changes_no_path_of_the_run(folder, monkeypatch, expected):
    monkeypatch.chdir(folder)
    judge = {"name": "test_endings:Misbehaving", "at": 2, "do": "chdir"}
    config = changed_config(folder, steps=STEPS, judge=judge, model__path="model", data__train="train.jsonl")
    assert run_name(folder, "chdir", config)[0] == 0
    assert os.getcwd() == str(folder)
    contents = run_contents(folder / "chdir")
    assert all(contents[name] == expected[name] for name in ("metrics", "pairs", "weights"))


def test_call_judge_any_error_of_the_judge_costs_its_verdicts():
    class Panic(BaseException):
        pass

    def panics(comparisons):
        raise Panic("in Rust")

    (verdict,) = answers.call_judge(panics, [COMPARISON])
    assert verdict.p is None and "Panic: in Rust (test_endings.py, line" in verdict.reason
    for error in (Stopped(15, "stopped"), KeyboardInterrupt()):

        def receives_a_signal(comparisons, error=error):
            raise error

        with pytest.raises(type(error)):
            answers.call_judge(receives_a_signal, [COMPARISON])


def test_main_config_that_exits_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text("import sys\ndef get_config(arg):\n    sys.exit(0)\n")
    assert main([f"--config={path}"]) == 2
    assert "code of yours ended the program with sys.exit(0)" in capsys.readouterr().err


def test_save_on_error_saves_once_and_names_the_path(capsys):
    saves = []

    def save():
        saves.append("saved")
        return "run/checkpoints/3"

    message = "^the server is gone; the last weights are in run/checkpoints/3$"
    with pytest.raises(JudgeError, match=message), save_on_error(save):
        raise JudgeError("the server is gone")
    assert saves == ["saved"]
    for error in (ValueError("other"), SystemExit(3), KeyboardInterrupt()):
        with pytest.raises(type(error)), save_on_error(save):
            raise error
        assert capsys.readouterr().err == "xpo_jax: the last weights are in run/checkpoints/3\n"
    with pytest.raises(ValueError, match="^other$"), save_on_error(lambda: 1 // 0):
        raise ValueError("other")
    with pytest.raises(Stopped), save_on_error(save):
        raise Stopped(15, "stopped", on_all_processes=True)  # between two steps
    assert len(saves) == 4
    with pytest.raises(Stopped), save_on_error(save):
        raise Stopped(15, "stopped")  # in a wait for a person
    assert len(saves) == 5


# ---- SIGHUP -------------------------------------------------------------------------------------------


@pytest.fixture
def hangup_is_not_ignored():
    """As in a terminal, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup_is_not_ignored")
def test_signals_hangup_counts_as_the_first_signal_only(monkeypatch):
    """A terminal that closes and its shell both send it, and systemd sends it after SIGTERM."""
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with Signals() as signals, signals.deferred():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGHUP and not exits
        signal.raise_signal(signal.SIGTERM)
        assert exits == [143]
    with Signals(), pytest.raises(Stopped, match="stopped by SIGHUP") as caught:
        signal.raise_signal(signal.SIGHUP)
    assert caught.value.status == 129


def test_signals_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
