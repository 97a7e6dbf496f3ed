"""Faults injected into the real command: a dozen of `make faults`, one after another into one run, and random kills.

`python -m tools.faults` injects all of them; docs/reliability.md states what is promised.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.paraphrase import get_config
from tools import torture
from tools.faults import __main__ as faults
from tools.faults import inject, user_cases
from tools.faults.cases import CASES, Planted, full_pairs_log, same_again
from tools.faults.checkpoint_cases import NEWEST, flip
from tools.faults.plans import END, START, NotStruck, Plan
from tools.faults.tiny_run import ROOT, Runs, differences
from xpo_jax.experiment.session import Session

SENTINEL = "-".join(("sentinel", "4711"))  # environment.json has the diff of this file
SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "JUDGE_PASSWORD", "http_proxy")
assert user_cases  # importing it registers its cases, and those of the modules before it


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs whose uninterrupted run had an environment full of secrets."""
    runs = Runs(tmp_path_factory.mktemp("faults"))
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, f"http://me:{SENTINEL}@host:1")
        assert runs.uninterrupted.is_dir()
    return runs


def test_run_directory_holds_no_secret_of_the_environment(runs):
    files = [path for path in runs.uninterrupted.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SENTINEL.encode() in path.read_bytes()] == []


# Each fault strikes in the first step after the previous fault, or in a step of its own.
CHAIN = [
    ("kill -9 while compiling", {}),
    ("judge raises", {"step": 1}),
    ("SIGTERM while judging", {"step": 1, "message": "after step 1 of 6, which is saved"}),
    ("disk full in the pairs log", {"step": 2}),
    ("SIGINT while sampling", {"step": 2, "message": "after step 2 of 6, which is saved"}),
    ("checkpoint with a flipped bit", {}),
    ("kill -9 during its asynchronous commit", {"message": r"checkpoint 2 is passed over: .* is damaged"}),
    ("kill -9 during the manifest", {}),
    ("kill -9 while updating", {"step": 4}),
    ("kill -9 while exporting", {}),
    ("kill -9 before the export is in its place", {}),
]


@pytest.mark.slow
def test_a_dozen_faults_one_after_the_other_leave_no_trace(runs):
    for name, changes in CHAIN:
        if name == "checkpoint with a flipped bit":
            flip(runs.path("chain") / "checkpoints")
            continue
        fault = full_pairs_log(runs, 2, 0.3) if name == "disk full in the pairs log" else CASES[name]
        plan = dataclasses.replace(fault.plan, step=changes.get("step", fault.plan.step))
        message = changes.get("message", fault.message)
        dataclasses.replace(fault, plan=plan, message=message).fault(runs, "chain")
    assert same_again(runs, "chain") == "bit-equal after the same command again"


