"""A run that learns nothing reports that, and why: the causes, the warning, the end, the report."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import changed_config, run_name

from xpo_jax.experiment import setup
from xpo_jax.experiment.learning_watch import LearningWatch
from xpo_jax.experiment.resume import Counters
from xpo_jax.judges import outcomes
from xpo_jax.judges.outcomes import IDENTICAL, IDENTICAL_UNFINISHED, UNFINISHED, count_outcomes, problem
from xpo_jax.reporting import run_reader
from xpo_jax.values import Samples, Verdicts


def verdicts(*rows):
    """Return verdicts from (p_first, weight, reason, shown, flipped) of each row."""
    p, weight, reasons, shown, flipped = zip(*rows, strict=True)
    return Verdicts(
        np.float32(p), np.float32(weight), reasons, ({},) * len(rows), shown, np.float32(flipped), 0, 1
    )


NAN = float("nan")
POLICY_WON_AS_A = (1.0, 1, "", (0, 1), NAN)
REFERENCE_WON_AS_A = (0.2, 1, "", (1, 0), NAN)
POLICY_WON_AS_B = (0.9, 1, "", (1, 0), 0)
TIE = (0.5, 1, "", (0, 1), NAN)
FLIPPED = (0.5, 1, "", (0, 1), 1)
SAME = (0.5, 1, IDENTICAL, None, NAN)
CUT_OFF = (0.5, 1, UNFINISHED, None, NAN)
SAME_CUT_OFF = (0.5, 1, IDENTICAL_UNFINISHED, None, NAN)
ONE_CUT_OFF = (1.0, 1, UNFINISHED, None, NAN)
FAILED = (0.5, 0, "timed out", (0, 1), NAN)
PADDING = (0.5, 0, "", None, NAN)


def test_count_outcomes_counts_each_pair_once():
    rows = [POLICY_WON_AS_A, REFERENCE_WON_AS_A, POLICY_WON_AS_B, TIE, FLIPPED, SAME, CUT_OFF, ONE_CUT_OFF]
    counted = count_outcomes(verdicts(*rows, FAILED, PADDING), range(10))
    assert counted == {
        "pairs": 9,
        "decisive": 4,
        "won": 3,
        "judged": 3,
        "letter_a": 2,
        "tied": 1,
        "flipped": 1,
        "identical": 1,
        "unfinished": 1,
        "failed": 1,
    }
    assert problem(counted) == ""
    assert outcomes.metrics(counted) == {
        "decisive_rate": pytest.approx(4 / 9),
        "letter_a_rate": pytest.approx(2 / 3),
    }
    assert count_outcomes(verdicts(TIE, FAILED, SAME), [1]) == {"pairs": 1, "failed": 1}


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (TIE, "tools.judge"),
        (FLIPPED, "order shown"),
        (SAME, "sampling.temperature"),
        (CUT_OFF, "sampling.end_tokens"),
        (SAME_CUT_OFF, "sampling.max_new_tokens"),
        (FAILED, "pairs.jsonl"),
    ],
)
def test_problem_names_the_most_frequent_cause_and_its_remedy(row, remedy):
    other = SAME if row is not SAME else TIE
    text = problem(count_outcomes(verdicts(row, row, other), range(3)))
    assert "of 3 pairs, in 2 " in text and remedy in text and "\n" not in text
    assert problem(count_outcomes(verdicts(row, row, other, POLICY_WON_AS_A), range(4))) == ""


@pytest.mark.parametrize(
    ("rows", "letter"), [((POLICY_WON_AS_A, REFERENCE_WON_AS_A), "A"), ((POLICY_WON_AS_B,), "B")]
)
def test_problem_of_a_judge_that_always_names_one_letter(rows, letter):
    counted = outcomes.add([count_outcomes(verdicts(*rows), range(len(rows)))] * 20)
    assert f"the answer shown as {letter} in all of" in problem(counted)
    assert (
        problem(outcomes.add([counted, {"pairs": 1, "decisive": 1, "judged": 1, "letter_a": letter == "B"}]))
        == ""
    )
    few = outcomes.add([count_outcomes(verdicts(*rows), range(len(rows)))] * 9)
    assert problem(few) == ""  # too few to conclude anything


def test_problem_of_no_pairs_is_none():
    assert problem({}) == ""
    assert all(np.isnan(rate) for rate in outcomes.metrics({}).values())


# ---- runs -------------------------------------------------------------------------------------------


def test_watch_reports_doubts_and_cut_tokens_every_ten_steps(capsys):
    class Doubtful:
        def __call__(self, comparisons):
            return ["A"] * len(comparisons)

        def doubt(self):
            return "its model does not answer"

    watch = LearningWatch(Counters(), None, Doubtful())
    for step in range(20):
        watch.count({"pairs": 8, "decisive": 4}, cut_rate=0.5 if 0 < step < 3 else 0.0)
        lines = capsys.readouterr().err.splitlines()
        if step not in (9, 19):
            assert lines == []
            continue
        assert lines[0] == "xpo_jax: warning: in the last 10 steps its model does not answer"
        assert len(lines) == (2 if step == 9 else 1)
        assert step != 9 or "10% of the responses had special tokens before their end" in lines[1]


def test_responses_with_special_tokens_before_their_end_are_noticed(tokenizer):
    special, other = tokenizer.all_special_ids[0], tokenizer.encode("a")[0]
    assert other not in tokenizer.all_special_ids
    rows = [
        ([other, special, other], 3, False),
        ([other, other, special], 3, True),  # its end
        ([other, other, special], 3, False),  # not its end
        ([other, special, special], 1, True),  # padding
        ([other, special, special], 2, True),
    ]
    tokens, lengths, finished = (np.array(column) for column in zip(*rows, strict=True))
    models = setup.Models(None, None, None, tokenizer, None, True)
    samples = Samples(tokens, lengths, finished)
    assert models.has_cut_tokens(samples).tolist() == [True, False, True, False, False]
    assert models.cut_rate([samples, samples], np.array([True, True, False, False, True])) == pytest.approx(
        1 / 3
    )
    assert [len(text) for text in models.decode(samples)] == [2, 2, 2, 1, 1]


def findings(path):
    return [text for kind, text in run_reader.findings(run_reader.read(path)) if kind == "bad"]


def test_run_of_which_no_pair_reaches_the_judge_ends_and_says_why(one_device, tmp_path):
    """One token is too few for any answer, as with an end token that the policy never samples."""
    config = changed_config(
        tmp_path,
        steps=9,
        sampling__max_new_tokens=1,
        loss__unfinished_loses=True,
        sampling__end_tokens=["<|im_start|>"],
        judging__max_indecisive_steps=4,
    )
    status, _, err = run_name(tmp_path, "run", config)
    assert status == 2
    warning, *_, last = [line for line in err.splitlines() if line.startswith("xpo_jax: ")]
    assert "warning: before the first step no verdict preferred one response" in warning
    assert "step 4: the run learns nothing: 4 steps without a verdict that prefers a response" in last
    assert "in the last one no verdict preferred one response: of " in last
    for line in (warning, last):
        assert "neither response was finished; raise sampling.max_new_tokens" in line
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["judge/decisive_rate"] for row in rows[1:]] == [0.0] * 4
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
    assert "nothing was learned" in (tmp_path / "run" / "report.html").read_text()
    assert any("nothing was learned" in text for text in findings(tmp_path / "run"))
    assert any("no comparison was won or lost" in text for text in findings(tmp_path / "run"))
    config.judging.max_indecisive_steps = None  # now it is intended
    status, _, err = run_name(tmp_path, "run", config)
    assert status == 0 and "warning: before the first step no verdict preferred one response" in err


@pytest.mark.parametrize(("name", "letter"), [("fakes:always_a", "A")])
def test_run_whose_judge_always_says_a_warns(one_device, tmp_path, name, letter):
    config = changed_config(tmp_path, steps=2, judge__name=name)
    status, _, err = run_name(tmp_path, "run", config)
    assert status == 0, err
    assert f"preferred the answer shown as {letter} in all of" in err
    assert any(
        f"always preferred the answer shown as {letter}" in text for text in findings(tmp_path / "run")
    )


def test_report_calls_a_judge_bad_that_gave_one_letter_in_all_steps():
    """It does so even where the evaluation compared too few pairs to show it."""

    def kinds(evaluated, metrics):
        run = run_reader.Run(
            Path(), {"evaluation": {"judge": {"name": "other"}}}, metrics, [evaluated], [], [], None
        )
        return [kind for kind, _ in run_reader._verdict_findings(run)]

    last = {"eval/letter_a_rate": 1.0, "eval/queries": 8}
    steps = [
        {"judge/letter_a_rate": 1.0, "judge/decisive_rate": 1.0, "judge/queries": 8 * n} for n in (1, 2, 3)
    ]
    assert kinds(last, steps) == ["bad"] and kinds(last, steps[:2]) == []
    assert kinds(last | {"eval/queries": 128}, steps[:1]) == ["bad"]
    assert kinds(last, [steps[0] | {"judge/letter_a_rate": 0.5}, *steps[1:]]) == []


def test_report_counts_the_letters_of_all_comparisons_of_one_judge(one_device, tmp_path):
    """Neither the 16 of training nor the at most 16 of each evaluation say much alone."""
    config = changed_config(
        tmp_path,
        steps=2,
        judge__name="fakes:always_a",
        evaluation__prompts=4,
        evaluation__reference_samples=1,
    )
    status, _, err = run_name(tmp_path, "run", config)
    assert status == 0, err
    assert "the judge always preferred the answer shown as A" in findings(tmp_path / "run")
