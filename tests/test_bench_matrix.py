"""tools.bench.matrix: what it measures, keeps and prints first; and when a measurement is doubted."""

import json
import shlex
from types import SimpleNamespace

import pytest

from tools.bench import machine, matrix


def figures(step, *, ratio=None, floor=0.5, doubts=()):
    parts = {name: {"seconds": 0.25, "fraction_of_floor": floor} for name in (*matrix.PARTS, "sample")}
    parts["step"] = {"seconds": step, "fraction_of_floor": floor}
    peer = {"step": [step, ratio * step, ratio], "generation": [0.4, 2.0, 5.0]} if ratio else {}
    return {"about": {}, "parts": parts, "peer": peer, "doubts": list(doubts)}


def rows(text):
    return [line for line in text.splitlines() if line.startswith("S ")]


@pytest.fixture
def bench(monkeypatch):
    """Let every command write what `results` has for its batch; return (results, the commands that ran)."""
    results, ran = {}, []

    def run(command, stdout, stderr):
        ran.append(command)
        flags = dict(flag.split("=", 1) for flag in command[4:])
        result = results[int(flags["--batch"])]
        if isinstance(result, str):
            stdout.write(f"compiling ...\n{result}\n")
            return SimpleNamespace(returncode=2)
        with open(flags["--json"], "w") as file:
            json.dump(result, file)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(matrix.subprocess, "run", run)
    return results, ran


def test_all_combinations_with_the_arguments_of_each(tmp_path, capsys):
    assert matrix.main([f"--out={tmp_path / 'no'}", "--list", "--cores=1", "--models=S"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 3 * 2 * 3 and not (tmp_path / "no").exists()
    shapes = {tuple(word for word in command[3:] if not word.startswith("--json")) for command in commands}
    assert len(shapes) == 18
    assert ("S", "--batch=8", "--prompt=512", "--repeat=5", "--new=256", "--cores=1") in shapes
    assert (
        "S", "--batch=32", "--prompt=64", "--repeat=5", "--new=128", "--lengths=lognormal", "--cores=1",
    ) in shapes  # fmt: skip


def test_the_worst_shape_stands_first_and_nothing_is_measured_twice(tmp_path, bench, capsys):
    results, ran = bench
    results |= {
        1: figures(0.1, ratio=3.5),
        8: figures(1.0, ratio=1.5, doubts=["busy"]),
        32: figures(4.0, ratio=2.5),
    }
    argv = [
        f"--out={tmp_path}",
        "--models=S",
        "--prompts=64",
        "--answers=64",
        "--peer=trl",
        "--peer_python=p",
    ]
    assert matrix.main(argv) == 0
    printed = capsys.readouterr().out
    assert "do not believe S_8x64_64: busy" in printed
    lines = rows(printed)
    assert [line.split()[1] for line in lines] == ["8", "32", "1"]
    assert lines[0].split()[6] == "1.5"
    assert len(json.loads((tmp_path / "matrix.json").read_text())) == len(ran) == 3
    (file,) = tmp_path.glob("S_8x64_64_*.json")
    for content in (None, "", "{}"):  # a file that is gone, and what a full disk leaves
        file.unlink() if content is None else file.write_text(content)
        assert matrix.main(argv) == 0
        assert "--batch=8" in ran.pop() and len(ran) == 3


def test_other_options_and_other_models_are_other_measurements(tmp_path, bench, capsys):
    results, ran = bench
    results[1] = figures(0.1, ratio=3.0)
    folder = tmp_path / "S"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    out = [f"--out={tmp_path / 'out'}", "--batches=1", "--prompts=64", "--answers=64"]
    peer = ["--peer=trl", "--peer_python=p"]
    for extra in ([], ["--repeat=3"], ["--cores=1"], peer, [f"--models={folder}"], [f"--models={folder}/"]):
        assert matrix.main([*out, "--models=S", *extra]) == 0
    assert len(ran) == 5 and ran[-1][3] == str(folder)


def test_a_shape_that_fails_is_named_and_the_others_are_printed(tmp_path, bench, capsys):
    results, ran = bench
    results |= {1: figures(0.1, floor=0.6), 8: "bench: out of memory", 32: figures(4.0, floor=0.4)}
    argv = [f"--out={tmp_path}", "--models=S", "--prompts=64", "--answers=lognormal"]
    assert matrix.main(argv) == 1
    captured = capsys.readouterr()
    assert [line.split()[1] for line in rows(captured.out)] == ["32", "1"]
    assert "S_8x64_lognormal: ended with status 2: bench: out of memory" in captured.err
    results[8] = figures(1.0)
    assert matrix.main(argv) == 0 and len(ran) == 4


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--models=L", "'L' is not S, M or a folder"),
        ("--batches=1,x", "--batches: 'x' is not a number"),
        ("--prompts=", "--prompts: '' is not a number"),
        ("--answers=1", "--answers: '1' is not a number of at least 2"),
        ("--batches=8,08", "names the same twice"),
        ("--answers=4,04", "names the same twice"),
        ("--batches=²", "'²' is not a number"),
        ("--cores=0", "--cores=0: a positive number"),
        ("--repeat=0", "--repeat=0: a positive number"),
        ("--peer=trl", "must be given together"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, argument, expected):
    assert matrix.main([f"--out={tmp_path}", argument]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_why_a_measurement_is_doubted():
    assert machine.doubts(0.1, (100.0, 95.0), 1.1) == []
    assert machine.doubts(None, (100.0, 100.0), 1.0) == []
    assert machine.doubts(1.5, (100.0, 80.0), 1.5) == [
        "1.5 other threads were running",
        "the peak changed by -20%",
        "the slowest round took 1.5 times the fastest",
    ]


def test_other_running_threads_are_counted(monkeypatch, tmp_path):
    file = tmp_path / "loadavg"
    file.write_text("1.90 1.80 1.70 4/321 4711\n")
    monkeypatch.setattr(machine, "Path", lambda _: file)
    assert machine.others(0.01) == 3
    file.unlink()
    assert machine.others(0.01) is None
