"""IFEval: the checks against literals, the prompts' choice and split, the judge, the accuracies; a run on fake data."""

import importlib.util
import json
import math
import re
import sys

import numpy as np
import pytest
from fake_models import write_model
from ml_collections import ConfigDict
from tiny_run import run_main, tiny_config, write_config, write_rows

from tools.ifeval import __main__ as command
from tools.ifeval import accuracy, checks, prompts, ties, unrelated
from tools.ifeval.judge import briefer, follows
from xpo_jax.config import loader
from xpo_jax.data.pairs_log import content_hash, read_pairs
from xpo_jax.judges.contract import HasScores
from xpo_jax.values import Candidate, Comparison

needs_checkers = pytest.mark.skipif(
    importlib.util.find_spec("if_verifiable") is None,
    reason="if-verifiable is not installed: python -m pip install -e '.[real]'",
)

# ---- checks -------------------------------------------------------------------------------------

LONG = "one two three four five six"
# instruction, arguments, answer, and how nearly it is followed: 1 is followed
CASES = [
    ("punctuation:no_comma", {}, "a b", 1),
    ("punctuation:no_comma", {}, "a, b, c", 1 / 3),
    ("length_constraints:number_words", {"num_words": 6, "relation": "at least"}, LONG, 1),
    ("length_constraints:number_words", {"num_words": 8, "relation": "at least"}, LONG, 6 / 8),
    ("length_constraints:number_words", {"num_words": 6, "relation": "less than"}, LONG, 6 / 7),
    ("keywords:existence", {"keywords": ["Two", "six"]}, LONG, 1),
    ("keywords:existence", {"keywords": ["two", "seven"]}, LONG, 0.5),
    ("keywords:frequency", {"keyword": "o", "frequency": 4, "relation": "at least"}, LONG, 0.75),
    ("keywords:frequency", {"keyword": "o", "frequency": 3, "relation": "less than"}, LONG, 0.75),
    ("keywords:letter_frequency", {"letter": "x", "let_frequency": 2, "let_relation": "at least"}, LONG, 0.5),
    ("keywords:forbidden_words", {"forbidden_words": ["seven"]}, LONG, 1),
    ("keywords:forbidden_words", {"forbidden_words": ["six", "ten"]}, LONG, 0.5),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", 1),
    ("detectable_format:number_bullet_lists", {"num_bullets": 4}, "* a\n- b\nc", 0.5),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a\n* b\n* c", 0),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* b *c*", 1),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 4}, "*a* b", 0.25),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "to [name]", 1),
    ("detectable_content:number_placeholders", {"num_placeholders": 4}, "to [name]", 0.25),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1 a Day 2 b",
        1,
    ),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 a", 0.5),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", 1),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a", 0.5),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "six"},
        "five\n\nSix men",
        1,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "five"},
        "five",
        0.75,
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say a."}, "say a. A", 1),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say a."}, "Say what", 4 / 6),
    ("combination:two_responses", {}, "a\n******\nb", 1),
    ("combination:two_responses", {}, "a\n******\n", 0.5),
    ("combination:two_responses", {}, "a ** b\n***\n", 0.25),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. the end.", 1),
    ("startend:end_checker", {"end_phrase": "The end."}, "The end. Or?", 0.5),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. The rnd.", 7 / 8),
    ("startend:quotation", {}, '"a"', 1),
    ("startend:quotation", {}, '"a', 0.5),
    ("detectable_format:title", {}, "<<a>> b", 1),
    ("detectable_format:title", {}, "<<a> b", 0.5),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', 1),
    ("detectable_format:json_format", {}, '{"a": 1', 0.5),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\nP.S. b", 1),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a", 0),
    ("detectable_format:constrained_response", {}, "My answer is yes.", 1),
    ("detectable_format:constrained_response", {}, "Yes.", 0),
    ("change_case:english_lowercase", {}, "this is what the little cat wants to eat", 1),
    ("change_case:english_lowercase", {}, "AB cdefgh", 0.75),
    ("change_case:english_capital", {}, "THIS IS WHAT THE LITTLE CAT WANTS TO EAT", 1),
    ("change_case:english_capital", {}, "AB cd", 0.5),
]


