"""Files of answers: what was asked is found by the conversation; what is missing is told in one line."""

import numpy as np
import pytest
from fakes import write_rows

from xpo_jax.config import settings
from xpo_jax.data.answer_files import key, match_answers, read_answers
from xpo_jax.data.rows import DataError
from xpo_jax.values import Prompts

TEMPLATE = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say {text}"})
USED = {"template": TEMPLATE, "column": None, "rename": None}


def asked(text):
    return ({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {text}"})


def user(text):
    return ({"role": "user", "content": text},)


def batch(*messages, valid=None):
    size = len(messages)
    valid = np.ones(size, bool) if valid is None else np.array(valid)
    return Prompts(({},) * size, messages, None, None, None, valid)


def test_three_ways_to_say_what_was_asked(tmp_path):
    rows = [
        {"text": "a", "answer": "1", "prompt": "not looked at"},
        {"messages": list(asked("b")), "answer": "2"},
        {"prompt": "c", "answer": "3"},
        {"text": "a", "answer": "4"},
    ]
    found = read_answers(write_rows(tmp_path / "answers.jsonl", rows), **USED)
    assert [(each.messages, each.answers) for each in found.values()] == [
        (asked("a"), ["1", "4"]),
        (asked("b"), ["2"]),
        (user("c"), ["3"]),
    ]
    assert list(found) == [key(asked("a")), key(asked("b")), key(user("c"))]
    assert found[key(asked("a"))].row.values == rows[0]


def test_rename_and_column_are_the_configs(tmp_path):
    path = write_rows(tmp_path / "answers.jsonl", [{"question": "a", "answer": "1"}])
    renamed = {"template": None, "column": "text", "rename": {"question": "text"}}
    assert [each.messages for each in read_answers(path, **renamed).values()] == [user("a")]


def test_answers_stand_beside_their_prompts(tmp_path):
    rows = [{"text": text, "answer": f"to {text}"} for text in "dcba"]
    path = write_rows(tmp_path / "answers.jsonl", rows)
    batches = [batch(asked("a"), asked("c")), batch(asked("d"), asked("a"), (), valid=[True, True, False])]
    assert match_answers(batches, path, **USED) == [["to a", "to c"], ["to d", "to a", ""]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "answers.jsonl, row 1: no column 'answer'; the row has: text"),
        ([{"text": "a", "answer": 3}], "answers.jsonl, row 1: column 'answer' must be text, found 3"),
        ([{"answer": "x"}], "row 1: does not say what was asked; give 'text', or 'messages' or 'prompt'"),
        ([{"text": "b", "answer": "x"}], "has no answer to the held-out prompt 'Say a'; add it, or lower"),
        (
            [{"text": "a", "answer": x} for x in "xy"],
            "row 1: 'Say a' has several answers in this file; keep one",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(tmp_path, rows, message):
    path = write_rows(tmp_path / "answers.jsonl", rows)
    with pytest.raises(DataError) as error:
        match_answers([batch(asked("a"))], path, **USED)
    assert message in str(error.value) and "\n" not in str(error.value)


GROUP = {"prompts": 2, "reference_samples": 1, "every_steps": 1, "answers": None}
OFF = {"stop_kl": None, "stop_win_rate": None, "stop_validity_drop": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop_kl": 0.0}, "stop_kl is 0.0, must be positive, or None"),
        ({"stop_win_rate": 1.5}, "stop_win_rate is 1.5, must be positive and at most 1, or None"),
        ({"stop_validity_drop": -0.1}, "stop_validity_drop is -0.1, must be positive and at most 1"),
        ({"stop_kl": 5.0, "every_steps": 0}, "stop_kl is 5.0, but every_steps is 0: nothing would look"),
    ],
)
def test_limits_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        settings.Evaluation(**{**GROUP, **OFF, **change})
    assert settings.Evaluation(**GROUP, **{**OFF, "stop_kl": 5.0}).stops == {**OFF, "stop_kl": 5.0}
