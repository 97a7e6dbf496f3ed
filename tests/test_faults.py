"""Faults injected into the real command: a dozen of `make faults`, one after another into one run, and random kills.

`python -m tools.faults` injects all of them; docs/reliability.md states what is promised.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from configs.paraphrase import get_config
from tools import torture
from tools.faults import __main__ as faults
from tools.faults import config_cases
from tools.faults.cases import CASES, Planted, full_pairs_log, same_again
from tools.faults.checkpoint_cases import flip
from tools.faults.tiny_run import ROOT, STEPS, Runs, differences

SENTINEL = "sentinel-4711"
SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "JUDGE_PASSWORD", "http_proxy")
assert config_cases  # importing it registers its cases


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


# The call that a fault hits depends on how far the run got before.
CHAIN = [
    ("kill -9 while compiling", {}),
    ("judge raises", {"call": 3}),  # after two calls of the evaluation at the start
    ("SIGTERM while judging", {"call": 1, "message": "after step 1 of 6, which is saved"}),
    ("disk full in the pairs log", {"call": 1}),
    ("SIGINT while sampling", {"call": 3, "message": "after step 2 of 6, which is saved"}),
    ("checkpoint with a flipped bit", {}),
    ("kill -9 during its asynchronous commit", {"message": r"checkpoint 2 is passed over: .* is damaged"}),
    ("kill -9 during the manifest", {}),
    ("kill -9 while updating", {"call": 2}),
    ("kill -9 while exporting", {}),
    ("kill -9 before the export is in its place", {}),
]


@pytest.mark.slow
def test_a_dozen_faults_one_after_the_other_leave_no_trace(runs):
    for name, changes in CHAIN:
        if name == "checkpoint with a flipped bit":
            flip(runs.path("chain") / "checkpoints")
            continue
        fault = full_pairs_log(runs, 1, 0.3) if name == "disk full in the pairs log" else CASES[name]
        dataclasses.replace(fault, **changes).fault(runs, "chain")
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
disk full: in a checkpoint, in the pairs log, in the export
checkpoint: with a flipped bit, with a truncated file, with a missing file, without a manifest,
  that is an empty folder, with a foreign file
judge: raises, hangs, returns, always ties
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


def test_reliability_page_every_promise_names_faults_or_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!promise|status|\d).+ \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) > 10
    for shown in rows:
        names = re.findall(r"`([^`]+)`", shown)
        files = re.findall(r"tests/\w+\.py", shown)
        assert names or files, shown
        for name in names:
            assert name == "tools.torture" or any(name.removesuffix(" ...") in case for case in CASES), name
        assert [file for file in files if not (ROOT / file).is_file()] == []


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


def test_command_with_a_plan_passes_it_as_json(runs):
    case = CASES["kill -9 while updating"]
    assert isinstance(case, Planted)
    assert (
        json.loads(runs.command("x", (), {"at": case.at, "call": case.call, "do": case.do})[3])["call"] == 5
    )
    assert case.call < STEPS
