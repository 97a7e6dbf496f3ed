"""The faults that a run must survive, each as a function that produces it for real and says what came of it.

A case takes the runs that it may share (`tiny_run.Runs`) and a name for its own run directory. It returns what
happened, in a line, and raises AssertionError where that is not what was promised: after the fault, the same command
again has to end bit for bit as the run that nothing happened to. faults.py shows them as a table.

Left out on purpose: power cuts (what is flushed is flushed, but no test here pulls a plug), and GPUs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.faults.tiny_run import STEPS, Ended, Judge, Runs, differences, metrics
from xpo_jax.checkpointing.checkpoint import Checkpoints
from xpo_jax.experiment.resume import Ledger
from xpo_jax.models.hf import model_folder

Case = Callable[[Runs, str], str]
CASES: dict[str, Case] = {}
NEWEST = 5  # the checkpoint of a run that was stopped, see `stopped`
HANGS_SECONDS = 25


def call_of(function: Callable[..., Any]) -> str:
    """Return the injection point before each call of this function or method."""
    return f"call {function.__module__}:{function.__qualname__}"


JUDGE, SAVE = call_of(Judge.__call__), call_of(Checkpoints.save)
# Starts the gradients and sums of an update, once per step; `accumulate` runs once per micro-batch.
START_OF_UPDATE = "program zeros"


def case(name: str) -> Callable[[Case], Case]:
    """Enter a function into the matrix."""

    def enter(function: Case) -> Case:
        CASES[name] = function
        return function

    return enter


def expect(ended: Ended, status: int, said: str) -> str:
    """The line that it ended with, if that is what it had to say."""
    told = f"status {ended.status}, {ended.said or 'no message'!r}"
    assert ended.status == status, f"{told} instead of status {status}: {ended.err[-1500:]}"
    assert re.search(said, ended.err), f"{told} does not say {said!r}"
    # on a full disk tensorstore's threads print tracebacks of asyncio's, of which none is ours
    ours = re.search(r'Traceback[^:]*:\n(?:  .*\n)*?  File ".*/xpo_jax/', ended.err)
    assert not ours or status in (124, -9), f"{told}, with a traceback"
    name = {-9: "killed"}.get(status, f"exit {status}")
    return f"{name}: {ended.said}" if ended.said else name


def same_again(runs: Runs, name: str, overrides: Sequence[str] = (), expected: Path | None = None) -> str:
    """The same command again has to end well, as if nothing had happened."""
    ended = runs.run(name, overrides)
    assert ended.status == 0, f"again: status {ended.status}, {ended.said or ended.err[-1500:]}"
    return same(runs, name, expected)


def same(runs: Runs, name: str, expected: Path | None = None) -> str:
    """A finished run has to be the uninterrupted one, bit for bit, with a last checkpoint that is whole."""
    different = differences(runs.path(name), expected or runs.whole)
    assert not different, (
        f"not as the uninterrupted run: {', '.join(different[:5])} ({len(different)} in all)"
    )
    newest = runs.path(name) / "checkpoints" / str(STEPS)
    lines = (newest / "manifest.sha256").read_text().splitlines()
    for digest, _, file in (line.partition("  ") for line in lines):
        assert hashlib.sha256((newest / file).read_bytes()).hexdigest() == digest, (
            f"{newest / file} is damaged"
        )
    return "bit-equal after the same command again"


# ---- a fault, and the same command again ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planted:
    """What is planted ends the run with this status, and the run says this; a case when it is called."""

    at: str
    call: int
    do: str
    status: int
    said: str
    overrides: tuple[str, ...] = ()

    def fault(self, runs: Runs, name: str) -> str:
        """The command with the fault."""
        ended = runs.run(name, self.overrides, {"at": self.at, "call": self.call, "do": self.do})
        assert "planted: " in ended.err, f"{self.at} was not come to {self.call} times: {ended.err[-1500:]}"
        return expect(ended, self.status, self.said).replace(f"{runs.path(name)}/", "")

    def __call__(self, runs: Runs, name: str) -> str:
        """The fault, and the same command again."""
        return f"{self.fault(runs, name)}; {same_again(runs, name, self.overrides)}"


KILLS = {
    "while compiling": ("compile", 3),
    "while sampling": ("program sample", 10),
    "while judging": (JUDGE, 5),
    "while updating": ("program apply", 5),
    "while an evaluation is written": ("rename evaluations/3.json$", 1),
    "before a checkpoint is written": (SAVE, 2),
    "while a checkpoint is written": ("open checkpoints/4/state", 2),
    "during its asynchronous commit": ("rename checkpoints/4/state$", 1),
    "during the manifest": ("rename checkpoints/4/manifest.sha256$", 1),
    "after a checkpoint is written": ("remove checkpoints/2", 1),
    "while an older one is removed": ("remove checkpoints/2", 2),
    "while exporting": (r"open \.export\.partial/README", 1),
    "before the export is in its place": ("rename /export$", 1),
    "after the export": (r"open \.result\.json", 1),
}
for _name, (_at, _call) in KILLS.items():
    CASES[f"kill -9 {_name}"] = Planted(_at, _call, "SIGKILL", -9, "")
for _signal, _status in (("SIGTERM", 143), ("SIGINT", 130)):
    for _name, _at, _call in (("sampling", "program sample", 10), ("judging", JUDGE, 5)):
        _said = rf"stopped by {_signal} after step \d of {STEPS}, which is saved"
        CASES[f"{_signal} while {_name}"] = Planted(_at, _call, _signal, _status, _said)
    CASES[f"{_signal} twice"] = Planted(
        JUDGE, 5, f"{_signal} {_signal}", _status, f"{_signal} again: leaving at once"
    )
_no_verdict = "the judge gave no verdict on more than 50% of the pairs .* the last weights are in "
CASES |= {
    "SIGTERM while compiling": Planted("compile", 3, "SIGTERM", 143, "stopped by SIGTERM; run the same command"),
    "disk full in a checkpoint": Planted(SAVE, 2, "full 200000", 2, r"checkpoints/\d: cannot be saved .*too large"),
    "disk full in the export": Planted(call_of(model_folder.save), 1, "full 1000", 2, "export.*File too large"),
    "judge raises": Planted(JUDGE, 5, "raise", 2, _no_verdict + "|a planted fault"),
    "judge hangs": Planted(
        JUDGE, 5, "hang", 124, f"step .* has taken more than {HANGS_SECONDS} s", (f"max_step_seconds={HANGS_SECONDS}",)
    ),
    "judge returns prose": Planted(JUDGE, 5, 'answer "A is better"', 2, "A is better.*the last weights are in "),
    "judge returns integers": Planted(JUDGE, 5, "answer 1", 2, "the int 1, which is refused.*the last weights are in "),
    "NaN in all verdicts": Planted(JUDGE, 5, "answer NaN", 2, _no_verdict),
}  # fmt: skip


def full_pairs_log(runs: Runs, call: int, share: float) -> Planted:
    """The log may hold no more than this share of what it holds at the end: the middle of a record, most likely."""
    size = int((runs.whole / "pairs.jsonl").stat().st_size * share)
    return Planted(
        call_of(Ledger.write_pairs), call, f"full {size}", 2, "pairs.jsonl: cannot be written .File too large"
    )


@case("disk full in the pairs log")
def _(runs: Runs, name: str) -> str:
    """While the fourth step is written."""
    return full_pairs_log(runs, 4, 0.6)(runs, name)


@case("judge always ties")
def _(runs: Runs, name: str) -> str:
    """No fault: every pair is worth a half, and the bonus alone acts."""
    ended = runs.run(name, (), {"at": JUDGE, "call": 1, "do": 'answer "tie"', "times": 10**6})
    happened = expect(ended, 0, "")
    rows = metrics(runs.path(name))[1:]
    assert [row["judge/tie_rate"] for row in rows] == [1.0] * STEPS, "not all ties"
    assert all(row["judge/win_rate"] == 0.5 and row["skipped"] == 0 for row in rows), "a tie is not a half"
    return f"{happened}: ends by itself, every win rate is 0.5"


# ---- numbers ---------------------------------------------------------------------------------------


def _shortened(runs: Runs) -> Path:
    """The run of three steps."""
    if not (runs.path("three") / "result.json").exists():
        expect(runs.run("three", ["steps=3"]), 0, "")
    return runs.path("three")


def _weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def _poisoned(output: int) -> Case:
    def run(runs: Runs, name: str) -> str:
        """The fourth update, which is the last, has to leave the weights of the third."""
        plan = {"at": START_OF_UPDATE, "call": 4, "do": f"nan {output}"}
        expect(runs.run(name, ["steps=4"], plan), 0, "")
        row = metrics(runs.path(name))[-1]
        assert row["step"] == 4 and row["skipped"] == 1, f"it is not counted: {row}"
        assert _weights(runs.path(name)) == _weights(_shortened(runs)), "the weights are not untouched"
        return "the update is skipped and counted, the weights are bit for bit those of before"

    return run


CASES["NaN in the loss"] = _poisoned(1)
CASES["NaN in the gradient"] = _poisoned(0)


@case("NaN in the gradient, twice in a row")
def _(runs: Runs, name: str) -> str:
    """`max_skipped` is 2: the run ends, and again until something is changed; what is saved is what was before."""
    plan = {"at": START_OF_UPDATE, "call": 4, "do": "nan 0", "times": 2}
    said = "step 5: loss or gradient was not finite 2 times in a row"
    happened = expect(runs.run(name, ["steps=5", "max_skipped=2"], plan), 2, said)
    expect(runs.run(name, ["steps=5", "max_skipped=2"]), 2, said)
    expect(runs.run(name, ["steps=5", "max_skipped=3"]), 0, "")
    assert _weights(runs.path(name)) == _weights(_shortened(runs)), "what was saved is not what was before"
    happened = happened.replace(f"{runs.path(name)}/", "")
    return f"{happened}; the checkpoint holds bit for bit the weights of before"


# ---- damage to a checkpoint ------------------------------------------------------------------------


def stopped(runs: Runs, name: str) -> Path:
    """A new run directory, of a run that was stopped after step 5; its checkpoints 4 and 5 are whole."""
    if not runs.path("stopped").exists():
        plan = {"at": "program apply", "call": NEWEST, "do": "SIGTERM"}
        expect(runs.run("stopped", (), plan), 143, f"after step {NEWEST} of {STEPS}, which is saved")
    return runs.copy("stopped", name)


def _largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(checkpoints: Path) -> Path:
    """Turn one bit in the largest file of the newest that is whole; returns the file."""
    newest = max(int(manifest.parent.name) for manifest in checkpoints.glob("*/manifest.sha256"))
    file = _largest(checkpoints / str(newest))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def _truncate(checkpoints: Path) -> Path:
    file = _largest(checkpoints / str(NEWEST))
    os.truncate(file, file.stat().st_size - 1)
    return file


def _remove(which: str) -> Callable[[Path], Path]:
    def remove(checkpoints: Path) -> Path:
        file = _largest(checkpoints / str(NEWEST)) if not which else checkpoints / str(NEWEST) / which
        file.unlink()
        return file

    return remove


def _empty(checkpoints: Path) -> Path:
    folder = checkpoints / str(NEWEST + 1)
    folder.mkdir()
    return folder


def _foreign(checkpoints: Path) -> Path:
    (checkpoints / "notes").mkdir()  # beside the steps it does not matter
    file = checkpoints / str(NEWEST) / "notes.txt"
    file.write_text("a file that no checkpoint has")
    return file


def damaged(damage: Callable[[Path], Path]) -> Case:
    """The newest checkpoint is damaged between two commands."""

    def run(runs: Runs, name: str) -> str:
        file = damage(stopped(runs, name) / "checkpoints")
        ended = runs.run(name)
        assert ended.status == 0, f"status {ended.status}, {ended.said or ended.err[-1500:]}"
        warning = next((line for line in ended.err.splitlines() if "is passed over" in line), "no warning")
        assert str(file) in warning, f"{warning!r} does not name {file}"
        reason = warning.partition(": ")[2].replace(str(runs.path(name)) + "/", "")
        return f"passed over: {reason}; {same(runs, name)}"

    return run


CASES |= {
    "checkpoint with a flipped bit": damaged(flip),
    "checkpoint with a truncated file": damaged(_truncate),
    "checkpoint with a missing file": damaged(_remove("")),
    "checkpoint without a manifest": damaged(_remove("manifest.sha256")),
    "checkpoint that is an empty folder": damaged(_empty),
    "checkpoint with a foreign file": damaged(_foreign),
}