@needs_checkers
@pytest.mark.parametrize(("name", "arguments", "answer", "near"), CASES)
def test_grade_of_an_answer(name, arguments, answer, near):
    followed, nearness = checks.grade([name], [{**arguments, "of another instruction": None}], answer)
    assert followed == (near == 1,)
    assert nearness == (pytest.approx(near),)


@needs_checkers
def test_grade_of_an_empty_answer_is_nothing():
    for name, arguments, _, _ in CASES:
        assert checks.grade([name], [arguments], " \n") == ((False,), (0.0,)), name


@needs_checkers
def test_grade_repeats_itself():
    """The detection of languages draws at random unless it is seeded."""
    answer = ["change_case:english_lowercase"], [{}], "no on the si a du"
    assert len({checks.grade(*answer) for _ in range(20)}) == 1


@needs_checkers
@pytest.mark.parametrize("name", ["length_constraints:number_sentences", "no:such"])
def test_grade_of_an_instruction_that_cannot_be_checked_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is not checked here; leave its prompts out"):
        checks.grade([name], [{}], "a")


def test_missing_package_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "if_verifiable.ifeval.instructions_registry", None)
    checks._registry.cache_clear()
    checks._checker.cache_clear()
    with pytest.raises(ValueError, match=r"install the extra: python -m pip install 'xpo-jax\[real\]'"):
        checks.grade(["punctuation:no_comma"], [{}], "a")


def test_nearness_of_every_instruction_with_degrees_has_a_case():
    assert set(checks._NEARNESS) <= {name for name, _, _, near in CASES if near < 1}


# ---- prompts ------------------------------------------------------------------------------------


def test_split_has_no_prompt_in_common_and_is_the_same_every_time():
    train, held_out = prompts.split()
    assert (len(train), len(held_out)) == (93, 91)
    texts = [[row["prompt"].strip() for row in rows] for rows in (train, held_out)]
    assert len({*texts[0], *texts[1]}) == 184
    assert prompts.split() == (train, held_out) == (prompts.train(), prompts.held_out())


@pytest.mark.parametrize(
    ("name", "arguments", "short"),
    [
        ("length_constraints:number_words", {"relation": "at least", "num_words": 40}, True),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 41}, False),
        ("length_constraints:number_words", {"relation": "less than", "num_words": 400}, True),
        ("keywords:letter_frequency", {"let_relation": "less than", "let_frequency": 60}, True),
        ("combination:repeat_prompt", {"prompt_to_repeat": "a " * 30}, True),
        ("combination:repeat_prompt", {"prompt_to_repeat": "a " * 31}, False),
        ("punctuation:no_comma", {}, True),
        ("language:response_language", {"language": "en"}, False),
    ],
)
def test_instruction_is_short_by_the_stated_limit(name, arguments, short):
    assert prompts.is_short(name, arguments) is short


# ---- the judge ----------------------------------------------------------------------------------

ROW = {
    "prompt": "Say it without commas, in a title.",
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
    "kwargs": [{}, {}],
}
MESSAGES = [{"role": "user", "content": ROW["prompt"]}]


@needs_checkers
def test_judge_prefers_what_follows_more():
    """Scores: both followed 1; one followed and half of the other 0.5 + 0.25 / 2 = 0.625; one 0.5."""
    judge = follows(nearness_weight=0.5, softness=0.1)
    assert isinstance(judge, HasScores)
    texts = {"<<a>>": 1.0, "<<a": 0.625, "a": 0.5, "a, <<b>>": 0.5 + 0.25 / 2, "": 0.0}
    for a, score_a in texts.items():
        for b, score_b in texts.items():
            ((p, reason, scores),) = judge([Comparison(MESSAGES, ROW, a, b)])
            assert scores == {"a": pytest.approx(score_a), "b": pytest.approx(score_b)}
            assert p == pytest.approx(1 / (1 + math.exp(-(score_a - score_b) / 0.1)))
            one_by_one = judge.scores([Candidate(MESSAGES, ROW, text) for text in (a, b)])
            assert one_by_one == [scores["a"], scores["b"]] and judge.compare_scores(*one_by_one) == p
    assert reason == "A follows 0, B 0 of 2"
    ((p, _, _),) = follows(nearness_weight=0.0, softness=0.0)([Comparison(MESSAGES, ROW, "<<a", "a")])
    assert p == 0.5  # neither follows more, strictly


