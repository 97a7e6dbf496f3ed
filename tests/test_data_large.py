"""Sources too large for memory: the index of lines, streaming prompts, batches of them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from fake_data import follows, load_data, load_error, same_batch, valid_ids
from tiny_run import run_main, tiny_config, write_config, write_rows

from tools import data as tool
from xpo_jax.data import batches as batches_module
from xpo_jax.data import indexed_lines, prompt_sets, sources, streaming
from xpo_jax.data.rows import DataError
from xpo_jax.data.streaming import StreamingPrompts


@pytest.fixture(autouse=True)
def every_source_is_streamed(monkeypatch):
    monkeypatch.setattr(prompt_sets, "MAX_ROWS_IN_MEMORY", 5)


def write(data_folder, texts) -> list[dict]:
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    write_rows(data_folder / "t.jsonl", rows)
    return rows


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 22])
def test_indexed_lines_any_chunk_size_finds_every_line(data_folder, monkeypatch, chunk):
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
        (data_folder / "x.txt").write_bytes(content)
        expected = [
            (number, line.decode().rstrip("\r"))
            for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
            if line.strip()
        ]
        assert [(row.number, row.values["text"]) for row in sources.read_rows("x.txt")] == expected


def test_batches_streamed_source_equal_those_in_memory(data_folder, tokenizer, monkeypatch):
    write(data_folder, ["x" * (i % 17 + 1) for i in range(23)])
    streamed = load_data(tokenizer).train_batches(4, seed=5)
    assert isinstance(streamed._prompts, StreamingPrompts)
    monkeypatch.setattr(prompt_sets, "MAX_ROWS_IN_MEMORY", 50_000)
    in_memory = load_data(tokenizer).train_batches(4, seed=5)
    assert streamed.steps_per_epoch == in_memory.steps_per_epoch == 6
    for step in (0, 5, 6, 3, 11, 200):
        assert same_batch(streamed[step], in_memory[step])
    assert sorted(valid_ids(batch) for batch in streamed) == sorted(valid_ids(batch) for batch in in_memory)
    # lengths are unknown before the rows are read, so every bucket is compiled
    assert in_memory.buckets_used(10) == (16, 32) and streamed.buckets_used(10) == (16, 32, 64)


def test_streaming_unusable_row_is_replaced_by_the_next(data_folder, tokenizer):
    write(data_folder, ["a", "b", " ", "x" * 65, "e", "f", "g", " "])
    fields = {"on_bad_row": "skip", "on_long": "drop"}
    data = load_data(tokenizer, **fields, shuffle=False)
    batches = data.train_batches(4, seed=0)
    assert [valid_ids(batches[0]), valid_ids(batches[1])] == [[0, 1, 4, 4], [4, 5, 6, 0]]
    assert [batches.metrics(step) for step in (0, 1, 0, 7)] == [
        {"data/replaced_rows": n} for n in (2, 1, 2, 1)
    ]
    assert batches[0].valid.all()
    shuffled = load_data(tokenizer, **fields).train_batches(4, seed=3)
    again = load_data(tokenizer, **fields).train_batches(4, seed=3)
    assert same_batch(shuffled[9], again[9])
    assert data.train.summary() == (
        "prompts of 1 to 1 tokens in the first 1000 rows, the others checked when read (overlap with the "
        "held-out prompts is not counted), from 8 rows; left out: on_bad_row 2, max_prompt_tokens 1; "
        "the first bad row: t.jsonl, row 3: column 'text' is empty; fill it in"
    )
    assert data.overlap() is None


def test_batches_streamed_prompts_are_tokenised_once_per_step(data_folder, tokenizer, monkeypatch):
    """In the order in which a run with layout.reference_steps = 2 reads them."""
    write(data_folder, ["x" * (i + 1) for i in range(16)])
    batches = load_data(tokenizer, shuffle=False).train_batches(4, seed=0)
    reads: list[int] = []
    read = StreamingPrompts.read

    def counting(self, index):
        reads.append(index)
        return read(self, index)

    monkeypatch.setattr(StreamingPrompts, "read", counting)
    for group in ((0, 1), (2, 3)):
        for step in group:  # prefetched in one call
            batches[step]
        for step in group:
            batches[step], batches.metrics(step)
    assert reads == list(range(16))
    monkeypatch.setattr(batches_module, "RECENT_STEPS", 1)  # the number of batches in memory is bounded
    batches = load_data(tokenizer, shuffle=False).train_batches(4, seed=0)
    reads.clear()
    batches[0], batches[1], batches[0]
    assert reads == [*range(4), *range(4, 8), *range(4)]


def test_streaming_bad_row_under_error_raises_when_read(data_folder, tokenizer, monkeypatch):
    write(data_folder, ["a"] * 20 + [" "] + ["b"] * 20)
    # among the rows that are checked before the run
    assert follows(load_error(tokenizer), "t.jsonl, row 21: column 'text' ... fill it in")
    monkeypatch.setattr(streaming, "_CHECKED_ROWS", 10)
    batches = load_data(tokenizer, shuffle=False).train_batches(4, seed=0)
    assert len(batches[4].rows) == 4
    with pytest.raises(DataError, match=r"^t\.jsonl, row 21: column 'text' .* fill it in$"):
        batches[5]
    write(data_folder, ["a"] * 20 + ["x" * 65])
    batches = load_data(tokenizer, shuffle=False).train_batches(4, seed=0)
    with pytest.raises(DataError, match=r"^t\.jsonl, row 21: .*65 tokens.* max_prompt_tokens"):
        batches[5]


def test_streaming_too_many_consecutive_unusable_rows_raise(data_folder, tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "_MAX_SKIPPED", 6)
    write(data_folder, [" "] * 10)
    assert follows(
        load_error(tokenizer, on_bad_row="skip"),
        "t.jsonl: 6 consecutive rows, from row 1 ... on_bad_row ... loosen that field, or remove these rows",
    )


def test_streaming_deduplicate_and_take_read_all_rows_first(data_folder, tokenizer):
    write(data_folder, [*"aabcad", " ", "xx", "x" * 65, "xyz", "b", "y" * 20])
    fields = {"on_bad_row": "skip", "on_long": "drop"}
    unique = load_data(tokenizer, **fields, deduplicate=True, shuffle=False)
    assert unique.train.dropped == {"deduplicate": 3, "on_bad_row": 1, "max_prompt_tokens": 1}
    assert unique.train.summary() == (
        "7 prompts of 1 to 20 tokens, streamed, from 12 rows; left out: on_bad_row 1, "
        "max_prompt_tokens 1, deduplicate 3; the first bad row: t.jsonl, row 7: column 'text' is empty; fill it in"
    )
    batches = unique.train_batches(4, seed=0)
    assert [valid_ids(batches[0]), valid_ids(batches[1])] == [[0, 2, 3, 5], [7, 9, 11]]
    assert batches.buckets_used(1) == (16,) and batches.buckets_used(2) == (16, 32)
    six = load_data(tokenizer, **fields, take=8, shuffle=False).train
    assert isinstance(six.prompts, StreamingPrompts) and six.dropped["take"] == 2
    few = load_data(
        tokenizer, **fields, take=3
    ).train  # few enough to be held, and the rows beyond are not looked at
    assert [prompt.row.number for prompt in few.prompts] == [1, 2, 3]
    assert few.dropped == {"take": 9} and isinstance(few.prompts, tuple)


def test_streaming_held_out_gives_first_prompts_once(data_folder, tokenizer):
    write(data_folder, ["a", " ", "c", "d", "e", "f"])
    data = load_data(tokenizer, train="good.jsonl", held_out="t.jsonl", on_bad_row="skip")
    assert [valid_ids(batch) for batch in data.held_out_batches(2, prompts=3)] == [[0, 2], [3]]
    assert [valid_ids(batch) for batch in data.held_out_batches(4, prompts=99)] == [[0, 2, 3, 4], [5]]


def test_streaming_changed_file_raises(data_folder, tokenizer):
    write(data_folder, "abcdefgh")
    batches = load_data(tokenizer, on_bad_row="skip").train_batches(4, seed=0)
    batches[0]
    write(data_folder, "bcdefghij")
    with pytest.raises(DataError, match=r"^t\.jsonl: .*has changed.* start again with a copy"):
        batches[1]
    (data_folder / "t.jsonl").unlink()
    with pytest.raises(DataError, match=r"^t\.jsonl: .*No such file.* restore the file"):
        batches[1]


def test_streaming_fingerprint_covers_the_files(data_folder, tokenizer):
    write(data_folder, "abcdefgh")
    first = load_data(tokenizer).train
    write(data_folder, "abcdefgi")
    second = load_data(tokenizer).train
    assert len(first.fingerprint) == 64 and first.fingerprint != second.fingerprint
    write(data_folder, "abcdefgh")
    assert load_data(tokenizer).train.fingerprint == first.fingerprint


def test_indexed_lines_hold_an_index_and_no_rows(data_folder):
    """An index takes twelve bytes a row, however long the rows are."""
    (data_folder / "big.jsonl").write_bytes(b"".join(b'{"text": "%0200d"}\n' % i for i in range(10_000)))
    rows = sources.open_rows("big.jsonl")
    index_bytes = sum(value.nbytes for value in vars(rows).values() if isinstance(value, np.ndarray))
    assert len(rows) == 10_000 and index_bytes == 12 * 10_000
    assert rows[9_999].values == {"text": f"{9_999:0200d}"}
    others = {name: v for name, v in vars(rows).items() if not isinstance(v, np.ndarray) and name != "_parse"}
    assert len(json.dumps(others, default=str)) < 500


@pytest.mark.slow
def test_run_streamed_source_counts_replaced_rows(data_folder):
    """From the command line to metrics and environment, with unusable rows that are met during the run."""
    config = tiny_config(data_folder)
    with open(data_folder / "train.jsonl", "ab") as file:
        file.write(b'{"text": ""}\n{"text": 0.5}\n')
    config.data.on_bad_row, config.steps = "skip", 3  # an epoch: 23 rows in batches of 8
    status, out, err = run_main([f"--config={write_config(data_folder / 'c.py', config)}"])
    assert status == 0, err
    assert "left out: on_bad_row 2" in " ".join(out.split())
    metrics = [json.loads(line) for line in (data_folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("data/replaced_rows", 0) for line in metrics) == 2
    recorded = json.loads((data_folder / "run" / "environment.json").read_text())["sources"]
    data = (data_folder / "train.jsonl").read_bytes()
    assert recorded["train"] == [
        {
            "file": str(data_folder / "train.jsonl"),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    ]


def test_data_tool_shows_what_a_run_would_read(data_folder, capsys):
    """Eight rows, one of them unusable, in batches of four: the second batch of an epoch has its replacement."""
    config = tiny_config(data_folder)
    write(data_folder, ["a", "b", "c", "d", "e", "f", " ", "h"])
    config.data.train, config.data.on_bad_row = str(data_folder / "t.jsonl"), "skip"
    config.data.shuffle, config.batch_size = False, 4
    spec = write_config(data_folder / "c.py", config)
    assert tool.main([f"--config={spec}", "--batches=4", "--show=2"]) == 0
    out = capsys.readouterr().out
    assert "from 8 rows" in " ".join(out.split()) and out.count("<|im_start|>user") == 2
    report = json.loads(out.splitlines()[-1])
    assert (report["rows"], report["batches"], report["replaced_rows"]) == (8, 4, 2)
    assert 0 <= report["seconds_until_ready"] <= report["seconds_until_first_batch"]
    assert 0 < report["peak_mib_before"] <= report["peak_mib_after"] < 1e6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=c.py", "--batches=0"], "data: --show=3 --batches=0: "),
        (["--config=c.py", "--config.data.train=no.jsonl"], "data: no.jsonl: no such file in "),
        (["--config=c.py", "rows.jsonl"], "data: argument 'rows.jsonl' "),
        (
            ["--config=c.py", '--config.data.train={"hf": "x"}'],
            "list or mapping as text; write it in a config",
        ),
    ],
)
def test_data_tool_bad_input_is_one_line(data_folder, capsys, argv, message):
    write_config(data_folder / "c.py", tiny_config(data_folder))
    assert tool.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