@pytest.mark.slow
def test_random_kills_lose_nothing(runs):
    lines = list(torture.torture(runs, kills=3, seed=1))
    kills, ends = ([line for line in lines if line["event"] == event] for event in ("kill", "end"))
    assert [line["kill"] for line in kills] == [1, 2, 3] and sum(line["kills"] for line in ends) == 3
    assert all(line["bit_equal"] for line in ends)
    expected = f"3 kills over {len(ends)} runs in 9 s: no run lost, {len(ends)} of {len(ends)} bit-equal"
    assert torture.summary(lines, 9.1).startswith(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_fault(runs, name):
    assert faults.try_one(runs, name)[0], name


# ---- where a fault strikes, and the proof that it did -----------------------------------------------


def plan_of(step, at="program sample", **changes):
    return Plan(**{"at": at, "step": step, "do": "raise", **changes})


@pytest.mark.parametrize(
    ("plan", "strikes"),
    [
        (plan_of(START), [START]),
        (plan_of(2), [2]),
        (plan_of(2, call=2), [2]),
        (plan_of((1, 3)), [1, 3]),
        (plan_of((START, 2, END), call=None), [START, START, START, 2, 2, END, END]),
        (plan_of(None, "rename checkpoints/4/state$"), [START]),  # any: its path has the step
    ],
)
def test_injector_strikes_in_the_planned_steps_only(plan, strikes, monkeypatch, capfd):
    """A run makes three calls before its first step, two in each step and two after the last."""
    profiler = SimpleNamespace(_profiler=SimpleNamespace(at=lambda done: None))
    monkeypatch.setattr(Session, "begin_step", Session.begin_step)
    monkeypatch.setattr(Session, "end", lambda self, state, base, done: {"steps": done})
    injector, struck = inject.Injector(plan), []
    inject.follow_steps(injector)

    def call(times):
        struck.extend(injector.step for _ in range(times) if injector.due())

    call(3)
    for done in range(3):
        Session.begin_step(profiler, done)
        call(2)
    assert Session.end(profiler, None, {}, 3) == {"steps": 3}
    call(2)
    assert struck == strikes
    err = capfd.readouterr().err
    assert err.splitlines() == [plan.line(step) for step in dict.fromkeys(strikes)]  # one line for each step
    plan.require_struck(err)


def test_injector_strikes_the_named_program_only(capfd):
    injector, called = inject.Injector(plan_of(START, "program score")), []
    program = inject._wrapped(injector, lambda self: called.append(self.name), "score")
    program(SimpleNamespace(name="sample"))
    with pytest.raises(RuntimeError, match="an injected fault"):
        program(SimpleNamespace(name="score"))
    assert called == ["sample"]
    assert capfd.readouterr().err == "injected: raise at program score before the first step\n"


@pytest.mark.parametrize(
    ("plan", "seen"),
    [
        (plan_of(3), ""),
        (plan_of(3), plan_of(4).line(4)),
        (plan_of(3), plan_of(3, "program score").line(3)),
        (plan_of(3), plan_of(3, do="hang").line(3)),
        (plan_of(3), plan_of(33).line(33)),
        (plan_of((3, 4)), plan_of(3).line(3)),
        (plan_of(None, "open checkpoints/4/state"), plan_of(4, "open checkpoints/2/state").line(4)),
    ],
)
def test_plan_struck_elsewhere_or_nowhere_is_not_struck(plan, seen):
    with pytest.raises(NotStruck, match=r"the fault was not struck: no \['injected: raise at "):
        plan.require_struck(f"a line\n{seen}\nxpo_jax: ended\n")


@pytest.mark.parametrize("step", [0, -1, "last", None, (), 2.0, True])
def test_plan_without_a_step_is_refused(step):
    with pytest.raises(ValueError, match=r"^(program sample|step)"):
        plan_of(step)


class Unharmed(Runs):
    """Runs whose commands succeed at once and change nothing: no case can inject its fault."""

    @contextlib.contextmanager
    def started(self, *args, **options):
        shown = '{"run_dir": "runs/unharmed"}'
        process = SimpleNamespace(
            communicate=lambda timeout: (shown, "a line\n"),
            returncode=0,
            pid=1,
            wait=lambda: 0,
            stderr=SimpleNamespace(readline=lambda: ""),
        )
        yield process


@pytest.fixture(scope="module")
def unharmed(runs, tmp_path_factory):
    """Runs that are unharmed, with the run directories that cases share."""
    unharmed = Unharmed(tmp_path_factory.mktemp("unharmed"))
    for name in ("uninterrupted", "stopped", "three", "pair"):
        shutil.copytree(runs.uninterrupted, unharmed.path(name))
    checkpoints = unharmed.path("stopped") / "checkpoints"
    (checkpoints / "6").rename(checkpoints / str(NEWEST))
    unharmed.__dict__["uninterrupted"] = unharmed.path("uninterrupted")
    return unharmed


@pytest.mark.parametrize("name", CASES)
def test_every_case_whose_fault_is_not_struck_fails_and_says_so(unharmed, monkeypatch, name):
    """Neither the planned faults nor what the case itself does to files and folders takes effect."""
    monkeypatch.setattr(os, "truncate", lambda *_: None)
    for change in ("write_bytes", "write_text", "unlink", "mkdir", "chmod"):
        monkeypatch.setattr(Path, change, lambda *_, **__: None)
    passed, outcome = faults.try_one(unharmed, name)
    assert not passed and outcome.startswith("the fault was not struck: "), outcome


# ---- what compares, and what shows ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("export/model.safetensors", "export/model.safetensors"),
        ("pairs.jsonl", "pairs.jsonl"),
        ("samples/held_out.md", "samples/held_out.md"),
        ("metrics.jsonl", r"metrics\.jsonl, step \d, "),
    ],
)
def test_differences_one_changed_bit_is_named(runs, file, name):
    path = runs.copy("uninterrupted", "altered") / file
    assert differences(path.parents[len(Path(file).parts) - 1], runs.uninterrupted) == []
    data = bytearray(path.read_bytes())
    at = data.rindex(b"1") if file == "metrics.jsonl" else len(data) // 2
    data[at] ^= 1
    path.write_bytes(data)
    (different,) = differences(runs.path("altered"), runs.uninterrupted)
    assert re.match(name, different)


