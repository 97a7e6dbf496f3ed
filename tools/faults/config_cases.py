"""Faults around a run: its config, its devices, its folder, and the other processes. See cases.py.

Where it may go on changed, what was saved must be restored equal: a run that ends where it was stopped has to
export the same weights whatever it is restored onto.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tools.faults.cases import JUDGE, NEWEST, call_of, case, expect, same, same_again, stopped
from tools.faults.tiny_run import STEPS, Runs
from xpo_jax.judges import ask

# ---- config, mesh, processes ----------------------------------------------------------------------


@case("config changed in allowed fields")
def _(runs: Runs, name: str) -> str:
    """None of these changes what is learned or told."""
    stopped(runs, name)
    changed = [
        "logging.table_every_steps=2",
        "checkpoint.keep_last=3",
        "max_skipped=7",
        "max_step_seconds=900",
    ]
    return same_again(runs, name, changed)


@case("more steps than the run was made for")
def _(runs: Runs, name: str) -> str:
    """A finished run goes on; its learning rate does not depend on the number of steps."""
    expect(runs.run(name, ["steps=3"]), 0, "")
    expect(runs.run(name), 0, "")
    assert _weights(runs.path(name)).keys() == _weights(runs.whole).keys()
    _equal(runs.path(name), runs.whole)
    return "three steps, then six: the weights are bit for bit those of six at once"


@case("config changed in a forbidden field")
def _(runs: Runs, name: str) -> str:
    """Refused with a diff, unless it is accepted; the folder stays as it was."""
    before = _content(stopped(runs, name))
    changed = ["seed=4", "optimizer.learning_rate=0.02"]
    said = r"another config \(optimizer.learning_rate: 0.01 there, 0.02 here; seed: 0 there, 4 here\)"
    happened = expect(runs.run(name, changed), 2, said)
    assert _content(runs.path(name)) == before, "the folder is not as it was"
    accepted = runs.copy(name, f"{name}-accepted")
    happened += (
        f"; with --accept-changes: {expect(runs.run(accepted.name, [*changed, '--accept-changes']), 0, '')}"
    )
    return f"{happened.replace(str(runs.path(name)), name)}; {same_again(runs, name)}"


def _elsewhere(runs: Runs, name: str, go_on: object) -> str:
    """`go_on(name, overrides)` goes on elsewhere: first to where it was stopped, then to the end."""
    here = f"{name}-here"
    for each in (name, here):
        stopped(runs, each)
    expect(runs.run(here, [f"steps={NEWEST}"]), 0, "")
    go_on(name, [f"steps={NEWEST}"])  # type: ignore[operator]
    _equal(runs.path(name), runs.path(here))
    go_on(name, [])  # type: ignore[operator]
    result = json.loads((runs.path(name) / "result.json").read_bytes())
    assert result["steps"] == STEPS and result["skipped"] == 0, f"{result}"
    theirs = _weights(runs.whole)
    apart = max(np.abs(array - theirs[key]).max() for key, array in _weights(runs.path(name)).items())
    return f"values restored equal; at the end weights differ by {apart:.1g} from those of one device"


@case("mesh changed")
def _(runs: Runs, name: str) -> str:
    """From one device to eight, split in three ways."""
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    return _elsewhere(
        runs, name, lambda name, steps: expect(runs.run(name, [*mesh, *steps], devices=8), 0, "")
    )


@case("number of processes changed")
def _(runs: Runs, name: str) -> str:
    """From one to two, with a device each."""

    def both(name: str, steps: list[str]) -> None:
        for ended in runs.run_many(name, [None, None], steps):
            expect(ended, 0, "")

    return _elsewhere(runs, name, both)


# ---- run directories -------------------------------------------------------------------------------


@case("run directory of something else")
def _(runs: Runs, name: str) -> str:
    """Not even a file is added to it."""
    folder = runs.path(name)
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    happened = expect(runs.run(name), 2, "is not empty and not a run of xpo_jax .it holds thesis.txt.")
    assert _content(folder) == {"thesis.txt": b"years of work"}, "something was written into it"
    return happened.replace(str(folder), name)


@case("run directory that cannot be written")
def _(runs: Runs, name: str) -> str:
    """For root, who may write everywhere, a file stands in its place."""
    runs.path("").mkdir(exist_ok=True)
    above = runs.folder / f"{name}-above"
    if os.geteuid() == 0:
        above.write_text("")
    else:
        above.mkdir()
        above.chmod(0o500)
    ended = runs.run(name, [f"run_dir={above / 'run'}"])
    how = "a file in its place" if os.geteuid() == 0 else "a folder that is read-only"
    return f"{how}: {expect(ended, 2, 'cannot be created|is not a folder').replace(str(runs.folder), '.')}"


@case("run directory in use by another run")
def _(runs: Runs, name: str) -> str:
    """The second is refused and the first not disturbed."""
    with runs.started(name, (), {"at": JUDGE, "call": 5, "do": "hang"}) as first:
        assert first.stderr is not None
        while "planted: " not in (line := first.stderr.readline()):
            assert line, f"the first ended, with status {first.wait()}"
        happened = expect(runs.run(name), 2, f"is in use by another process .number {first.pid} on ")
    return f"{happened.replace(str(runs.path(name)), name)}; {same_again(runs, name)}"


# ---- of two processes ------------------------------------------------------------------------------


def _pair(runs: Runs) -> Path:
    """The run of two processes that nothing happened to."""
    if not (runs.path("pair") / "result.json").exists():
        for ended in runs.run_many("pair", [None, None]):
            expect(ended, 0, "")
    return runs.path("pair")


def _of_two(runs: Runs, name: str, at: str, call: int, do: str, statuses: tuple[int, int]) -> str:
    plan = {"at": at, "call": call, "do": do}
    first, second = runs.run_many(name, [None, plan])
    assert "planted: " in second.err, second.err[-1500:]
    told = f"exit statuses {first.status} and {second.status}"
    assert (first.status, second.status) == statuses, f"{told}: {first.err[-1500:]} {second.err[-1500:]}"
    for ended in runs.run_many(name, [None, None]):
        assert ended.status == 0, f"again: status {ended.status}, {ended.err[-1500:]}"
    return f"{told}, the first says {first.said!r}; {same(runs, name, _pair(runs))}"


@case("of two processes one is killed")
def _(runs: Runs, name: str) -> str:
    """The other ends, too."""
    return _of_two(runs, name, "program apply", 4, "SIGKILL", (1, -9))


@case("of two processes one raises while judging")
def _(runs: Runs, name: str) -> str:
    """Both end with what it said."""
    return _of_two(runs, name, call_of(ask.ask), 4, "raise", (2, 2))


@case("of two processes one raises elsewhere")
def _(runs: Runs, name: str) -> str:
    """Where the other cannot know it."""
    return _of_two(runs, name, "program apply", 4, "raise", (1, 1))


@case("of two processes one gets SIGTERM")
def _(runs: Runs, name: str) -> str:
    """Both finish the step, save and end."""
    return _of_two(runs, name, "program apply", 4, "SIGTERM", (143, 143))


def _content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "export" / "model.safetensors")


def _equal(run: Path, expected: Path) -> None:
    here, there = ((each / "export" / "model.safetensors").read_bytes() for each in (run, expected))
    assert here == there, f"weights differ: {run} and {expected}"
