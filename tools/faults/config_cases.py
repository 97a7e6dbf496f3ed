"""Faults around a run: its config, its devices, its directory, and other processes. See cases.py.

Where a run may resume with changes, its checkpoint must be restored exactly: a run that ends where it was stopped
must export the same weights, on any devices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tools.faults.cases import JUDGE, call_of, case, expect, same, same_again
from tools.faults.checkpoint_cases import NEWEST, contents, stopped
from tools.faults.plans import Plan, Step, struck
from tools.faults.tiny_run import STEPS, Runs
from xpo_jax.judges import ask

# ---- config, mesh, processes ----------------------------------------------------------------------


def recorded(run: Path, file: str) -> dict[str, Any]:
    """Return what a JSON file of a run directory holds; nothing if it is absent."""
    path = run / file
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _overrides(fields: Mapping[str, float]) -> list[str]:
    return [f"{path}={value}" for path, value in fields.items()]


def _values(run: Path, fields: Iterable[str]) -> dict[str, Any]:
    """Return the values of fields in a run's config.json."""
    values = {}
    for path in fields:
        value: Any = recorded(run, "config.json")
        for part in path.split("."):
            value = value.get(part, {})
        values[path] = value
    return values


@case("config changed in allowed fields")
def _(runs: Runs, name: str) -> str:
    """Resume with changed fields that affect neither training nor metrics."""
    run = stopped(runs, name)
    changed = {
        "logging.table_every_steps": 2,
        "checkpoint.keep_last": 3,
        "max_skipped": 7,
        "max_step_seconds": 900,
    }
    before = _values(run, changed)
    ended = runs.run(name, _overrides(changed))
    after = _values(run, changed)
    struck(all(before[path] != after[path] for path in changed), f"the run's fields are still among {before}")
    assert after == changed, f"the run has other fields: {after}"
    assert ended.status == 0, f"status {ended.status}, {ended.message or ended.err[-1500:]}"
    return same(runs, name)


@case("more steps than the run was made for")
def _(runs: Runs, name: str) -> str:
    """Continue a finished run; its learning rate does not depend on the number of steps."""
    expect(runs.run(name, ["steps=3"]), 0, "")
    struck(
        recorded(runs.path(name), "result.json").get("steps") == 3, "the run has not ended after three steps"
    )
    expect(runs.run(name), 0, "")
    assert _weights(runs.path(name)).keys() == _weights(runs.uninterrupted).keys()
    _equal(runs.path(name), runs.uninterrupted)
    return "three steps, then six: the weights are bit-equal to those of six steps at once"


@case("config changed in a forbidden field")
def _(runs: Runs, name: str) -> str:
    """Refuse changes with a diff, unless they are accepted; leave the directory unchanged."""
    changed = {"seed": 4, "optimizer.learning_rate": 0.02}
    accepted = stopped(runs, f"{name}-accepted")
    ended = runs.run(accepted.name, [*_overrides(changed), "--accept-changes"])
    struck(_values(accepted, changed) == changed, f"the run's fields are {_values(accepted, changed)}")
    before = contents(stopped(runs, name))
    message = r"another config \(optimizer.learning_rate: 0.01 there, 0.02 here; seed: 0 there, 4 here\)"
    outcome = expect(runs.run(name, _overrides(changed)), 2, message)
    assert contents(runs.path(name)) == before, "the directory was changed"
    outcome += f"; with --accept-changes: {expect(ended, 0, '')}"
    return f"{outcome.replace(str(runs.path(name)), name)}; {same_again(runs, name)}"


def _on_other_devices(runs: Runs, name: str, resume: Callable[[str, list[str]], object]) -> str:
    """Resume a stopped run with `resume(name, overrides)`: first to the step of its checkpoint, then to the end."""
    unchanged = f"{name}-unchanged"
    for run in (name, unchanged):
        stopped(runs, run)
    expect(runs.run(unchanged, [f"steps={NEWEST}"]), 0, "")
    resume(name, [f"steps={NEWEST}"])
    _equal(runs.path(name), runs.path(unchanged))
    resume(name, [])
    result = json.loads((runs.path(name) / "result.json").read_bytes())
    assert result["steps"] == STEPS and result["skipped"] == 0, f"{result}"
    expected = _weights(runs.uninterrupted)
    apart = max(np.abs(array - expected[key]).max() for key, array in _weights(runs.path(name)).items())
    return f"restored bit-equal; at the end, weights differ by {apart:.1g} from those of one device"


@case("mesh changed")
def _(runs: Runs, name: str) -> str:
    """Resume on eight devices, split in three ways, instead of one."""
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}

    def split(name: str, steps: list[str]) -> None:
        expect(runs.run(name, [*_overrides(mesh), *steps], devices=8), 0, "")
        values = _values(runs.path(name), mesh)
        struck(values == mesh, f"the run's fields are {values}")

    return _on_other_devices(runs, name, split)


