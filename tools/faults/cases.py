"""The faults that a run must survive: each is a function that causes it in a real run and returns the outcome.

A case takes the runs that cases share (`tiny_run.Runs`) and a name for its run directory. It returns the outcome in
one line, and raises AssertionError if that is not the promised one: after the fault, the same command run again must
end bit for bit like an uninterrupted run. __main__.py prints the outcomes as a table.

Left out on purpose: power cuts (files are flushed and synced, but nothing here cuts the power), and GPUs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.faults.tiny_run import STEPS, Ended, Judge, Runs, differences, metrics
from xpo_jax.checkpointing.checkpoint import Checkpoints
from xpo_jax.experiment.run_recorder import RunRecorder
from xpo_jax.models.hf import model_folder

Case = Callable[[Runs, str], str]
CASES: dict[str, Case] = {}
HANGS_SECONDS = 25


def call_of(function: Callable[..., Any]) -> str:
    """Return the injection point before each call of this function or method."""
    return f"call {function.__module__}:{function.__qualname__}"


JUDGE, SAVE = call_of(Judge.__call__), call_of(Checkpoints.save)
# Starts the gradients and sums of an update, once per step; `accumulate` runs once per micro-batch.
START_OF_UPDATE = "program zeros"


def case(name: str) -> Callable[[Case], Case]:
    """Register a function as the case of this name."""

    def register(function: Case) -> Case:
        CASES[name] = function
        return function

    return register


def expect(ended: Ended, status: int, message: str) -> str:
    """Return how a command ended, which must be with this status and with stderr that matches `message`."""
    outcome = f"status {ended.status}, {ended.message or 'no message'!r}"
    assert ended.status == status, f"{outcome} instead of status {status}: {ended.err[-1500:]}"
    assert re.search(message, ended.err), f"{outcome} does not match {message!r}"
    # on a full disk, tensorstore's threads print tracebacks from asyncio; they do not count
    ours = re.search(r'Traceback[^:]*:\n(?:  .*\n)*?  File ".*/xpo_jax/', ended.err)
    assert not ours or status in (124, -9), f"{outcome}, with a traceback"
    name = {-9: "killed"}.get(status, f"exit {status}")
    return f"{name}: {ended.message}" if ended.message else name


def same_again(runs: Runs, name: str, overrides: Sequence[str] = (), expected: Path | None = None) -> str:
    """Run the same command again, which must end like an uninterrupted run."""
    ended = runs.run(name, overrides)
    assert ended.status == 0, f"again: status {ended.status}, {ended.message or ended.err[-1500:]}"
    return same(runs, name, expected)


def same(runs: Runs, name: str, expected: Path | None = None) -> str:
    """Check that a finished run equals the uninterrupted one bit for bit, and that its last checkpoint is intact."""
    different = differences(runs.path(name), expected or runs.uninterrupted)
    assert not different, (
        f"differs from the uninterrupted run: {', '.join(different[:5])} ({len(different)} in total)"
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
    """A fault that is injected at a point of the run and ends it; a case.

    Args:
      at, call, do: see `inject`.
      status: with which the run ends. message: a regex that its stderr matches.
      overrides: of the config.
    """

    at: str
    call: int
    do: str
    status: int
    message: str
    overrides: tuple[str, ...] = ()

    def fault(self, runs: Runs, name: str) -> str:
        """Run the command with the fault; return how it ended."""
        ended = runs.run(name, self.overrides, {"at": self.at, "call": self.call, "do": self.do})
        assert "injected: " in ended.err, (
            f"call {self.call} of {self.at} was not reached: {ended.err[-1500:]}"
        )
        return expect(ended, self.status, self.message).replace(f"{runs.path(name)}/", "")

    def __call__(self, runs: Runs, name: str) -> str:
        """Run the command with the fault, then the same command again."""
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
        _message = rf"stopped by {_signal} after step \d of {STEPS}, which is saved"
        CASES[f"{_signal} while {_name}"] = Planted(_at, _call, _signal, _status, _message)
    CASES[f"{_signal} twice"] = Planted(
        JUDGE, 5, f"{_signal} {_signal}", _status, f"{_signal} again: exiting at once"
    )
CASES["SIGHUP twice"] = Planted(  # of the terminal, and of its shell
    JUDGE, 5, "SIGHUP SIGHUP", 129, rf"stopped by SIGHUP after step \d of {STEPS}, which is saved"
)
_no_verdict = "the judge gave no verdict on more than 50% of the pairs .* the last weights are in "
CASES |= {
    "SIGTERM while compiling": Planted("compile", 3, "SIGTERM", 143, "stopped by SIGTERM; run the same command"),
    "disk full in a checkpoint": Planted(SAVE, 2, "full 200000", 2, r"checkpoints/\d: cannot be saved .*too large"),
    "disk full in the export": Planted(call_of(model_folder.save), 1, "full 1000", 2, "export.*File too large"),
    "judge raises": Planted(JUDGE, 5, "raise", 2, _no_verdict + "|an injected fault"),
    "judge hangs": Planted(
        JUDGE, 5, "hang", 124, f"step .* has taken more than {HANGS_SECONDS} s", (f"max_step_seconds={HANGS_SECONDS}",)
    ),
    "judge returns prose": Planted(JUDGE, 5, 'answer "A is better"', 2, "A is better.*the last weights are in "),
    "judge returns integers": Planted(JUDGE, 5, "answer 1", 2, "the int 1, which is refused.*the last weights are in "),
    "NaN in all verdicts": Planted(JUDGE, 5, "answer NaN", 2, _no_verdict),
}  # fmt: skip


def full_pairs_log(runs: Runs, call: int, fraction: float) -> Planted:
    """Return a fault by which files cannot grow beyond a fraction of the final pairs log, most likely amid a record."""
    size = int((runs.uninterrupted / "pairs.jsonl").stat().st_size * fraction)
    return Planted(
        call_of(RunRecorder.write_pairs),
        call,
        f"full {size}",
        2,
        "pairs.jsonl: cannot be written .File too large",
    )


@case("disk full in the pairs log")
def _(runs: Runs, name: str) -> str:
    """Fill the disk while the fourth step is written."""
    return full_pairs_log(runs, 4, 0.6)(runs, name)


@case("judge always ties")
def _(runs: Runs, name: str) -> str:
    """Make every pair a tie, which is no fault: only the bonus acts."""
    ended = runs.run(name, (), {"at": JUDGE, "call": 1, "do": 'answer "tie"', "times": 10**6})
    outcome = expect(ended, 0, "")
    rows = metrics(runs.path(name))[1:]
    assert [row["judge/tie_rate"] for row in rows] == [1.0] * STEPS, "not all pairs are ties"
    assert all(row["judge/win_rate"] == 0.5 and row["skipped"] == 0 for row in rows), (
        "a tie does not count half"
    )
    return f"{outcome}: ends normally, every win rate is 0.5"


# ---- numbers ---------------------------------------------------------------------------------------


def _shortened(runs: Runs) -> Path:
    """Return the run of three steps."""
    if not (runs.path("three") / "result.json").exists():
        expect(runs.run("three", ["steps=3"]), 0, "")
    return runs.path("three")


def _weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def _poisoned(output: int) -> Case:
    def run(runs: Runs, name: str) -> str:
        """Spoil the fourth and last update, which must leave the weights of the third."""
        plan = {"at": START_OF_UPDATE, "call": 4, "do": f"nan {output}"}
        expect(runs.run(name, ["steps=4"], plan), 0, "")
        row = metrics(runs.path(name))[-1]
        assert row["step"] == 4 and row["skipped"] == 1, f"the skipped update is not counted: {row}"
        assert _weights(runs.path(name)) == _weights(_shortened(runs)), "the weights were changed"
        return "the update is skipped and counted, the weights stay bit-equal"

    return run


CASES["NaN in the loss"] = _poisoned(1)
CASES["NaN in the gradient"] = _poisoned(0)


@case("NaN in the gradient, twice in a row")
def _(runs: Runs, name: str) -> str:
    """With `max_skipped` 2, end the run, now and when it is repeated; the checkpoint holds the last good weights."""
    plan = {"at": START_OF_UPDATE, "call": 4, "do": "nan 0", "times": 2}
    message = "step 5: loss or gradient was not finite 2 times in a row"
    outcome = expect(runs.run(name, ["steps=5", "max_skipped=2"], plan), 2, message)
    expect(runs.run(name, ["steps=5", "max_skipped=2"]), 2, message)
    expect(runs.run(name, ["steps=5", "max_skipped=3"]), 0, "")
    assert _weights(runs.path(name)) == _weights(_shortened(runs)), (
        "the checkpoint does not hold the last good weights"
    )
    outcome = outcome.replace(f"{runs.path(name)}/", "")
    return f"{outcome}; the checkpoint holds the last good weights, bit for bit"
