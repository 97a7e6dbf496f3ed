"""The faults that a run must survive: each is a function that causes it in a real run and returns the outcome.

A case takes the runs that cases share (`tiny_run.Runs`) and a name for its run directory. It returns the outcome in
one line, and raises AssertionError if that is not the promised one: after the fault, the same command run again must
end bit for bit like an uninterrupted run. It raises NotStruck if the fault did not happen at all: `Runs` checks every
plan, a case that changes something from outside uses `plans.struck`. __main__.py prints the outcomes as a table.

Left out on purpose: power cuts (files are flushed and synced, but nothing here cuts the power), and GPUs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.faults.plans import END, START, Plan, Step
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
      plan: where it strikes.
      status: with which the run ends. message: a regex that its stderr matches.
      overrides: of the config.
    """

    plan: Plan
    status: int
    message: str
    overrides: tuple[str, ...] = ()

    def fault(self, runs: Runs, name: str) -> str:
        """Run the command with the fault; return how it ended."""
        ended = runs.run(name, self.overrides, self.plan)
        return expect(ended, self.status, self.message).replace(f"{runs.path(name)}/", "")

    def __call__(self, runs: Runs, name: str) -> str:
        """Run the command with the fault, then the same command again."""
        return f"{self.fault(runs, name)}; {same_again(runs, name, self.overrides)}"


def planted(at: str, step: Step | None, do: str, status: int, message: str, *overrides: str) -> Planted:
    """Return the case of a fault that is struck at the first call of its point in a step."""
    return Planted(Plan(at=at, step=step, do=do), status, message, overrides)


KILLS: dict[str, tuple[str, Step | None]] = {
    "while compiling": ("compile fingerprint", START),
    "while sampling": ("program sample", 4),
    "while judging": (JUDGE, 3),
    "while updating": ("program apply", 5),
    "while an evaluation is written": ("rename evaluations/3.json$", 3),
    "before a checkpoint is written": (SAVE, 4),
    "while a checkpoint is written": ("open checkpoints/4/state.*/_METADATA$", None),
    "during its asynchronous commit": ("rename checkpoints/4/state$", None),
    "during the manifest": ("rename checkpoints/4/manifest.sha256$", None),
    "after a checkpoint is written": ("remove checkpoints/2/manifest.sha256$", None),
    "while an older one is removed": ("remove checkpoints/2$", None),
    "while exporting": (r"open \.export\.partial/README", END),
    "before the export is in its place": ("rename /export$", END),
    "after the export": (r"open \.result\.json", END),
}
for _name, (_at, _step) in KILLS.items():
    CASES[f"kill -9 {_name}"] = planted(_at, _step, "SIGKILL", -9, "")
for _signal, _status in (("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)):
    for _name, _at, _after in (("sampling", "program sample", 4), ("judging", JUDGE, 3)):
        _message = rf"stopped by {_signal} after step {_after} of {STEPS}, which is saved"
        CASES[f"{_signal} while {_name}"] = planted(_at, _after, _signal, _status, _message)
    if _signal != "SIGHUP":  # of which a terminal and its shell may send two
        _message = f"{_signal} again: exiting at once"
    CASES[f"{_signal} twice"] = planted(JUDGE, 3, f"{_signal} {_signal}", _status, _message)
_no_verdict = "the judge gave no verdict on more than 50% of the pairs .* the last weights are in "
CASES |= {
    "SIGTERM while compiling": planted(
        "compile fingerprint", START, "SIGTERM", 143, "stopped by SIGTERM; run the same command"
    ),
    "disk full in a checkpoint": planted(SAVE, 4, "full 200000", 2, "checkpoints/4: cannot be saved .*too large"),
    "disk full in the export": planted(call_of(model_folder.save), END, "full 1000", 2, "export.*File too large"),
    "judge raises": planted(JUDGE, 3, "raise", 2, _no_verdict + "|an injected fault"),
    "judge hangs": planted(
        JUDGE, 3, "hang", 124, f"step 3 has taken more than {HANGS_SECONDS} s", f"max_step_seconds={HANGS_SECONDS}"
    ),
    "judge returns prose": planted(JUDGE, 3, 'answer "A is better"', 2, "A is better.*the last weights are in "),
    "judge returns integers": planted(JUDGE, 3, "answer 1", 2, "the int 1, which is refused.*the last weights are in "),
    "NaN in all verdicts": planted(JUDGE, 3, "answer NaN", 2, _no_verdict),
}  # fmt: skip


def full_pairs_log(runs: Runs, step: int, fraction: float) -> Planted:
    """Return a fault by which files cannot grow beyond a fraction of the final pairs log, most likely amid a record."""
    size = int((runs.uninterrupted / "pairs.jsonl").stat().st_size * fraction)
    message = "pairs.jsonl: cannot be written .File too large"
    return planted(call_of(RunRecorder.write_pairs), step, f"full {size}", 2, message)


@case("disk full in the pairs log")
def _(runs: Runs, name: str) -> str:
    """Fill the disk while the fourth step is written."""
    return full_pairs_log(runs, 4, 0.6)(runs, name)


def of_all_judgements(do: str) -> Plan:
    """Return the plan that takes an action in every call of the judge, of the evaluation at the start and each step."""
    return Plan(at=JUDGE, step=(START, *range(1, STEPS + 1)), do=do, call=None)


@case("judge always ties")
def _(runs: Runs, name: str) -> str:
    """Make every pair a tie, which is no fault: only the bonus acts."""
    ended = runs.run(name, (), of_all_judgements('answer "tie"'))
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
        plan = Plan(at="program accumulate", step=4, do=f"nan {output}")
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
    plan = Plan(at="program accumulate", step=(4, 5), do="nan 0")
    message = "step 5: loss or gradient was not finite 2 times in a row"
    outcome = expect(runs.run(name, ["steps=5", "max_skipped=2"], plan), 2, message)
    expect(runs.run(name, ["steps=5", "max_skipped=2"]), 2, message)
    expect(runs.run(name, ["steps=5", "max_skipped=3"]), 0, "")
    assert _weights(runs.path(name)) == _weights(_shortened(runs)), (
        "the checkpoint does not hold the last good weights"
    )
    outcome = outcome.replace(f"{runs.path(name)}/", "")
    return f"{outcome}; the checkpoint holds the last good weights, bit for bit"
