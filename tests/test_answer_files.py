"""Answer files: rows are matched by conversation; what is missing is an error of one line."""

import numpy as np
import pytest
from fake_data import follows
from tiny_run import write_rows

from xpo_jax.config.evaluation import Evaluation
from xpo_jax.data.answer_files import key, match_answers, read_answers
from xpo_jax.data.rows import DataError
from xpo_jax.values import Prompts

TEMPLATE = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say {text}"})
USED = {"template": TEMPLATE, "column": None, "rename": None}


def conversation(text):
    return ({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {text}"})


def user(text):
    return ({"role": "user", "content": text},)


def batch(*messages, valid=None):
    size = len(messages)
    valid = np.ones(size, bool) if valid is None else np.array(valid)
    return Prompts(({},) * size, messages, None, None, None, valid)


def test_read_answers_prompt_in_three_forms(tmp_path):
    rows = [
        {"text": "a", "answer": "1", "prompt": "not looked at"},
        {"messages": list(conversation("b")), "answer": "2"},
        {"prompt": "c", "answer": "3"},
        {"text": "a", "answer": "4"},
    ]
    answered = read_answers(write_rows(tmp_path / "answers.jsonl", rows), **USED)
    assert [(entry.messages, entry.answers) for entry in answered.values()] == [
        (conversation("a"), ["1", "4"]),
        (conversation("b"), ["2"]),
        (user("c"), ["3"]),
    ]
    assert list(answered) == [key(conversation("a")), key(conversation("b")), key(user("c"))]
    assert answered[key(conversation("a"))].row.values == rows[0]


def test_read_answers_applies_rename_and_column(tmp_path):
    path = write_rows(tmp_path / "answers.jsonl", [{"question": "a", "answer": "1"}])
    renamed = {"template": None, "column": "text", "rename": {"question": "text"}}
    assert [entry.messages for entry in read_answers(path, **renamed).values()] == [user("a")]


def test_match_answers_follows_the_prompts(tmp_path):
    rows = [{"text": text, "answer": f"to {text}"} for text in "dcba"]
    path = write_rows(tmp_path / "answers.jsonl", rows)
    batches = [
        batch(conversation("a"), conversation("c")),
        batch(conversation("d"), conversation("a"), (), valid=[True, True, False]),
    ]
    assert match_answers(batches, path, **USED) == [["to a", "to c"], ["to d", "to a", ""]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "answers.jsonl, row 1: ... 'answer' ... text"),
        ([{"text": "a", "answer": 3}], "answers.jsonl, row 1: column 'answer' ... must be text ... 3"),
        ([{"answer": "x"}], "answers.jsonl, row 1: ... add column 'text', or 'messages' or 'prompt'"),
        (
            [{"text": "b", "answer": "x"}],
            "answers.jsonl: ... 'Say a' ... add it, or lower evaluation.prompts",
        ),
        (
            [{"text": "a", "answer": x} for x in "xy"],
            "answers.jsonl, row 1: 'Say a' ... keep one of them",
        ),
    ],
)
def test_match_answers_bad_file_names_row_and_remedy(tmp_path, rows, message):
    path = write_rows(tmp_path / "answers.jsonl", rows)
    with pytest.raises(DataError) as error:
        match_answers([batch(conversation("a"))], path, **USED)
    text = str(error.value).removeprefix(f"{tmp_path}/")
    assert follows(text, message) and "\n" not in text


GROUP = {"prompts": 2, "reference_samples": 1, "every_steps": 1, "answers": None, "judge": None}
OFF = {"stop_kl": None, "stop_win_rate": None, "stop_validity_drop": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop_kl": 0.0}, "stop_kl is 0.0, must be positive, or None"),
        ({"stop_win_rate": 1.5}, "stop_win_rate is 1.5, must be positive and at most 1, or None"),
        ({"stop_validity_drop": -0.1}, "stop_validity_drop is -0.1, must be positive and at most 1"),
        (
            {"stop_kl": 5.0, "every_steps": 0},
            "stop_kl is 5.0, but every_steps is 0.*set every_steps, or None",
        ),
    ],
)
def test_evaluation_stop_criterion_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**{**GROUP, **OFF, **change})
    assert Evaluation(**GROUP, **{**OFF, "stop_kl": 5.0}).stops == {**OFF, "stop_kl": 5.0}
