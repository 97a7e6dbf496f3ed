"""tools.evaluate: two files of answers, two models, and invalid input as one line."""

import dataclasses
import json

import pytest
from fake_models import SPEAKING, write_model
from tiny_run import tiny_config, write_config, write_rows

from tools.evaluate import __main__ as tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its prompts, and a second model."""
    path = tmp_path_factory.mktemp("evaluate")
    config = tiny_config(path)
    config.data.buckets = (40,)  # one shape to compile
    write_config(path / "config.py", config)
    write_model(path / "other", seed=1)
    return path


def call(folder, capsys, *argv):
    status = tool.main([f"--config={folder / 'config.py'}", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def rows(*answers):
    return [{"text": text, "answer": answer} for text, answer in answers]


# ---- files --------------------------------------------------------------------------------------


def test_main_two_files_by_hand(folder, capsys):
    """The judge prefers the longer text. Prompt a: 2 and 1 answers, a win and a tie; b: a loss; c, d: unanswered."""
    first = write_rows(folder / "1.jsonl", rows(("a", "x y z"), ("b", "x"), ("a", "yy"), ("c", "x")))
    second = write_rows(folder / "2.jsonl", rows(("d", "x"), ("b", "xxxx"), ("a", "zz")))
    out_file = folder / "judged.jsonl"
    status, out, err = call(folder, capsys, "--answers", first, second, f"--out={out_file}")
    assert status == 0 and "2 prompts are answered in only one of the files and are left out" in err
    findings = json.loads(out.splitlines()[-1])
    assert (findings["prompts"], findings["left_out"], findings["queries"]) == (2, 2, 3)
    assert findings["win_rate"] == pytest.approx((0.75 + 0.0) / 2)
    assert findings["win_rate_low"] < 0.1 and findings["win_rate_high"] > 0.8  # of two prompts
    assert findings["first"]["characters"] == pytest.approx(((5 + 2) / 2 + 1) / 2)
    assert findings["first"]["valid"] == pytest.approx((0.5 + 0) / 2)  # more than three characters
    assert findings["second"]["characters"] == 3.0
    assert findings["first"]["distinct_2"] == 1.0 and findings["second"]["distinct_1"] == 1.0
    judged = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert [(row["prompt"], row["policy"], row["reference"]) for row in judged] == [
        ("a", "x y z", "zz"),
        ("b", "x", "xxxx"),
    ]
    assert [row["win_share"] for row in judged] == [0.75, 0.0]
    assert [row["scores"] for row in judged] == [
        {"policy": 5, "reference": 2},
        {"policy": 1, "reference": 4},
    ]


def test_main_file_against_itself_ties_without_a_query(folder, capsys):
    same = write_rows(folder / "same.jsonl", rows(*((str(i), "x" * i) for i in range(1, 80))))
    status, out, _ = call(folder, capsys, "--answers", same, same)
    findings = json.loads(out.splitlines()[-1])
    assert status == 0 and findings["queries"] == 0
    assert findings["win_rate_low"] < findings["win_rate"] == 0.5 < findings["win_rate_high"]
    assert findings["win_rate_controlled"] == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--answers", "{folder}/1.jsonl"], "--answers compares two files"),
        (["--answers", "{folder}/x.jsonl", "{folder}/y.jsonl"], "no prompt is answered in both"),
        ([], "the following arguments are required: first"),
        (["{folder}/other_shape"], "its architecture differs from"),
        (["{folder}/absent"], "absent"),
    ],
)
def test_main_invalid_input_is_one_line(folder, capsys, argv, message):
    write_rows(folder / "x.jsonl", rows(("a", "1")))
    write_rows(folder / "y.jsonl", rows(("b", "1")))
    if not (folder / "other_shape").exists():
        write_model(folder / "other_shape", config=dataclasses.replace(SPEAKING, num_hidden_layers=1))
    status, out, err = call(folder, capsys, *(argument.format(folder=folder) for argument in argv))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("evaluate: ") and message in err


# ---- models -------------------------------------------------------------------------------------


def test_main_two_models(folder, capsys):
    status, out, err = call(folder, capsys, folder / "other", f"--out={folder / 'samples.jsonl'}")
    assert status == 0, err
    findings = json.loads(out.splitlines()[-1])
    assert findings["prompts"] == 11 and findings["kl"] > 1.0
    assert findings["kl"] == pytest.approx(findings["kl_per_token"] * findings["first"]["tokens"])
    assert 0 <= findings["win_rate_low"] <= findings["win_rate"] <= findings["win_rate_high"] <= 1
    assert (folder / "samples.jsonl").read_text().count("\n") == 11
    status, out, err = call(folder, capsys, folder / "other", folder / "other")
    assert status == 0, err
    itself = json.loads(out.splitlines()[-1])
    assert itself["kl"] == 0.0  # a model against itself, in other samples
    assert itself["first"]["tokens"] != itself["second"]["tokens"]
    assert itself["first"]["tokens"] == findings["first"]["tokens"]  # the same samples of the same model


def test_help_shows_examples(capsys):
    assert tool.main(["--help"]) == 0
    assert "--answers mine.jsonl theirs.jsonl" in capsys.readouterr().out
