"""Sources that are too large to be held: the index of lines, prompts made as they pass, batches from them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from fakes import run_main, tiny_config, write_config, write_rows
from test_data import folder, ids, load, refused, same, tokenizer  # noqa: F401

from tools import data as tool
from xpo_jax.data import indexed_lines, prompts, sources, streaming
from xpo_jax.data.rows import DataError
from xpo_jax.data.streaming import StreamingPrompts


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(prompts, "MAX_ROWS_IN_MEMORY", 5)


def write(folder, texts) -> list[dict]:  # noqa: F811
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    write_rows(folder / "t.jsonl", rows)
    return rows


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 22])
def test_lines_are_found_wherever_the_chunks_end(folder, monkeypatch, chunk):  # noqa: F811
    monkeypatch.setattr(indexed_lines, "CHUNK", chunk)
    contents = [
        b"a\nb\n",
        b"\n\n  \na\r\n \t\r\n\nb",
        b"a",
        b"\xef\xbb\xbfa\n\xe2\x80\xa8\n",
        b"  a  \n" * 9 + b" \n",
        b"aa\n\n\n\n\nbb\n ",
    ]
    for content in contents:
        (folder / "x.txt").write_bytes(content)
        expected = [
            (number, line.decode().rstrip("\r"))
            for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
            if line.strip()
        ]
        assert [(row.number, row.values["text"]) for row in sources.read_rows("x.txt")] == expected


def test_a_large_source_gives_the_batches_of_a_small_one(folder, tokenizer, monkeypatch):  # noqa: F811
    write(folder, ["x" * (i % 17 + 1) for i in range(23)])
    passing_by = load(tokenizer).train_batches(4, seed=5)
    assert isinstance(passing_by._prompts, StreamingPrompts)
    monkeypatch.setattr(prompts, "MAX_ROWS_IN_MEMORY", 50_000)
    held = load(tokenizer).train_batches(4, seed=5)
    assert passing_by.steps_per_epoch == held.steps_per_epoch == 6
    for step in (0, 5, 6, 3, 11, 200):
        assert same(passing_by[step], held[step])
    assert sorted(ids(batch) for batch in passing_by) == sorted(ids(batch) for batch in held)
    # what is not known before the rows are read is compiled ahead all the same
    assert held.buckets_used(10) == (16, 32) and passing_by.buckets_used(10) == (16, 32, 64)


def test_a_row_that_cannot_be_used_is_replaced_by_the_next(folder, tokenizer):  # noqa: F811
    write(folder, ["a", "b", " ", "x" * 65, "e", "f", "g", " "])
    fields = {"on_bad_row": "skip", "on_long": "drop"}
    data = load(tokenizer, **fields, shuffle=False)
    batches = data.train_batches(4, seed=0)
    assert [ids(batches[0]), ids(batches[1])] == [[0, 1, 4, 4], [4, 5, 6, 0]]
    assert [batches.metrics(step) for step in (0, 1, 0, 7)] == [
        {"data/replaced_rows": n} for n in (2, 1, 2, 1)
    ]
    assert batches[0].valid.all()
    shuffled = load(tokenizer, **fields).train_batches(4, seed=3)
    again = load(tokenizer, **fields).train_batches(4, seed=3)
    assert same(shuffled[9], again[9])
    assert data.train.summary() == (
        "prompts of 1 to 1 tokens in the first 1000 rows, the others checked as they pass (overlap with the "
        "held-out prompts is not counted), from 8 rows; left out: on_bad_row 2, max_prompt_tokens 1; "
        "the first bad row: t.jsonl, row 3: column 'text' is empty"
    )
    assert data.overlap() is None


def test_a_bad_row_met_on_the_way_is_an_error(folder, tokenizer, monkeypatch):  # noqa: F811
    write(folder, ["a"] * 20 + [" "] + ["b"] * 20)
    assert refused(tokenizer) == "t.jsonl, row 21: column 'text' is empty"  # among the first
    monkeypatch.setattr(streaming, "_CHECKED_ROWS", 10)
    batches = load(tokenizer, shuffle=False).train_batches(4, seed=0)
    assert len(batches[4].rows) == 4
    with pytest.raises(DataError, match="^t.jsonl, row 21: column 'text' is empty$"):
        batches[5]
    write(folder, ["a"] * 20 + ["x" * 65])
    batches = load(tokenizer, shuffle=False).train_batches(4, seed=0)
    with pytest.raises(DataError, match=r"^t.jsonl, row 21: the prompt has 65 tokens, more than max_prompt"):
        batches[5]


def test_too_many_rows_on_end_that_cannot_be_used(folder, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(streaming, "_MAX_SKIPPED", 6)
    write(folder, [" "] * 10)
    assert refused(tokenizer, on_bad_row="skip") == (
        "t.jsonl: 6 rows on end from place 1 cannot be used, the last because of on_bad_row; loosen that field, or "
        "take these rows out"
    )


def test_deduplicate_and_take_look_at_all_rows_first(folder, tokenizer):  # noqa: F811
    write(folder, [*"aabcad", " ", "xx", "x" * 65, "xyz", "b", "y" * 20])
    fields = {"on_bad_row": "skip", "on_long": "drop"}
    unique = load(tokenizer, **fields, deduplicate=True, shuffle=False)
    assert unique.train.dropped == {"deduplicate": 3, "on_bad_row": 1, "max_prompt_tokens": 1}
    assert unique.train.summary() == (
        "7 prompts of 1 to 20 tokens, read as they pass, from 12 rows; left out: on_bad_row 1, "
        "max_prompt_tokens 1, deduplicate 3; the first bad row: t.jsonl, row 7: column 'text' is empty"
    )
    batches = unique.train_batches(4, seed=0)
    assert [ids(batches[0]), ids(batches[1])] == [[0, 2, 3, 5], [7, 9, 11]]
    assert batches.buckets_used(1) == (16,) and batches.buckets_used(2) == (16, 32)
    six = load(tokenizer, **fields, take=8, shuffle=False).train
    assert isinstance(six.prompts, StreamingPrompts) and six.dropped["take"] == 2
    few = load(
        tokenizer, **fields, take=3
    ).train  # few enough to be held, and the rows beyond are not looked at
    assert [prompt.row.number for prompt in few.prompts] == [1, 2, 3]
    assert few.dropped == {"take": 9} and isinstance(few.prompts, tuple)


def test_a_large_held_out_source_gives_its_first_prompts_once(folder, tokenizer):  # noqa: F811
    write(folder, ["a", " ", "c", "d", "e", "f"])
    data = load(tokenizer, train="good.jsonl", held_out="t.jsonl", on_bad_row="skip")
    assert [ids(batch) for batch in data.held_out_batches(2, prompts=3)] == [[0, 2], [3]]
    assert [ids(batch) for batch in data.held_out_batches(4, prompts=99)] == [[0, 2, 3, 4], [5]]


def test_a_file_that_changes_during_the_run_is_an_error(folder, tokenizer):  # noqa: F811
    write(folder, "abcdefgh")
    batches = load(tokenizer, on_bad_row="skip").train_batches(4, seed=0)
    batches[0]
    write(folder, "bcdefghij")
    with pytest.raises(
        DataError, match="^t.jsonl: the file has changed during the run; start again with a copy"
    ):
        batches[1]
    (folder / "t.jsonl").unlink()
    with pytest.raises(DataError, match=r"^t.jsonl: cannot be read any more: No such file"):
        batches[1]


def test_the_fingerprint_of_a_large_source_is_of_its_files(folder, tokenizer):  # noqa: F811
    write(folder, "abcdefgh")
    first = load(tokenizer).train
    write(folder, "abcdefgi")
    second = load(tokenizer).train
    assert len(first.fingerprint) == 64 and first.fingerprint != second.fingerprint
    write(folder, "abcdefgh")
    assert load(tokenizer).train.fingerprint == first.fingerprint


def test_memory_holds_an_index_and_no_rows(folder):  # noqa: F811
    """Twelve bytes a row, whatever the rows hold."""
    (folder / "big.jsonl").write_bytes(b"".join(b'{"text": "%0200d"}\n' % i for i in range(10_000)))
    rows = sources.open_rows("big.jsonl")
    held = sum(value.nbytes for value in vars(rows).values() if isinstance(value, np.ndarray))
    assert len(rows) == 10_000 and held == 12 * 10_000
    assert rows[9_999].values == {"text": f"{9_999:0200d}"}
    others = {name: v for name, v in vars(rows).items() if not isinstance(v, np.ndarray) and name != "_parse"}
    assert len(json.dumps(others, default=str)) < 500


@pytest.mark.slow
def test_a_run_over_a_large_source(folder):  # noqa: F811
    """From the command line to metrics and environment, with rows on the way that cannot be used."""
    config = tiny_config(folder)
    with open(folder / "train.jsonl", "ab") as file:
        file.write(b'{"text": ""}\n{"text": 3}\n')
    config.data.on_bad_row, config.steps = "skip", 3  # an epoch: 23 rows in batches of 8
    status, out, err = run_main([f"--config={write_config(folder / 'c.py', config)}"])
    assert status == 0, err
    assert "left out: on_bad_row" in out
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("data/replaced_rows", 0) for line in metrics) == 2
    recorded = json.loads((folder / "run" / "environment.json").read_text())["sources"]
    data = (folder / "train.jsonl").read_bytes()
    assert recorded["train"] == [
        {
            "file": str(folder / "train.jsonl"),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    ]


def test_the_tool_shows_what_a_run_would_read(folder, capsys):  # noqa: F811
    """Eight rows, of which one cannot be used, in batches of four: the second batch of an epoch has its replacement."""
    config = tiny_config(folder)
    write(folder, ["a", "b", "c", "d", "e", "f", " ", "h"])
    config.data.train, config.data.on_bad_row = str(folder / "t.jsonl"), "skip"
    config.data.shuffle, config.batch_size = False, 4
    spec = write_config(folder / "c.py", config)
    assert tool.main([f"--config={spec}", "--batches=4", "--show=2"]) == 0
    out = capsys.readouterr().out
    assert "from 8 rows" in " ".join(out.split()) and out.count("<|im_start|>user") == 2
    found = json.loads(out.splitlines()[-1])
    assert (found["rows"], found["batches"], found["replaced_rows"]) == (8, 4, 2)
    assert 0 <= found["seconds_until_ready"] <= found["seconds_until_first_batch"]
    assert 0 < found["peak_mib_before"] <= found["peak_mib_after"] < 1e6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=c.py", "--batches=0"], "data: --show=3 --batches=0: from 0 and from 1 on"),
        (["--config=c.py", "--config.data.train=no.jsonl"], "data: no.jsonl: there is no such file"),
        (["--config=c.py", "rows.jsonl"], "data: argument 'rows.jsonl' is not understood"),
        (
            ["--config=c.py", '--config.data.train={"hf": "x"}'],
            "; lists and mappings stand in a config, on the",
        ),
    ],
)
def test_the_tool_refuses_in_one_line(folder, capsys, argv, message):  # noqa: F811
    write_config(folder / "c.py", tiny_config(folder))
    assert tool.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
