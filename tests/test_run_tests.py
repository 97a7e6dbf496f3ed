"""tools.run_tests: what is run once more, and what the command ends with."""

import json
import subprocess

import pytest

from tools import run_tests


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the tool on fake pytest runs, given by their status and what they remember as failed."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def start(argv, *runs):
        runs = iter(runs)

        def fake_pytest(command):
            commands.append(command)
            status, failed = next(runs)
            run_tests.LAST_FAILED.parent.mkdir(parents=True, exist_ok=True)
            run_tests.LAST_FAILED.write_text(json.dumps(dict.fromkeys(failed, True)))
            return subprocess.CompletedProcess(command, status)

        monkeypatch.setattr(subprocess, "run", fake_pytest)
        return run_tests.main(argv), commands

    return start


def test_run_tests_all_passed_runs_once(run, capsys):
    status, commands = run(["-m", "slow"], (0, []))
    assert status == 0 and len(commands) == 1 and capsys.readouterr().out == ""
    assert commands[0][-2:] == ["-m", "slow"] and "loadfile" in commands[0]


def test_run_tests_passed_alone_is_flaky_and_no_failure(run, capsys):
    status, commands = run(["-k", "x"], (1, ["a.py::x", "b.py::y"]), (0, []))
    assert status == 0 and "--last-failed" in commands[1] and commands[1][3:5] == ["-k", "x"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":", 3)[0] for line in lines[-2:]] == ["FLAKY a.py", "FLAKY b.py"]


def test_run_tests_failed_twice_fails(run, capsys):
    status, _ = run([], (1, ["a.py::x", "b.py::y"]), (1, ["b.py::y"]))
    out = capsys.readouterr().out
    assert status == 1 and "FLAKY a.py::x" in out and "FLAKY b.py" not in out


@pytest.mark.parametrize(("argv", "status"), [([], 2), ([], 5), (["-n", "0"], 1)])
def test_run_tests_interrupted_or_single_worker_is_not_repeated(run, argv, status):
    result, commands = run(argv, (status, []))
    assert result == status and len(commands) == 1


def test_run_tests_slow_for_begins_at_the_commits_file_and_names_what_was_left_out(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    for name, text in {
        "a": "@pytest.mark.slow",
        "b": "pytest.mark.slow",
        "c": "",
        "d": "pytest.mark.slow",
    }.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(text)
    clock, commands = iter([0, 5, 15, 25, 35]), []

    def run(command, **options):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, "04\n")  # 4 % 3 files is the second
        commands.append(command)
        return subprocess.CompletedProcess(command, 2 if len(commands) == 1 else 5)  # 5: no such test in it

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("tools.run_tests.time.monotonic", lambda: next(clock))
    assert run_tests.main(["--slow_for=20"]) == 1
    assert [command[-1] for command in commands] == ["tests/test_b.py", "tests/test_d.py"]
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == ["slow: LEFT OUT after 20 s: tests/test_a.py", "slow: FAILED in tests/test_b.py"]