@needs_checkers
def test_judge_measures_an_answer_to_a_prompt_that_it_checked():
    judge = follows(nearness_weight=0.5, softness=0.1)
    assert judge.parts(MESSAGES, "<<a>>") == {}
    judge.check(MESSAGES, ROW)
    assert judge.parts(MESSAGES, "<<a>>") == {"followed": 1.0, "followed_all": 1.0, "score": 1.0}
    assert judge.parts(MESSAGES, "a") == {"followed": 0.5, "followed_all": 0.0, "score": 0.5}


@needs_checkers
def test_judge_refuses_rows_without_instructions():
    judge = follows(nearness_weight=0.5, softness=0.1)
    with pytest.raises(ValueError, match=r"no column 'kwargs'; use IFEval's rows"):
        judge.check(MESSAGES, {"prompt": "a", "instruction_id_list": []})
    for field, value in (("nearness_weight", 1.0), ("softness", -0.1)):
        with pytest.raises(ValueError, match=f"^{field} is {value}, must be"):
            follows(**{"nearness_weight": 0.5, "softness": 0.1, field: value})


def test_briefer_prefers_fewer_words_of_at_least_three():
    pairs = [("a b c", "a b c d"), ("a b", "a b c d"), ("a b c d", "a b c"), ("a", "b c"), ("a b c", "d e f")]
    answers = briefer([Comparison((), {}, a, b) for a, b in pairs])
    assert answers == ["A", "B", "B", "tie", "tie"]