@case("number of processes changed")
def _(runs: Runs, name: str) -> str:
    """Resume with two processes of one device each instead of one process."""

    def both(name: str, steps: list[str]) -> None:
        for ended in runs.run_many(name, [None, None], steps):
            expect(ended, 0, "")
        processes = recorded(runs.path(name), "environment.json").get("processes")
        struck(processes == 2, f"the run had {processes} processes")

    return _on_other_devices(runs, name, both)


# ---- run directories -------------------------------------------------------------------------------


@case("run directory of something else")
def _(runs: Runs, name: str) -> str:
    """Add not even a file to the directory."""
    folder = runs.path(name)
    folder.mkdir(parents=True)
    thesis = folder / "thesis.txt"
    thesis.write_text("years of work")
    struck(thesis.is_file(), f"{thesis} was not written")
    outcome = expect(runs.run(name), 2, "is not empty and not a run of xpo_jax .it holds thesis.txt.")
    assert contents(folder) == {thesis: b"years of work"}, "something was written into it"
    return outcome.replace(str(folder), name)


@case("run directory that cannot be written")
def _(runs: Runs, name: str) -> str:
    """Make the directory read-only; root, who may write anywhere, gets a file in its place."""
    runs.path("").mkdir(exist_ok=True)
    above = runs.folder / f"{name}-above"
    if os.geteuid() == 0:
        above.write_text("")
    else:
        above.mkdir()
        above.chmod(0o500)
    struck(not _can_be_made(above / "run"), f"{above / 'run'} can be made")
    ended = runs.run(name, [f"run_dir={above / 'run'}"])
    how = "a file in its place" if os.geteuid() == 0 else "a folder that is read-only"
    return f"{how}: {expect(ended, 2, 'cannot be created|is not a folder').replace(str(runs.folder), '.')}"


@case("run directory in use by another run")
def _(runs: Runs, name: str) -> str:
    """Refuse the second run without disturbing the first."""
    plan = Plan(at=JUDGE, step=3, do="hang")
    with runs.started(name, (), plan) as first:
        assert first.stderr is not None
        while plan.line(3) not in (line := first.stderr.readline()):
            if not line:
                struck(False, f"the first run ended, with status {first.wait()}")
        outcome = expect(runs.run(name), 2, f"is in use by another process .number {first.pid} on ")
    return f"{outcome.replace(str(runs.path(name)), name)}; {same_again(runs, name)}"


# ---- two processes ------------------------------------------------------------------------------


def _pair(runs: Runs) -> Path:
    """Return the uninterrupted run of two processes."""
    if not (runs.path("pair") / "result.json").exists():
        for ended in runs.run_many("pair", [None, None]):
            expect(ended, 0, "")
    return runs.path("pair")


def _of_two(runs: Runs, name: str, at: str, step: Step, do: str, statuses: tuple[int, int]) -> str:
    first, second = runs.run_many(name, [None, Plan(at=at, step=step, do=do)])
    outcome = f"exit statuses {first.status} and {second.status}"
    assert (first.status, second.status) == statuses, f"{outcome}: {first.err[-1500:]} {second.err[-1500:]}"
    for ended in runs.run_many(name, [None, None]):
        assert ended.status == 0, f"again: status {ended.status}, {ended.err[-1500:]}"
    return f"{outcome}, the first with {first.message!r}; {same(runs, name, _pair(runs))}"


@case("of two processes one is killed")
def _(runs: Runs, name: str) -> str:
    """Kill one process; the other ends as well."""
    return _of_two(runs, name, "program apply", 4, "SIGKILL", (1, -9))


@case("of two processes one raises while judging")
def _(runs: Runs, name: str) -> str:
    """Raise in one process; both end with its message."""
    return _of_two(runs, name, call_of(ask.ask), 4, "raise", (2, 2))


@case("of two processes one raises elsewhere")
def _(runs: Runs, name: str) -> str:
    """Raise in one process at a point where the other cannot learn of it."""
    return _of_two(runs, name, "program apply", 4, "raise", (1, 1))


@case("of two processes one gets SIGTERM")
def _(runs: Runs, name: str) -> str:
    """Send one process SIGTERM; both finish the step, save and end."""
    return _of_two(runs, name, "program apply", 4, "SIGTERM", (143, 143))


def _can_be_made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except OSError:
        return False
    return True


def _weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "export" / "model.safetensors")


def _equal(run: Path, expected: Path) -> None:
    old, new = ((folder / "export" / "model.safetensors").read_bytes() for folder in (expected, run))
    assert old == new, f"weights differ: {run} and {expected}"
