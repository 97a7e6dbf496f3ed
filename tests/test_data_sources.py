"""Sources of every kind, and the transforms from rows to prompts: literals, and errors with file and row."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import sys
from pathlib import Path

import pytest
from fake_data import follows, load_data, load_error
from tiny_run import write_rows

from xpo_jax.data import sources
from xpo_jax.data.rows import DataError

ROWS = [{"text": "Guten Tag."}, {"text": 'Er sagte: "Ja,\nnein"'}, {"text": "Grüße"}]


def values(source) -> list[dict]:
    return [dict(row.values) for row in sources.read_rows(source)]


def error(source) -> str:
    with pytest.raises(DataError) as caught:
        sources.read_rows(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# ---------------------------------------------------------------------------------------------- formats


def test_read_rows_every_format_gives_the_same_rows(data_folder):
    write_rows(data_folder / "a.jsonl", ROWS)
    (data_folder / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (data_folder / "b.json").write_text(json.dumps({"version": 1, "rows": ROWS}), encoding="utf-8-sig")
    with open(data_folder / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["text"], *([row["text"]] for row in ROWS)])
    write_parquet(data_folder / "a.parquet", ROWS)
    for name in ("a.jsonl", "a.json", "b.json", "a.csv", "a.parquet"):
        assert values(name) == ROWS, name
    (data_folder / "a.txt").write_bytes(b"\xef\xbb\xbfeins\r\n\n \nzw\xe2\x80\xa8ei")
    assert sources.read_rows("a.txt") == [
        ("a.txt", 1, {"text": "eins"}),
        ("a.txt", 4, {"text": "zw\u2028ei"}),
    ]
    assert values(["a.txt", "a.csv"]) == values("a.txt") + ROWS
    assert values("a.*[tv]") == ROWS + ROWS + values("a.txt")  # a.csv, a.parquet, a.txt
    assert sources.read_rows("a.csv")[2].at == "a.csv, row 4"  # as a spreadsheet counts


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.json", b"[]", "x.json: ... empty ... add at least one object"),
        ("x.json", b" \n", "x.json: ... empty ... add at least one row"),
        ("x.json", b"3", "x.json: ... list of objects ... a number"),
        (
            "x.json",
            b'[{"a": 1}, 3]',
            'x.json, row 2: ... {"text": "..."} ... a number',
        ),
        (
            b"x.json".decode(),
            b'{"a": [], "b": [], "c": 1}',
            "x.json: ... exactly one list ... 2 ... save the list of rows alone",
        ),
        (
            "x.json",
            b'[\n{"a": 1},]',
            "x.json: not JSON ... at column {column} of line 2 ... write one list of objects",
        ),
        (
            "x.json",
            b'["\xff"]',
            "x.json: ... 0xff at position 3 ... save the file as UTF-8",
        ),
        ("x.csv", b"a,a\n1,2\n", "x.csv, row 1: ... name each column once ... ['a', 'a']"),
        ("x.csv", b"a,\n1,2\n", "x.csv, row 1: ... name each column once ... ['a', '']"),
        ("x.csv", b"a,b\n", "x.csv: ... header ... add one"),
        ("x.csv", b"a,b\n1,2\n\n3\n", "x.csv, row 4: ... 1 ... header ... 2 ... quote commas"),
        (
            "x.csv",
            b'a\n"b\n',
            "x.csv: not CSV: unexpected end of data ... double the quotes inside quotes",
        ),
        ("x.csv", b"", "x.csv: ... empty ... add at least one row"),
        ("x.txt", b"\n \n", "x.txt: ... empty ... one prompt per line"),
        (
            "x.txt",
            b"a\n\xff",
            "x.txt, row 2: ... 0xff at position 1 ... save the file as UTF-8",
        ),
        (
            "x.xlsx",
            b"a\tb",
            "x.xlsx: ... '.xlsx' ... convert or rename ... .jsonl, .json, .csv, .tsv, .txt, .parquet",
        ),
        (
            "x.jsonl",
            b'{"a": ' + b"9" * 5000 + b"}",
            "x.jsonl, row 1: ... ValueError: ... one object per line",
        ),
        ("x.jsonl", b"[" * 100_000, "x.jsonl, row 1: nested too deeply ... flatten it"),
        ("x.parquet", b"PAR1 no PAR1", "x.parquet: not Parquet ... write the file again"),
    ],
)
def test_read_file_of_another_format_names_file_and_remedy(data_folder, name, content, text):
    (data_folder / name).write_bytes(content)
    # Python 3.13 points at the trailing comma, earlier versions behind it
    text = text.replace("{column}", "9" if sys.version_info >= (3, 13) else "10")
    assert follows(error(name), text), error(name)


def test_load_prompts_column_not_json_is_refused(data_folder, tokenizer):
    day = datetime.datetime(2026, 1, 2, 3, 4)
    rows = [{"text": "a", "image": b"\x00", "day": day, "n": float("nan")}]
    write_parquet(data_folder / "t.parquet", rows)
    assert follows(
        load_error(tokenizer, train="t.parquet"),
        "t.parquet, row 1: column 'image' ... bytes ... name the columns to keep in select",
    )
    train = load_data(tokenizer, train="t.parquet", held_out="t.parquet", select=["text", "day", "n"]).train
    assert train.prompts[0].row.values == {"text": "a", "day": "2026-01-02T03:04:00", "n": None}
    assert train.summary().endswith("; columns left out by select: image")


# ---------------------------------------------------------------------------------------- other sources


def test_mixed_sources_keep_the_weights_throughout(data_folder):
    write_rows(data_folder / "a.jsonl", [{"a": i} for i in range(300)])
    write_rows(data_folder / "b.jsonl", [{"b": i} for i in range(1000)])
    mix = {"sources": ["a.jsonl", ["b.jsonl"]], "weights": [1, 3]}
    rows = values(mix)
    drawn_a, drawn_b = [r["a"] for r in rows if "a" in r], [r["b"] for r in rows if "b" in r]
    assert (len(drawn_a), len(drawn_b)) == (300, 900)  # a is used up
    assert sorted(drawn_a) == list(range(300)) and len(set(drawn_b)) == 900  # no row twice
    for begin in range(0, 1200, 40):  # everywhere in these shares
        assert sum("a" in row for row in rows[begin : begin + 40]) == 10
    assert values(mix) == rows
    other = values({**mix, "seed": 1})
    assert other != rows and sum("a" in row for row in other) == 300


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"hf": "a/b"}, "a source ... hf, split ... config, revision ... got hf"),
        ({"hf": "a/b", "split": 3}, "split of a Hugging Face data set: ... text ... 3"),
        ({"path": "x"}, "a source ... hf, split ... config, revision ... got path"),
        ({}, "a source ... hf, split ... config, revision ... got nothing"),
        (
            {"sources": ["good.jsonl"], "weights": [1]},
            "sources and weights: ... lists of the same length, at least 2",
        ),
        (
            {"sources": ["good.jsonl"] * 2, "weights": [1, 0]},
            "weights: ... numbers above 0 ... 0",
        ),
        (
            {"sources": ["good.jsonl"] * 2, "weights": [1, 1], "seed": -1},
            "seed of a mixture: ... 0 to 4294967295 ... -1",
        ),
        (
            {"sources": ["good.jsonl", "no*"], "weights": [1, 1]},
            "no*: ... {data_folder} ... correct the pattern",
        ),
        ("mine:missing", "data source: ... 'mine' ... 'missing'"),
        ("mine:number", "mine:number: ... called without arguments ... TypeError: "),
        ("mine:none", "mine:none: ... return at least one mapping"),
        ("mine:broken", "mine:broken: ... called without arguments ... KeyError: 'no luck'"),
        (
            "mine:letters",
            'mine:letters, row 1: ... {{"text": "..."}} ... text',
        ),
        ("mine:numbered", "mine:numbered, row 1: ... name must be text ... 1"),
        ("mine:Late", "mine:Late, row 2: ... IndexError: list index out of range ... fix the source"),
        ("nowhere:rows", "data source: ... 'nowhere' ... {data_folder}"),
    ],
)
def test_source_unusable_names_it_and_remedy(data_folder, monkeypatch, source, text):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (data_folder / "mine.py").write_text(
        "def number(): return 3\n"
        "def none(): return []\n"
        "def broken(): raise KeyError('no luck')\n"
        "def letters(): return ['a']\n"
        "def numbered(): return [{1: 'a'}]\n"
        "class Late:\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, i): return {'text': ['a'][i]}\n"
    )
    with pytest.raises(ValueError) as caught:
        sources.read_rows(source)
    sys.modules.pop("mine", None)
    assert follows(str(caught.value), text.format(data_folder=data_folder)), str(caught.value)


def test_custom_source_is_called_and_read(data_folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (data_folder / "own_rows.py").write_text(
        "def rows():\n    yield {'text': 'a'}\n    yield {'text': 'b'}\n"
    )
    assert sources.read_rows("own_rows:rows") == [
        ("own_rows:rows", 1, {"text": "a"}),
        ("own_rows:rows", 2, {"text": "b"}),
    ]
    assert sources.open_rows("own_rows:rows").identity == ({"source": "own_rows:rows", "rows": 2},)
    del sys.modules["own_rows"]


def test_hugging_face_source_is_loaded_and_identified(data_folder, monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return data_set

    data_set = datasets.Dataset.from_list(ROWS)
    data_set.info.download_checksums = {f"hf://datasets/o/n@{'ab' * 20}/data/train.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"hf": "o/n", "config": "de", "split": "train[:3]", "revision": "main"}
    assert sources.read_rows(source)[1] == ("hf o/n de train[:3]", 2, ROWS[1])
    # trust_remote_code is not passed, so its default, False, holds
    assert calls == [(("o/n", "de"), {"split": "train[:3]", "revision": "main"})]
    assert sources.open_rows(source).identity == ({**source, "commits": ["ab" * 20], "rows": 3},)

    def unreachable(*args, **kwargs):
        raise ConnectionError("no way to https://h.example/o/n?signature=secret\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert follows(
        error({"hf": "o/n", "split": "train"}),
        "hf o/n train: ... ConnectionError: no way to (address) at all; check name, config, split and revision",
    )
    monkeypatch.undo()
    monkeypatch.chdir(data_folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data_folder / "cache")
    (data_folder / "set").mkdir()
    write_rows(data_folder / "set" / "train.jsonl", ROWS)
    assert values({"hf": "set", "split": "train"}) == ROWS  # a data_folder is one too
    assert follows(
        error({"hf": "set", "split": "dev"}), "hf set dev: ... check name, config, split and revision"
    )


def test_prompt_set_sources_have_size_and_hash(data_folder, tokenizer):
    write_rows(data_folder / "t.jsonl", ROWS)
    (data_folder / "u.txt").write_bytes(b"eins\n")
    sources_read = load_data(tokenizer, train=["t.jsonl", "u.txt"]).train.sources
    assert sources_read == tuple(
        {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (("t.jsonl", (data_folder / "t.jsonl").read_bytes()), ("u.txt", b"eins\n"))
    )


# ------------------------------------------------------------------------------------------- transforms


def numbers(prompt_set) -> list[int]:
    return [prompt.row.number for prompt in prompt_set.prompts]


def test_select_and_rename(data_folder, tokenizer):
    write_rows(data_folder / "t.jsonl", [{"q": "a", "a": "b", "id": 1}])
    fields = {"held_out": "t.jsonl", "column": "text"}
    train = load_data(tokenizer, **fields, select=["a", "q"], rename={"q": "text"}).train
    assert train.prompts[0].row.values == {"a": "b", "text": "a"}
    assert train.summary() == "1 prompts of 1 to 1 tokens, from 1 rows; columns left out by select: id"
    for wrong, text in [
        ({"select": ["text"]}, "t.jsonl, row 1: ... 'text' ... q, a, id"),
        ({"select": ["a"], "rename": {"q": "text"}}, "t.jsonl, row 1: ... 'q' ... a"),
        (
            {"rename": {"q": "a"}},
            "t.jsonl, row 1: rename: ... 'a' ... leave it out with select",
        ),
    ]:
        assert follows(load_error(tokenizer, **fields, **wrong), text)
    assert follows(
        load_error(tokenizer, ValueError, **fields, select=[]),
        "data.select: ... at least one column ... None for all",
    )


def test_filter_tokens_over_several_columns(data_folder, tokenizer):
    rows = [{"text": "x" * n, "other": "y" * m} for n, m in ((3, 3), (5, 1), (4, 4), (1, 6))]
    write_rows(data_folder / "t.jsonl", rows)

    def rows_left(combine, max_tokens, *columns):
        limits = {"columns": columns, "combine": combine, "max_tokens": max_tokens}
        train = load_data(tokenizer, filter_tokens=limits, held_out="t.jsonl").train
        assert len(train.prompts) + train.dropped.get("filter_tokens", 0) == 4
        return numbers(train)

    assert rows_left("max", 4, "text", "other") == [1, 3]
    assert rows_left("sum", 7, "text", "other") == [1, 2, 4]
    assert rows_left("sum", 4, "text") == [1, 3, 4]
    for limits, text in [
        (
            {"columns": ("text",), "combine": "mean", "max_tokens": 3},
            "data.filter_tokens.combine ... 'max' or 'sum'",
        ),
        (
            {"columns": (), "combine": "max", "max_tokens": 3},
            "data.filter_tokens: ... at least one column",
        ),
        ({"columns": ("text",), "combine": "max"}, "data.filter_tokens.max_tokens ... integer"),
    ]:
        error_text = load_error(tokenizer, ValueError, train="good.jsonl", filter_tokens=limits)
        assert follows(error_text, text), error_text
    limits = {"columns": ("id",), "combine": "max", "max_tokens": 3}
    assert follows(load_error(tokenizer, filter_tokens=limits), "t.jsonl, row 1: ... 'id' ... text, other")


def test_deduplicate_comes_before_take(data_folder, tokenizer):
    write_rows(data_folder / "t.jsonl", [{"text": t, "id": i} for i, t in enumerate("aabacad")])
    train = load_data(tokenizer, deduplicate=True, take=3).train
    assert numbers(train) == [1, 3, 5]
    assert train.dropped == {"deduplicate": 2, "take": 2}
    assert numbers(load_data(tokenizer, deduplicate=True).train) == [1, 3, 5, 7]


def test_on_bad_row_skip_counts_rows(data_folder, tokenizer):
    (data_folder / "t.jsonl").write_bytes(
        b'{"text": "a"}\nno\n{"text": 3}\n{"text": "b"}\n{"text": "too long"}'
    )

    def check(messages, row):
        if row["text"] == "b":
            raise ValueError("the judge cannot judge b")

    fields = {"max_prompt_tokens": 4, "on_bad_row": "skip"}
    train = load_data(tokenizer, **fields, on_long="drop", held_out="t.jsonl", check=check).train
    assert numbers(train) == [1] and train.dropped == {"on_bad_row": 3, "max_prompt_tokens": 1}
    assert train.summary() == (
        "1 prompts of 1 to 1 tokens, from 5 rows; left out: on_bad_row 3, max_prompt_tokens 1; the first bad row: "
        "t.jsonl, row 2: not JSON: Expecting value at column 1; write one object per line"
    )
    # a row that another field excludes is not a bad row
    assert follows(
        load_error(tokenizer, **fields, held_out="t.jsonl"), "t.jsonl, row 5: ... 8 tokens ... on_long"
    )
    write_rows(data_folder / "t.jsonl", [{"text": "b"}])
    assert (
        load_error(tokenizer, held_out="t.jsonl", check=check) == "t.jsonl, row 1: the judge cannot judge b"
    )
    (data_folder / "t.jsonl").write_bytes(b"no\n3\n")
    assert follows(
        load_error(tokenizer, on_bad_row="skip"),
        "t.jsonl: ... 2 rows ... on_bad_row dropped 2 ... t.jsonl, row 1: not JSON ... loosen these fields",
    )
    assert follows(load_error(tokenizer, train="none*", on_bad_row="skip"), f"none*: ... {data_folder}")


def test_column_of_texts_and_conversations_is_refused(data_folder, tokenizer):
    turns = [{"role": "user", "content": "a"}]
    write_rows(data_folder / "t.jsonl", [{"text": "a"}, {"text": turns}, {"text": "b"}])
    mixed = "make all of them lists of messages"
    assert follows(
        load_error(tokenizer),
        f"t.jsonl, row 2: column 'text' is a list ... but text in t.jsonl, row 1 ... {mixed}",
    )
    assert numbers(load_data(tokenizer, on_bad_row="skip").train) == [1, 3]
    write_rows(data_folder / "t.jsonl", [{"text": turns}, {"text": "a"}])
    assert follows(
        load_error(tokenizer, max_prompt_tokens=64),
        f"t.jsonl, row 2: column 'text' is text ... a list of messages in t.jsonl, row 1 ... {mixed}",
    )
