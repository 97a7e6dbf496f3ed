"""From a pairs log to a preference data set and back: literal rows, and what the offline loop reads from them."""

import json

import pytest
from fake_data import PAIR_MESSAGES, logged_pairs
from fake_models import write_model
from tiny_run import write_rows

from tools import pairs
from xpo_jax.data.offline_pairs import load_pairs
from xpo_jax.data.pairs_log import PairsLog, content_hash
from xpo_jax.models.hf import model_folder

END = 258  # the chat template's


def record(p, first, second, weight=1.0):
    """A pair of two texts with the byte tokenizer's tokens left out."""
    responses = [{"tokens": [1], "text": text, "finished": text != "cut"} for text in (first, second)]
    return {
        **logged_pairs()[0],
        "p_first": p,
        "weight": weight,
        "responses": responses,
        "hash": content_hash(PAIR_MESSAGES, logged_pairs()[0]["row"], first, second),
    }


@pytest.fixture
def log(tmp_path):
    with PairsLog(tmp_path / "pairs.jsonl") as log:
        log.append([record(0.75, "ja", "nein"), record(0.5, "a", "b"), record(None, "a", "b", weight=0.0)])
    with PairsLog(tmp_path / "pairs-1.jsonl") as log:
        log.append([record(0.25, "falsch", "cut")])
    return tmp_path


def convert(*argv):
    return pairs.main([str(arg) for arg in argv])


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assistant(text):
    return [{"role": "assistant", "content": text}]


DPO = [
    {"prompt": PAIR_MESSAGES, "chosen": assistant("cut"), "rejected": assistant("falsch"), "p_chosen": 0.75},
    {"prompt": PAIR_MESSAGES, "chosen": assistant("ja"), "rejected": assistant("nein"), "p_chosen": 0.75},
]


def test_pairs_log_to_preference_data_set(log, tmp_path, capsys):
    assert convert(log / "pairs*.jsonl", f"--out={tmp_path / 'dpo.jsonl'}") == 0
    assert rows_of(tmp_path / "dpo.jsonl") == DPO
    counts = json.loads(capsys.readouterr().out)
    del counts["out"]
    assert counts == {"pairs": 2, "with an unfinished answer": 1, "ties": 1, "no verdict": 1}


def test_preference_data_set_is_readable_by_datasets(log, tmp_path):
    import datasets

    convert(log / "pairs.jsonl", f"--out={tmp_path / 'dpo.jsonl'}")
    data_set = datasets.Dataset.from_json(str(tmp_path / "dpo.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert data_set.column_names == ["prompt", "chosen", "rejected", "p_chosen"] and data_set[0] == DPO[1]


def ascii_tokens(text):
    """Return the byte tokenizer's tokens of ASCII: the printable bytes from "!" on come first in its alphabet."""
    return [ord(character) - ord("!") for character in text]


@pytest.mark.parametrize("plain", [False, True])
def test_preference_data_set_to_pairs_log_is_readable_by_load_pairs(tmp_path, plain, capsys):
    model = write_model(tmp_path / "model")
    tokenizer = model_folder.load_tokenizer(model, model_folder.read_config(model))
    rows = [{**row, "number": 7} for row in DPO]
    if plain:  # a file from elsewhere, without p_chosen
        rows = [{"prompt": "Sag ja!", "chosen": "ja", "rejected": "nein", "number": 7}]
    source = write_rows(tmp_path / "dpo.jsonl", rows)
    assert convert(source, f"--model={model}", f"--out={tmp_path / 'back.jsonl'}") == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == len(rows)
    loaded = load_pairs(
        pairs=str(tmp_path / "back.jsonl"),
        template=None,
        column="prompt",
        max_prompt_tokens=64,
        on_long="error",
        take=None,
        chat_template_arguments=None,
        on_bad_row="error",
        on_extra_keys="error",
        on_assistant_last="error",
        tokenizer=tokenizer,
        end_tokens=(END,),
        max_new_tokens=8,
    )
    last = loaded.prompts[-1]
    assert last.row.values == {
        "responses": [[*ascii_tokens("ja"), END], [*ascii_tokens("nein"), END]],
        "p_first": 1.0 if plain else 0.75,
        "weight": 1.0,
    }
    text = (
        "Sag ja!"
        if plain
        else tokenizer.apply_chat_template(PAIR_MESSAGES, tokenize=False, add_generation_prompt=True)
    )
    assert tokenizer.decode(last.tokens) == text
    assert rows_of(tmp_path / "back.jsonl")[-1]["row"] == {"prompt": rows[-1]["prompt"], "number": 7}


def test_pairs_tool_bad_input_is_one_line(log, tmp_path, capsys):
    model, out = write_model(tmp_path / "model"), f"--out={tmp_path / 'out.jsonl'}"

    def error(*argv):
        assert convert(*argv, out) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and not (tmp_path / "out.jsonl").exists()
        return err

    def data(**changes):
        return write_rows(tmp_path / "bad.jsonl", [DPO[0], {**DPO[1], **changes}])

    assert "none.jsonl: cannot be read" in error(tmp_path / "none.jsonl")
    assert "the following arguments are required" in error()
    (tmp_path / "ties.jsonl").write_text((log / "pairs.jsonl").read_text().splitlines(keepends=True)[1])
    assert "ties.jsonl: no pair prefers one response" in error(tmp_path / "ties.jsonl")
    option = f"--model={model}"
    all_ties = write_rows(tmp_path / "all_ties.jsonl", [{**row, "p_chosen": 0.5} for row in DPO])
    assert "all_ties.jsonl: no pair prefers one response (ties 2)" in error(all_ties, option)
    answered = [*PAIR_MESSAGES, {"role": "assistant", "content": "ja"}]
    assert "on_assistant_last" in error(data(prompt=answered), option)
    assert "bad.jsonl, row 2: column 'chosen' must be text, or a list of" in error(
        data(chosen=PAIR_MESSAGES), option
    )
    assert "bad.jsonl, row 2: column 'rejected' must be" in error(data(rejected=None), option)
    assert "column 'p_chosen' must be a number from 0 to 1, got 2" in error(data(p_chosen=2), option)
    write_rows(tmp_path / "bad.jsonl", [{"chosen": "a", "rejected": "b"}])
    assert "bad.jsonl, row 1: no column 'prompt'" in error(tmp_path / "bad.jsonl", option)


def test_pairs_tool_on_bad_row_skip_counts_unusable_rows(tmp_path, capsys):
    rows = [DPO[0], {"prompt": "p", "chosen": ["x"], "rejected": "b"}, DPO[1]]
    source = write_rows(tmp_path / "dpo.jsonl", rows)
    options = (f"--model={write_model(tmp_path / 'model')}", f"--out={tmp_path / 'log.jsonl'}")
    assert convert(source, *options) == 2 and "row 2" in capsys.readouterr().err
    assert convert(source, *options, "--on_bad_row=skip") == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["pairs"], counts["on_bad_row"]) == (2, 1)


def test_pairs_tool_on_assistant_last_drop_removes_that_answer(tmp_path):
    answered = [*PAIR_MESSAGES, {"role": "assistant", "content": "ja"}]
    source = write_rows(tmp_path / "dpo.jsonl", [{**DPO[1], "prompt": answered}])
    options = (f"--model={write_model(tmp_path / 'model')}", f"--out={tmp_path / 'log.jsonl'}")
    assert convert(source, *options, "--on_assistant_last=drop") == 0
    assert rows_of(tmp_path / "log.jsonl")[0]["messages"] == list(PAIR_MESSAGES)
