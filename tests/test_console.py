"""The console: tables, the table of steps, and progress."""

import io
import re

import numpy as np
import pytest

from xpo_jax.reporting import console


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Make standard error a terminal from here on; pytest sets it again between fixtures and test."""
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen)
    return screen


def test_step_table_narrow_console_shows_the_first_metrics(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    names = ["loss/dpo", "judge/win_rate", "eval/win_rate", "time/a", "time/b"]
    table = console.StepTable(names, every_steps=2, total_steps=5)
    for step in range(1, 6):
        evaluated = {"eval/win_rate": 1e-5} if step == 3 else {}
        table.update(step, {"loss/dpo": 0.6931471, "judge/win_rate": 0.5 * step, **evaluated})
    assert capsys.readouterr().out.splitlines() == [
        "  step        dpo  judge/win_rate  eval/win_rate          a",
        "     2     0.6931          1.0000              -          -",
        "     3     0.6931          1.5000       1.00e-05          -",
        "     4     0.6931          2.0000              -          -",
        "     5     0.6931          2.5000              -          -",
    ]


def test_step_table_repeats_its_heads_every_20_rows(capsys):
    table = console.StepTable(["kl"], every_steps=1, total_steps=41)
    for step in range(1, 42):
        table.update(step, {"kl": 0.5})
        table.update(step, {"other": 1.0})  # nothing that the table shows
    lines = capsys.readouterr().out.splitlines()
    assert [n for n, line in enumerate(lines) if "kl" in line] == [0, 21, 42] and len(lines) == 44


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (float("nan"), "nan"), (float("-inf"), "-inf"), (-0.05, "-0.0500"), (123.456, "123.46")]
    + [
        (12345.678, "12345.7"),
        (2e-4, "2.00e-04"),
        (1e8, "1.00e+08"),
        (np.float32(0.1), "0.1000"),
        (64, "64"),
        (None, "-"),
    ],
)
def test_step_table_cell(capsys, value, text):
    console.StepTable(["kl"], every_steps=1, total_steps=1).update(1, {"kl": value})
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", text]


def test_step_progress_without_a_terminal_prints_lines(capsys):
    clock = Clock()
    progress = console.StepProgress(120, every_seconds=10, clock=clock)
    for step in (1, 2, 3, 4, 5, 120):
        progress.update(step)
        clock.now += 4
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "step 1/120 (1 %), time left ?",
        "step 4/120 (3 %), time left 07:44",  # three steps took 12 s, 116 are left
        "step 120/120 (100 %), time left 00:00",
    ]


def test_step_progress_long_run_shows_hours(capsys):
    clock = Clock()
    progress = console.StepProgress(101, clock=clock)
    progress.update(1)
    clock.now += 60
    progress.update(2)
    assert capsys.readouterr().err.splitlines()[-1] == "step 2/101 (2 %), time left 1:39:00"


def test_step_progress_on_a_terminal_is_a_bar_and_output_stays_output(monkeypatch, capsys):
    screen = terminal(monkeypatch)
    progress = console.StepProgress(4)
    for step in range(1, 5):
        progress.update(step)
        print(f"row {step}")
    progress.close()
    shown = screen.getvalue()
    assert "4/4" in shown and "time left" in shown and "step 4/4 (" not in shown
    assert shown.endswith("\r\x1b[1A\x1b[2K"), "the bar is removed at the end"
    assert "\x1b[?25l" not in shown, "a run that is killed would leave the terminal without its cursor"
    # standard output is no terminal here: nothing printed may be diverted to the screen
    assert capsys.readouterr().out == "row 1\nrow 2\nrow 3\nrow 4\n" and "row" not in shown


def test_progress_inside_a_run_on_a_terminal_is_a_second_bar(monkeypatch):
    screen = terminal(monkeypatch)
    run = console.StepProgress(4)
    run.update(1)
    for _ in console.progress("ab", "evaluating"):
        run.update(1)  # draws both
    run.update(2)
    run.close()
    shown = re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())  # without colours
    assert re.search(r"step \S+ 1/4 .*\n.*evaluating \S+ 0/2", shown) and " 2/4 " in shown


def test_progress_without_a_terminal_is_one_line(capsys):
    assert list(console.progress(iter("abc"), "compiling", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == "compiling ...\n"


def test_format_value():
    values = [None, True, 1234567, 0.123456, 12345.67, 1e-5, np.float32(0.1), "a\x1b[0m", (1, 2)]
    assert list(map(console.format_value, values)) == [
        "-",
        "yes",
        "1,234,567",
        "0.1235",
        "12345.7",
        "1e-05",
        "0.1",
        "a␛[0m",
        "(1, 2)",
    ]


def test_field_table_wraps_values_in_their_column():
    table = console.field_table(
        {"devices": "8 x cpu", "parameters": 1612345, "prompt buckets": "24, 32, 48"}, width=40
    )
    assert table == "devices         8 x cpu\nparameters      1,612,345\nprompt buckets  24, 32, 48"
    wrapped = console.field_table({"a": "one two three four five six"}, width=23)
    assert wrapped == "a  one two three four\n   five six"
    assert console.field_table({}) == ""


def test_text_table_aligns_numbers_and_wraps_texts():
    rows = [[1, "Der Hund beißt den Mann.", "Den Mann\nbeißt der Hund.", 0.5], [10, "Kurz.", "", None]]
    assert console.text_table(["#", "before", "after", "score"], rows, width=40).splitlines() == [
        " #  before         after           score",
        "--  -------------  --------------  -----",
        " 1  Der Hund       Den Mann          0.5",
        "    beißt den      beißt der",
        "    Mann.          Hund.",
        "10  Kurz.                              -",
    ]
    assert console.text_table(["a", "b"], []) == "a  b\n-  -"
    assert console.text_table(["a"], [["日本"], ["b"]]) == "a\n----\n日本\nb"  # characters of two cells
    word = "Donaudampfschifffahrt"
    narrow = console.text_table(["a", "b"], [[word, "x"]], width=12).splitlines()
    assert all(len(line) <= 12 for line in narrow)
    assert "".join(line[:9].strip() for line in narrow[2:]) == word


def test_text_table_shows_markup_as_text(capsys):
    texts = ["[bold]a[/bold]", ":smile:", "\x1b[31mred", "https://example.org 123"]
    shown = console.text_table(["text"], [[text] for text in texts]).splitlines()[2:]
    assert shown == ["[bold]a[/bold]", ":smile:", "␛[31mred", "https://example.org 123"]