@needs_checkers
def test_ties_are_counted_by_instruction(tmp_path, capsys):
    """Strictly, both answers of the first and second pair follow as much; the judge preferred one of the second."""
    pairs = [("<<a", "<<b", 0.5), ("<<a", "b", 0.7), ("<<a>>", "b", 0.99)]
    lines = [
        {"messages": MESSAGES, "row": ROW, "responses": [{"text": a}, {"text": b}], "p_first": p}
        for a, b, p in pairs
    ]
    lines.append({**lines[0], "row": {**ROW, "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}})
    for line in lines:
        texts = (response["text"] for response in line["responses"])
        line["hash"] = content_hash(line["messages"], line["row"], *texts)
    path = write_rows(tmp_path / "pairs.jsonl", lines)
    assert ties.count_ties(path) == {
        "all pairs": (4, 3, 2),
        "punctuation:no_comma": (3, 2, 1),
        "detectable_format:title": (3, 2, 1),
        "startend:quotation": (1, 1, 1),
    }
    assert command.main([f"--ties={path}"]) == 0
    assert re.search(r"^all pairs +4 +75% +50%$", capsys.readouterr().out, re.MULTILINE)


# ---- accuracy -----------------------------------------------------------------------------------

BEFORE = [[True, False], [False], [True], [False, False, False]]
AFTER = [[True, True], [False], [False], [True, True, False]]


def test_accuracy_of_literals():
    """By hand: 1 of 4 prompts, with Wilson's interval of 1 in 4; 2 of 7 instructions."""
    measured = accuracy.accuracy([BEFORE])
    z, p, n = 1.96, 0.25, 4
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    wilson = [(center + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert measured.prompts == pytest.approx((p, *wilson))
    residuals = [1 - 4 / 7, -2 / 7, 1 - 2 / 7, -6 / 7]
    half = 1.96 * math.sqrt(4 / 3 * sum(r * r for r in residuals)) / 7
    assert measured.instructions == pytest.approx((2 / 7, 2 / 7 - half, 2 / 7 + half))


def test_gain_is_paired_and_its_interval_is_over_prompts():
    gained = accuracy.gain(BEFORE, [AFTER])
    changes = np.array([1, 0, -1, 0])
    assert gained.prompts.mean == 0
    assert gained.prompts.high == pytest.approx(1.96 * changes.std(ddof=1) / 2)
    assert gained.instructions.mean == pytest.approx((1 + 0 - 1 + 2) / 7)
    # a second run with the same answers is no further evidence
    for measured, alone in zip(accuracy.gain(BEFORE, [AFTER, AFTER]), gained, strict=True):
        assert measured == pytest.approx(alone)
    for measured, alone in zip(accuracy.accuracy([AFTER, AFTER]), accuracy.accuracy([AFTER]), strict=True):
        assert measured == pytest.approx(alone)
    halfway = accuracy.gain(BEFORE, [AFTER, BEFORE])
    assert halfway.instructions.mean == pytest.approx(gained.instructions.mean / 2)


def test_interval_of_instructions_covers_as_often_as_it_says():
    """1,000 samples of 80 prompts whose instructions agree with one another."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        ease = rng.beta(1, 2, 80)
        rows = [list(rng.random(rng.integers(1, 4)) < p) for p in ease]
        rate = accuracy.accuracy([rows]).instructions
        covered += rate.low <= 1 / 3 <= rate.high
    assert 925 <= covered <= 970


# ---- the config, and a run ----------------------------------------------------------------------


def test_config_is_complete_and_names_the_judges():
    config = loader.load("configs/ifeval.py")
    assert config.judge.name == "xpo_jax.tools.ifeval.judge:follows"
    assert loader.load("configs/ifeval.py:briefer").judge.to_dict() == {
        "name": "xpo_jax.tools.ifeval.judge:briefer"
    }
    with pytest.raises(ValueError, match="briefer"):
        loader.load("configs/ifeval.py:longer")


@needs_checkers
def test_run_on_fake_data_learns_from_what_is_followed(tmp_path):
    """A tiny model that writes bytes at random meets an instruction by which its answers differ."""
    config = tiny_config(tmp_path)
    rows = [
        {
            "prompt": f"Prompt {i}",
            "instruction_id_list": ["keywords:letter_frequency"],
            "kwargs": [{"letter": "e", "let_frequency": 2, "let_relation": "at least"}],
        }
        for i in range(16)
    ]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.template = ({"role": "user", "content": "{prompt}"},)
    config.data.column = None
    config.judge = ConfigDict(loader.load("configs/ifeval.py").judge.to_dict())
    status, _, errors = run_main([f"--config={write_config(tmp_path / 'config.py', config)}"])
    assert status == 0, errors
    pairs = list(read_pairs(tmp_path / "run" / "pairs.jsonl"))
    assert {len(pair["scores"]) for pair in pairs if pair["shown"]} == {2}
    for pair in pairs:
        if pair["shown"]:
            scores = [pair["scores"]["policy"], pair["scores"]["reference"]]
            assert pair["p_first"] == pytest.approx(
                1 / (1 + math.exp((scores[1] - scores[0]) / 0.1)), abs=1e-6
            )


@needs_checkers
def test_command_prints_the_accuracies_of_the_answers_that_it_writes(tmp_path, monkeypatch, capsys):
    """Two random models answer three prompts; the same model gains nothing over itself."""
    at_least = {"let_relation": "at least", "let_frequency": 1}
    rows = [
        {
            "key": i,
            "prompt": f"Prompt {i}",
            "instruction_id_list": ["keywords:letter_frequency", "punctuation:no_comma"],
            "kwargs": [{"letter": "bny"[i], **at_least}, {}],
        }
        for i in range(3)
    ]
    monkeypatch.setattr(prompts, "held_out", lambda: rows)
    monkeypatch.setattr(unrelated, "rows", lambda: UNRELATED[:2])
    models = [str(write_model(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    out = tmp_path / "answers.jsonl"
    assert command.main([*models, f"--answers={out}", "--max_new_tokens=12", "--batch_size=2"]) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    lines, others = lines[:3], lines[3:]
    assert [line["prompt"] for line in others] == [row["prompt"] for row in UNRELATED[:2]]
    assert {len(line["answers"]) for line in others} == {2}
    start, trained = ([line["followed"][model] for line in lines] for model in (0, 1))
    assert [line["key"] for line in lines] == [0, 1, 2] and start != trained
    for line in lines:
        for answer, followed in zip(line["answers"], line["followed"], strict=True):
            assert followed == ["bny"[line["key"]] in answer.lower(), "," not in answer]
    assert printed.startswith("3 held-out prompts, 6 instructions\n" + models[0])
    shares = [sum(map(sum, followed)) / 6 for followed in (start, trained)]
    for share in shares:
        assert f"  instruction-level  {share:.1%} [" in printed
    assert f"  instruction-level  {shares[1] - shares[0]:+.1%} [" in printed.partition("gained over")[2]


def test_table_takes_several_seeds_together():
    answers = command.Answers(["a b c", "a b d"], np.array([True, False]), 10)
    away = command.Answers(["Paris"] * 60, np.ones(60, bool), 120)
    start, better, same = (
        command.Measured(answers, [(first,), (False,)], away) for first in (False, True, False)
    )
    text = command.table(["start", "seed 0", "seed 1"], [start, better, same])
    assert "  finished 50.0%, 5.0 tokens an answer, distinct-2 0.75" in text
    of_both = text.partition("all 2 but the first\n")[2]
    assert of_both.startswith("  prompt-level       25.0% [") and "  instruction-level  +25.0% [" in of_both
    assert (
        text.count("  unrelated prompts: right 1.7%, without loops 100.0%, finished 100.0%, 2.0 tokens") == 3
    )
    assert "  unrelated: win rate 50.0% [" in of_both and "  at equal lengths   50.0% [" in of_both


UNRELATED = unrelated.rows()


def test_unrelated_prompts_are_none_of_ifeval_s_and_a_wrong_answer_is_possible():
    texts = [row["prompt"] for row in UNRELATED]
    assert len(set(texts)) == 60 and not {*texts} & {row["prompt"] for row in prompts.chosen()}
    assert not unrelated.judge(UNRELATED, ["", *["Perhaps."] * 59], np.ones(60, bool)).right.any()


def test_helpful_answers_are_right_do_not_loop_and_end():
    row = {"prompt": "What is the capital of France?", "expected": ["Paris", "Lyon"]}
    loop = "I do not know. " * 8
    answers = ["It is PARIS.", "comParis", "abc", "Lyonnais", loop, f"Paris. {loop}", "Paris"]
    helpful = unrelated.judge([row] * 7, answers, np.array([True] * 6 + [False]))
    assert helpful.right.tolist() == [True, False, False, True, False, True, True]
    assert helpful.varied.tolist() == [True, True, True, True, False, False, True]
    assert helpful.score.tolist() == [3, 2, 2, 3, 1, 2, 2]


def test_unrelated_answers_are_compared_by_prompt_and_at_equal_lengths():
    """The longer answer of a prompt always wins, so that at equal lengths less is left of the win rate."""
    flags = np.ones(40, bool)
    longer = np.arange(40) % 4 > 0
    before = unrelated.Helpful(~longer, flags, flags), ["a" if long else "aaaa" for long in longer]
    after = unrelated.Helpful(longer, flags, flags), ["aaaa" if long else "a" for long in longer]
    rate, controlled = unrelated.compare(before, [after])
    assert rate.mean == 0.75
    assert 0.5 < controlled.mean < 0.65
    assert unrelated.compare(before, [after, before])[0].mean == (0.75 + 0.5) / 2


def test_command_line_that_is_wrong_is_one_line(capsys):
    assert command.main(["--batch_size=0"]) == 2
    assert capsys.readouterr().err == "ifeval: --batch_size and --max_new_tokens: at least 1 is expected\n"
