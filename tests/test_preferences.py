"""Preference data as people have them, by the tool and by an offline run: literal pairs, counts, refusals."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from fake_models import write_model
from tiny_run import write_rows

from tools import pairs
from xpo_jax.data import preferences
from xpo_jax.data.offline_pairs import load_pairs
from xpo_jax.data.rows import DataError, Row
from xpo_jax.models.hf import model_folder

CASES = Path(__file__).parent / "cases"
END = 258  # <|im_end|>


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


EXPECTED = [("Name a god.", "Odin.", "No."), ("Name a sea.", "The Baltic.", "Blue.")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return model_folder.load_tokenizer(model, model_folder.read_config(model))


@pytest.fixture
def convert(model, tmp_path, capsys):
    """Convert a file with the tool; return exit status, records, and what was printed last."""

    def run(source):
        out = tmp_path / "log.jsonl"
        status = pairs.main([str(source), f"--model={model}", f"--out={out}"])
        printed = capsys.readouterr()
        if status:
            return status, [], printed.err
        counts = json.loads(printed.out)
        del counts["out"]
        return status, [json.loads(line) for line in out.read_text().splitlines()], counts

    return run


def offline(tokenizer, path, **fields):
    group = {
        "template": None, "column": "prompt", "max_prompt_tokens": 128, "on_long": "error", "take": None,
        "chat_template_arguments": None, "on_bad_row": "error", "on_extra_keys": "error", "on_assistant_last": "error",
        "tokenizer": tokenizer, "end_tokens": (END, 256), "max_new_tokens": 32,
    }  # fmt: skip
    return load_pairs(pairs=str(path), **{**group, **fields})


@pytest.mark.parametrize("name", ["ultrafeedback", "implicit", "end_token"])
def test_case_file_gives_prompt_and_responses(name, convert, tokenizer):
    source = CASES / f"pairs_{name}.jsonl"
    status, records, counts = convert(source)
    assert (
        status == 0
        and [
            (*(m["content"] for m in record["messages"]), *(r["text"] for r in record["responses"]))
            for record in records
        ]
        == EXPECTED
    )
    stripped = {"end tokens stripped": 4} if name == "end_token" else {}
    assert counts == {"pairs": 2, **stripped}
    loaded = offline(tokenizer, source)  # without the tool
    for prompt, (text, chosen, rejected) in zip(loaded.prompts, EXPECTED, strict=True):
        assert (
            tokenizer.decode(prompt.tokens) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        responses = [tokenizer.decode(tokens) for tokens in prompt.row.values["responses"]]
        assert responses == [f"{chosen}<|im_end|>", f"{rejected}<|im_end|>"]
        assert (prompt.row.values["p_first"], prompt.row.values["weight"]) == (1.0, 1.0)
    assert loaded.summary().endswith("; end tokens stripped 4") == bool(stripped)
    assert loaded.sources[0]["file"] == str(source)


def test_empty_and_equal_responses_are_dropped_with_a_count(convert, tokenizer, tmp_path):
    rows = [
        {"prompt": "a", "chosen": "", "rejected": "x"},
        {"prompt": "b", "chosen": "x", "rejected": " \n"},
        {"prompt": "c", "chosen": "x", "rejected": "x<|im_end|>"},
        {"prompt": "d", "chosen": "x", "rejected": "y"},
    ]
    source = write_rows(tmp_path / "dpo.jsonl", rows)
    status, records, counts = convert(source)
    assert status == 0 and [record["messages"] for record in records] == [[user("d")]]
    expected = {"empty response": 2, "equal responses": 1, "end tokens stripped": 1}
    assert counts == {"pairs": 1, **expected}
    loaded = offline(tokenizer, source)
    assert loaded.read == 4 and loaded.dropped == {"empty response": 2, "equal responses": 1}
    write_rows(tmp_path / "dpo.jsonl", rows[:1])
    status, _, error = convert(source)
    assert status == 2 and "no pair prefers one response (empty response 1)" in error
    with pytest.raises(DataError, match=r"no pair is left of 1 \(empty response 1\)"):
        offline(tokenizer, source)


def test_dialogues_of_one_text_are_conversations():
    """As in hh-rlhf."""
    start = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    chosen, rejected = f"{start} x\n\nin two paragraphs: Human: y", f"{start} z"
    expected = (user("a?"), assistant("b"), user("c")), "x\n\nin two paragraphs: Human: y", "z", 1.0
    for cut in ("\n\n", ""):  # some copies have no space in front
        values = {"chosen": cut + chosen.strip(), "rejected": cut + rejected.strip()}
        assert preferences.read(Row("t.jsonl", 1, values)) == expected
    windows = {name: text.replace("\n", "\r\n") for name, text in values.items()}
    assert preferences.read(Row("t.jsonl", 1, windows)).prompt == expected[0]
    prompt = {"prompt": start, "chosen": "x", "rejected": "z"}  # the prompt alone is a dialogue
    assert preferences.read(Row("t.jsonl", 1, prompt)) == (expected[0], "x", "z", 1.0)
    with pytest.raises(DataError, match="column 'prompt' differs from the prompt in chosen and rejected"):
        preferences.read(Row("t.jsonl", 1, {"prompt": "p", "chosen": chosen, "rejected": rejected}))


def test_pairs_that_are_all_ties_are_refused(tokenizer, tmp_path):
    rows = [{"prompt": "a", "chosen": "x", "rejected": "y", "p_chosen": 0.5} for _ in range(2)]
    with pytest.raises(DataError, match="all 2 pairs are ties"):
        offline(tokenizer, write_rows(tmp_path / "ties.jsonl", rows))
    offline(tokenizer, write_rows(tmp_path / "one.jsonl", [*rows, {**rows[0], "p_chosen": 0.6}]))


def test_log_to_preferences_drops_empty_and_equal_responses():
    def record(first, second):
        return {
            "p_first": 1.0,
            "weight": 1.0,
            "messages": [],
            "responses": [{"text": first}, {"text": second}],
        }

    assert pairs.preference(record("a", "")) == "empty response"
    assert pairs.preference(record("a", "a")) == "equal responses"


def test_conversations_of_preferences_are_read_in_any_form(tokenizer):
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]
    other = [user("a"), {**assistant("y"), "name": None}]
    row = Row("t.jsonl", 1, {"chosen": json.dumps(sharegpt), "rejected": other, "p_chosen": None})
    assert preferences.read(row) == ((user("a"),), "x", "y", 1.0)
    prompt = json.dumps([user("a")])
    row = Row("t.jsonl", 1, {"prompt": prompt, "chosen": [assistant("x")], "rejected": "y", "p_chosen": 0.75})
    assert preferences.read(row) == ((user("a"),), "x", "y", 0.75)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chosen": "x", "rejected": "y"}, "no column 'prompt'"),
        ({"chosen": [user("a"), assistant("x")], "rejected": "y"}, "must both be conversations"),
        (
            {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
            "differ in more than their last turn; remove the row",
        ),
        (
            {"prompt": "b", "chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]},
            "column 'prompt' differs from the prompt in chosen and rejected",
        ),
        (
            {"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("y")]},
            "the last turn of column 'chosen' must be text, or a list of one message with role assistant",
        ),
        (
            {"prompt": "a", "chosen": "x<|im_end|>y", "rejected": "y"},
            "column 'chosen' holds the control token",
        ),
        ({"prompt": "a", "chosen": 3, "rejected": "y"}, "column 'chosen' must be text, or"),
    ],
)
def test_preference_that_cannot_be_used_is_refused(tokenizer, values, message):
    tokenize = preferences.ResponseTokenizer(tokenizer, (END,))
    with pytest.raises(DataError, match=f"^t.jsonl, row 1: .*{message}") as error:
        preferences.record(Row("t.jsonl", 1, values), 0, tokenize, Counter())
    assert "\n" not in str(error.value)


def test_only_special_end_tokens_are_stripped(tokenizer):
    tokenize = preferences.ResponseTokenizer(tokenizer, (END, 256, 0))  # 0 is "!"
    texts = ("x!", "x<|im_end|>", "x<|endoftext|>\n", "x<|im_end|><|im_end|>", "x\n")
    assert [tokenize.strip(text) for text in texts] == ["x!", "x", "x", "x<|im_end|>", "x\n"]
