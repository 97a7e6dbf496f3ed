"""Damage to the newest checkpoint between two commands. See cases.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tools.faults.cases import CASES, Case, expect, same
from tools.faults.plans import Plan, struck
from tools.faults.tiny_run import STEPS, Runs

NEWEST = 5  # the last checkpoint of a stopped run, see `stopped`


def stopped(runs: Runs, name: str) -> Path:
    """Return a new directory of a run that was stopped after step 5; its checkpoints 4 and 5 are intact."""
    if not runs.path("stopped").exists():
        plan = Plan(at="program apply", step=NEWEST, do="SIGTERM")
        expect(runs.run("stopped", (), plan), 143, f"after step {NEWEST} of {STEPS}, which is saved")
    return runs.copy("stopped", name)


def _largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(checkpoints: Path) -> Path:
    """Flip one bit in the largest file of the newest intact checkpoint; return the file."""
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
    (checkpoints / "notes").mkdir()  # a folder that is no step is ignored
    file = checkpoints / str(NEWEST) / "notes.txt"
    file.write_text("not a file of a checkpoint")
    return file


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return what each file below a folder holds; None for a folder."""
    return {path: None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def damaged(damage: Callable[[Path], Path], *, adds: bool = False) -> Case:
    """Return a case that damages the newest checkpoint between two commands.

    Args:
      damage: does that to the folder of checkpoints, and returns the file that it has changed, removed or added.
      adds: whether that file is a new one.
    """

    def run(runs: Runs, name: str) -> str:
        checkpoints = stopped(runs, name) / "checkpoints"
        before = contents(checkpoints)
        file = damage(checkpoints)
        after = contents(checkpoints)
        struck((file in before) != adds, f"{file} was {'present already' if adds else 'absent'}")
        absent = b"absent"
        struck(before.get(file, absent) != after.get(file, absent), f"{file} is what it was")
        ended = runs.run(name)
        assert ended.status == 0, f"status {ended.status}, {ended.message or ended.err[-1500:]}"
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
    "checkpoint that is an empty folder": damaged(_empty, adds=True),
    "checkpoint with a foreign file": damaged(_foreign, adds=True),
}