def test_differences_temporary_file_left_over_is_named(runs):
    (runs.copy("uninterrupted", "altered") / ".export.partial").mkdir()
    assert differences(runs.path("altered"), runs.uninterrupted) == [".export.partial is left over"]


REQUIRED = """\
kill -9: while compiling, while sampling, while judging, while updating, before a checkpoint, while a checkpoint,
  after a checkpoint, during its asynchronous commit, during the manifest, while exporting
SIGTERM: while sampling, while judging
SIGINT: while sampling, while judging
SIGHUP: while sampling, while judging, twice, that is ignored
console: closed, gone
input: changed
disk full: in a checkpoint, in the pairs log, in the export
checkpoint: with a flipped bit, with a truncated file, with a missing file, without a manifest,
  that is an empty folder, with a foreign file
judge: raises, hangs, returns, always ties, edits what it is given
NaN in: the loss, the gradient, all verdicts
config changed in: allowed, a forbidden
mesh: changed
number of processes: changed
run directory: of something else, that cannot be written, in use
of two processes: one is killed, one raises
"""


def test_cases_cover_every_required_fault():
    for line in REQUIRED.replace("\n  ", " ").splitlines():
        start, _, ends = line.partition(": ")
        for end in ends.split(", "):
            assert any(name.startswith(f"{start} {end.strip(',')}") for name in CASES), f"{start} {end}"


def promises():
    """Return the last cell of each row of the page's first table."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (?!promise|status|\d).+ \| (.+) \|$", page, re.MULTILINE)


def names_case(name, case):
    return name.removesuffix(" ...") in case


def test_reliability_page_every_promise_names_faults_or_tests_that_exist():
    assert len(promises()) > 20
    for shown in promises():
        names = re.findall(r"`([^`]+)`", shown)
        files = re.findall(r"tests/\w+\.py", shown)
        assert names or files, shown
        for name in names:
            assert name == "tools.torture" or any(names_case(name, case) for case in CASES), name
        assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("case", CASES)
def test_reliability_page_has_a_promise_for_every_fault(case):
    names = [name for shown in promises() for name in re.findall(r"`([^`]+)`", shown)]
    assert any(names_case(name, case) for name in names)


def test_main_prints_a_row_per_fault_and_exits_1_on_failure(monkeypatch, capsys):
    def fails(runs, name):
        raise AssertionError("it is\ndifferent")

    monkeypatch.setattr(faults.cases, "CASES", {"a fault": lambda runs, name: "fixed", "worse": fails})
    assert faults.main([]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^a fault +fixed +passed$", out, re.MULTILINE)
    assert re.search(r"^worse +it is different +FAILED$", out, re.MULTILINE)
    assert out.splitlines()[-1].startswith("1 of 2 faults had the promised outcome")
    assert faults.main(["--only=a f"]) == 0 and faults.main(["--list"]) == 0
    assert capsys.readouterr().out.endswith("a fault\nworse\n")
    assert faults.main(["--only=none"]) == 2 and torture.main(["--kills=0"]) == 2


# ---- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["..", "../..", "a/..", "o/n@../../x", "/", "./../x/"])
def test_run_dir_of_any_model_name_stays_in_runs(model):
    assert Path(get_config(model).run_dir).parent == Path("runs")


def test_started_command_under_nohup_does_not_ignore_sighup(runs):
    code = "import signal, sys; sys.exit(signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert runs.run("no run", within=(sys.executable, "-c", code)).status == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert runs.run("no run", within=("nohup", sys.executable, "-c", code)).status == 1
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", [name for name in CASES if isinstance(CASES[name], Planted)])
def test_command_with_a_plan_passes_it_as_json(unharmed, name):
    plan = CASES[name].plan
    command = unharmed.command("x", (), plan)
    assert command[1:3] == ["-m", "tools.faults.inject"] and Plan.from_json(command[3]) == plan
