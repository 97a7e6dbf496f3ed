"""python -m tools.report: a run's report again, several runs side by side."""

import json
import re

import pytest
from fake_run import ROWS, evaluation, step, write_run

from tools import report as tool


@pytest.fixture
def two(tmp_path):
    first = write_run(tmp_path / "first", ROWS)
    second = write_run(tmp_path / "second", [ROWS[0], step(1, **evaluation(0.6, 0.1, kl=0.5))], result=False)
    config = json.loads((second / "config.json").read_text())
    config["loss"]["beta"] = 0.3
    (second / "config.json").write_text(json.dumps(config | {"run_dir": "second"}))
    return str(first), str(second)


def test_main_one_run_writes_its_report(two, tmp_path, capsys):
    assert tool.main([two[0]]) == 0
    page = (tmp_path / "first" / "report.html").read_text()
    assert json.loads(capsys.readouterr().out) == {"report": f"{two[0]}/report.html"}
    assert tool.main([two[0], f"--out={tmp_path / 'copy.html'}"]) == 0
    assert (tmp_path / "copy.html").read_text() == page


def test_main_several_runs_are_compared(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert tool.main([*two, f"--out={tmp_path / 'both.html'}"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    cells = [re.split("  +", line.strip())[1:] for line in lines[2:4]]
    assert cells == [
        ["2", "16", "70.0 [65.0, 75.0]", "70.0 [65.0, 75.0]", "1.5", "0.89", "-", "10", "-"],
        ["1", "8", "60.0 [50.0, 70.0]", "60.0 [50.0, 70.0]", "0.5", "0.9", "-", "10", "-"],
    ]
    assert lines[-2].split() == ["loss.beta", "0.1", "0.3"] and "steps" not in lines[-3]
    summary = json.loads(last)
    assert [run["eval/win_rate"] for run in summary["runs"]] == [0.7, 0.6]
    assert summary["runs"][1]["run"] == two[1]
    page = (tmp_path / "both.html").read_text()
    assert page.count(f"</i>{two[1]}</span>") == 3  # a line of its own in each chart
    assert "loss.beta" in page


def test_main_without_out_writes_nothing(two, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert tool.main(list(two)) == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "required: runs"), (["{}/nothing"], "nothing: is no run directory with config")],
)
def test_main_invalid_input_is_one_line(argv, message, tmp_path, capsys):
    assert tool.main([argument.format(tmp_path) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("report: ") and message in err
