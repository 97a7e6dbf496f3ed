"""The examples of docs/judges.md work as printed, in a run and in tools.judge."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_run import run_main, tiny_config, write_config, write_rows

from tools import judge as tool
from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.experiment.judge_factory import make_judge
from xpo_jax.judges.ask import ResponsePairs, ask
from xpo_jax.judges.contract import (
    DeviceJudge,
    HasCheck,
    HasDoubt,
    HasModels,
    HasParts,
    HasProbe,
    HasScores,
    HasStats,
    is_collective,
    measure,
)
from xpo_jax.values import Candidate, Comparison, Prompts

PAGE = (Path(__file__).parents[1] / "docs" / "judges.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Write my_judges.py, with the first block and the factory, to a folder from which it can be imported."""
    folder = tmp_path_factory.mktemp("example")
    longer = next(block for block in BLOCKS if "class Longer" in block)
    (folder / "my_judges.py").write_text(BLOCKS[0] + "\n\n" + longer)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.delitem(sys.modules, "my_judges", raising=False)  # another test's module of the same name
        yield folder
    sys.modules.pop("my_judges", None)


def test_docs_optional_methods_example_satisfies_every_protocol(tmp_path):
    """A judge that has the methods is recognized without inheriting anything, and one that has none is not."""
    names: dict = {}
    exec(next(block for block in BLOCKS if "class FromList" in block), names)
    path = tmp_path / "words.txt"
    judge = names["FromList"](path=str(path))
    protocols = (HasProbe, HasCheck, HasParts, HasDoubt, HasStats, HasModels)
    assert all(isinstance(judge, protocol) for protocol in protocols)
    plain = lambda comparisons: ["A"] * len(comparisons)
    assert not any(isinstance(plain, protocol) for protocol in (*protocols, DeviceJudge))
    assert measure(plain, (), "Hund") == {} and not is_collective(plain) and not is_collective(judge)
    judge.collective = True
    assert is_collective(judge) and not isinstance(judge, DeviceJudge)

    with pytest.raises(ValueError, match=r"^judge\.path: .* create it"):
        judge.probe()
    assert "its list is empty" in judge.doubt()
    path.write_text("Hund\nKatze\n")
    judge.probe()
    assert judge.doubt() == ""
    with pytest.raises(ValueError, match="column 'input'"):
        judge.check((), {})
    judge.check((), {"input": "x"})
    assert measure(judge, (), "Hund und Katze") == {"listed_words": 2}
    prompt = Prompts(({},), ((),), np.zeros((1, 1)), np.ones(1), np.zeros(1, int), np.ones(1, bool))
    no, yes = np.zeros(1, bool), np.ones(1, bool)
    verdicts = ask(
        judge,
        prompt,
        ResponsePairs(["Hund"], ["Maus"], no, yes, yes),
        unfinished_loses=False,
        both_orders=True,
        hide_thinking=False,
        shown_seed=(0,),
    )
    assert verdicts.counts == {"compared": 2} and (verdicts.queries, verdicts.orders) == (2, 2)
    assert list(verdicts.p_first) == [1.0] and list(verdicts.flipped) == [0.0]


def test_docs_example_has_at_most_ten_lines():
    code = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(code) <= 10
    assert 'config.judge = ConfigDict({"name": "my_judges:judge"})' in BLOCKS[1]


def test_docs_example_runs_in_training(example, tmp_path, one_device):
    config = tiny_config(tmp_path)
    rows = [{"text": f"{i} x", "input": "e x"} for i in range(16)]
    config.data.train = config.data.held_out = write_rows(tmp_path / "rows.jsonl", rows)
    config.judge, config.steps, config.data.buckets = ConfigDict({"name": "my_judges:judge"}), 2, (40,)
    config.evaluation.reference_samples, config.evaluation.prompts = 1, 2
    status, out, err = run_main([f"--config={write_config(tmp_path / 'c.py', config)}"])
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["ended_by"] == "steps"
    judged = [pair for pair in read_pairs(tmp_path / "run" / "pairs.jsonl") if pair["shown"]]
    assert judged
    for pair in judged:
        hits = [response["text"].count("e") for response in pair["responses"]]
        assert pair["p_first"] == (hits[0] > hits[1]) + 0.5 * (hits[0] == hits[1])
        assert pair["scores"] == dict(zip(("policy", "reference"), hits, strict=True))


def test_docs_factory_example_is_built_from_a_config_group(example):
    judge = make_judge({"name": "my_judges:Longer", "margin": 2}, "judge")
    comparisons = [
        Comparison((), {}, "xxx", "x"),
        Comparison((), {}, "x", "xxx"),
        Comparison((), {}, "xx", "x"),
    ]
    assert judge(comparisons) == ["A", "B", "tie"]
    with pytest.raises(ValueError, match=r"^judge\.margin is missing: an integer"):
        make_judge({"name": "my_judges:Longer"}, "judge")
    with pytest.raises(ValueError, match=r"^judge\.margin: no such field"):
        make_judge({"name": "my_judges:judge", "margin": 2}, "judge")


@pytest.mark.parametrize("name", ["test_judge_docs:of_two", "test_judge_docs:no_judge"])
def test_run_factory_without_a_judge_is_refused_before_loading(name, tmp_path):
    config = tiny_config(tmp_path)
    config.judge = ConfigDict({"name": name})
    status, _, err = run_main([f"--config={write_config(tmp_path / 'c.py', config)}"])
    assert status == 2 and err.startswith(f"xpo_jax: judge.name: {name} gives a ")
    assert "that cannot be called as judge(comparisons)" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "shown"), [("batched", "(batch)"), ("one_pair", "(messages, row, a, b)")])
def test_make_judge_function_with_other_parameters_is_refused(name, shown):
    name = f"test_judge_docs:{name}"
    with pytest.raises(
        ValueError, match=rf"^judge\.name: {re.escape(name + shown)} is neither a judge, a function"
    ):
        make_judge({"name": name}, "judge")


def batched(batch):
    return ["A"] * len(batch)


def one_pair(messages, row, a, b):
    return "A"


def of_two():
    return lambda a, b: "A"


def no_judge():
    return "A"


# ---- tools.judge ----------------------------------------------------------------------------------


def tried(capsys, tmp_path, rows, *argv, judge=None):
    config = tiny_config(tmp_path)
    config.judge = ConfigDict(judge or {"name": "my_judges:judge"})
    spec = write_config(tmp_path / "c.py", config)
    status = tool.main([f"--config={spec}", *argv, write_rows(tmp_path / "rows.jsonl", rows)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


ROWS = [
    {"input": "Hund bellt", "prompt": "x", "a": "Hund", "b": "Katze", "gold": "A"},
    {"input": "Hund bellt", "text": "x", "a": "Katze", "b": "Hund Hund", "gold": 0.9},
    {
        "input": "Hund bellt",
        "messages": [{"role": "user", "content": "x"}],
        "a": "y",
        "b": "z",
        "gold": "tie",
    },
    {"input": "", "prompt": "x", "a": "Hund", "b": "Katze", "gold": "A"},
]


def test_judge_tool_counts_match_values_by_hand(example, capsys, tmp_path, monkeypatch):
    """A, B, a tie; the fourth row's empty input makes the example fail on all, as an exception does."""
    monkeypatch.setenv("COLUMNS", "200")  # on a narrow console the reasons are wrapped
    status, out, _ = tried(capsys, tmp_path, ROWS[:3])
    assert status == 0
    summary = json.loads(out.splitlines()[-1])
    assert {k: v for k, v in summary.items() if "second" not in k} == {
        "comparisons": 3,
        "a": 1,
        "b": 1,
        "ties": 1,
        "failed": 0,
        "position_flip_rate": 0.0,
        "gold": 3,
        "agreement": 2 / 3,
        "agreement_without_ties": 0.5,
        "queries": 6,
    }
    assert "'Hund' 1 and 0 times" in out
    status, out, _ = tried(capsys, tmp_path, ROWS, "--once", "--rows=1")
    summary = json.loads(out.splitlines()[-1])
    assert (status, summary["failed"], summary["queries"], summary["position_flip_rate"]) == (0, 4, 4, None)
    assert "IndexError" in out
    status, out, _ = tried(capsys, tmp_path, ROWS, judge={"name": "fakes:Always", "answer": "A"})
    summary = json.loads(out.splitlines()[-1])
    assert (summary["ties"], summary["position_flip_rate"]) == (4, 1.0) and "flipped" in out


def test_judge_tool_runs_a_model_on_the_devices(capsys, tmp_path):
    judge = {"name": "llm", "path": None, "template": "{prompt}|{A}|{B}|", "labels": ("A", "B")}
    judge |= {
        "batch_size": 4,
        "buckets": (64,),
        "on_long": "error",
        "rules": None,
        "chat_template_arguments": None,
    }
    status, out, err = tried(capsys, tmp_path, ROWS[:2], judge=judge)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["failed"] == 0


@pytest.mark.parametrize(
    ("rows", "argv", "message"),
    [
        ([{"prompt": "x", "a": "y"}], (), "rows.jsonl, row 1: no column 'b'; the row has: prompt, a"),
        ([{"prompt": "x", "a": "y", "b": 1}], (), "rows.jsonl, row 1: column 'b' must be text, or a list of"),
        ([{"a": "y", "b": "z"}], (), "rows.jsonl, row 1: no column 'text'; the row has: a, b"),
        (
            [{**ROWS[0], "gold": 1}],
            (),
            "rows.jsonl, row 1: gold is 1; write 'A', 'B', 'tie', or the probability",
        ),
        ([{**ROWS[0], "gold": "first"}], (), "gold is 'first'; write"),
        (ROWS, ("--config.judge.nam=x",), "judge.nam: no such field"),
        (ROWS, ("--row=3",), "--help shows examples"),
    ],
)
def test_judge_tool_invalid_input_is_one_line(rows, argv, message, example, capsys, tmp_path):
    status, out, err = tried(capsys, tmp_path, rows, *argv)
    assert (status, out) == (2, "") and err.startswith("judge: ") and err.count("\n") == 1
    assert message in err


def test_judge_tool_help_shows_usage(capsys):
    assert tool.main(["--help"]) == 0
    assert "python -m tools.judge --config=" in capsys.readouterr().out


# ---- judging ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # 11 prompts x 2 x 2 comparisons, and a first batch of 8; in both orders twice that
        (
            ["max_queries=95"],
            "judging.max_queries is 95, but the evaluations at the start and at the end may need 44",
        ),
        (["max_queries=191", "both_orders=true"], "each and a step 16: set it to at least 192, or lower"),
        (["max_queries=0"], "judging.max_queries is 0, must be at least 1, or None for no limit"),
        (
            ["max_failed_fraction=1.5"],
            "judging.max_failed_fraction is 1.5, must be from 0 to 1",
        ),
        (["max_failed_batches=0"], "judging.max_failed_batches is 0, must be at least 1"),
    ],
)
def test_run_invalid_judging_limits_are_refused_before_loading(overrides, message, tmp_path):
    spec = write_config(tmp_path / "c.py", tiny_config(tmp_path))
    status, _, err = run_main([f"--config={spec}", *(f"--config.judging.{o}" for o in overrides)])
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_docs_example_of_scores_satisfies_the_protocol_and_compares_by_them():
    names: dict = {}
    exec(next(block for block in BLOCKS if "class Shorter" in block), names)
    judge = names["Shorter"]()
    assert isinstance(judge, HasScores)
    a, b = judge.scores([Candidate((), {}, text) for text in ("Hund", "Hunde")])
    assert judge.compare_scores(a, b) == judge([Comparison((), {}, "Hund", "Hunde")])[0] == 1.0
