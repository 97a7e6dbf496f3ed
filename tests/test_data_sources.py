"""Sources of every kind and the steps from rows to prompts: literals, and errors with file and row."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import sys
from pathlib import Path

import pytest
from fakes import write_rows
from test_data import folder, load, refused, tokenizer  # noqa: F401

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


def test_the_same_rows_in_every_format(folder):  # noqa: F811
    write_rows(folder / "a.jsonl", ROWS)
    (folder / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (folder / "b.json").write_text(json.dumps({"version": 1, "rows": ROWS}), encoding="utf-8-sig")
    with open(folder / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["text"], *([row["text"]] for row in ROWS)])
    write_parquet(folder / "a.parquet", ROWS)
    for name in ("a.jsonl", "a.json", "b.json", "a.csv", "a.parquet"):
        assert values(name) == ROWS, name
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfeins\r\n\n \nzw\xe2\x80\xa8ei")
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
        ("x.json", b"[]", "x.json: the list is empty; at least one object is expected"),
        ("x.json", b" \n", "x.json: the file is empty"),
        ("x.json", b"3", "x.json: a list of objects is expected, found a number"),
        (
            "x.json",
            b'[{"a": 1}, 3]',
            'x.json, row 2: an object is expected, such as {"text": "..."}; found a number',
        ),
        (
            b"x.json".decode(),
            b'{"a": [], "b": [], "c": 1}',
            "x.json: an object with exactly one list in it is expected, this one has 2; save the list of rows alone",
        ),
        (
            "x.json",
            b'[\n{"a": 1},]',
            "x.json: not JSON: Illegal trailing comma before end of array at column 9 of line 2;"
            " the file holds one list of objects",
        ),
        (
            "x.json",
            b'["\xff"]',
            "x.json: not UTF-8: byte 0xff at position 3 of the line; save the file as UTF-8",
        ),
        ("x.csv", b"a,a\n1,2\n", "x.csv, row 1: the header must name each column once, found ['a', 'a']"),
        ("x.csv", b"a,\n1,2\n", "x.csv, row 1: the header must name each column once, found ['a', '']"),
        ("x.csv", b"a,b\n", "x.csv: there is no row below the header; add one"),
        ("x.csv", b"a,b\n1,2\n\n3\n", "x.csv, row 4: 1 fields, the header has 2; quote commas"),
        (
            "x.csv",
            b'a\n"b\n',
            "x.csv: not CSV: unexpected end of data; separate by commas, and double the quotes in quotes",
        ),
        ("x.csv", b"", "x.csv: the file is empty"),
        ("x.txt", b"\n \n", "x.txt: the file is empty; one prompt per line is expected"),
        (
            "x.txt",
            b"a\n\xff",
            "x.txt, row 2: not UTF-8: byte 0xff at position 1 of the line; save the file as UTF-8",
        ),
        (
            "x.tsv",
            b"a\tb",
            "x.tsv: the ending '.tsv' is of no known kind; convert or rename the file to one of"
            " .jsonl, .json, .csv, .txt, .parquet",
        ),
        (
            "x.jsonl",
            b'{"a": ' + b"9" * 5000 + b"}",
            "x.jsonl, row 1: not JSON that can be read: ValueError: ",
        ),
        ("x.jsonl", b"[" * 100_000, "x.jsonl, row 1: nested too deeply"),
        ("x.parquet", b"PAR1 no PAR1", "x.parquet: not Parquet: "),
    ],
)
def test_a_file_that_is_not_what_its_name_says(folder, name, content, text):  # noqa: F811
    (folder / name).write_bytes(content)
    found = error(name)
    if sys.version_info < (3, 13):  # which words it better
        text = text.replace(
            "Illegal trailing comma before end of array at column 9", "Expecting value at column 10"
        )
    assert found.startswith(text) if text.endswith(": ") else found == text


def test_columns_that_json_cannot_hold(folder, tokenizer):  # noqa: F811
    day = datetime.datetime(2026, 1, 2, 3, 4)
    rows = [{"text": "a", "image": b"\x00", "day": day, "n": float("nan")}]
    write_parquet(folder / "t.parquet", rows)
    assert refused(tokenizer, train="t.parquet") == (
        "t.parquet, row 1: column 'image' holds bytes, which JSON cannot; name the columns to keep in select"
    )
    kept = load(tokenizer, train="t.parquet", held_out="t.parquet", select=["text", "day", "n"]).train
    assert kept.prompts[0].row.values == {"text": "a", "day": "2026-01-02T03:04:00", "n": None}
    assert kept.summary().endswith("; columns left out by select: image")


# ---------------------------------------------------------------------------------------- other sources


def test_sources_mixed_by_weight(folder):  # noqa: F811
    write_rows(folder / "a.jsonl", [{"a": i} for i in range(300)])
    write_rows(folder / "b.jsonl", [{"b": i} for i in range(1000)])
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
        ({"hf": "a/b"}, "a source has hf, split and may have config, revision; found hf"),
        ({"hf": "a/b", "split": 3}, "split of a Hugging Face data set: text is expected, found 3"),
        ({"path": "x"}, "a source has hf, split and may have config, revision; found path"),
        ({}, "a source has hf, split and may have config, revision; found nothing"),
        (
            {"sources": ["good.jsonl"], "weights": [1]},
            "sources and weights: two lists of the same length, at least 2, are expected",
        ),
        (
            {"sources": ["good.jsonl"] * 2, "weights": [1, 0]},
            "weights: numbers above 0 are expected, found 0",
        ),
        (
            {"sources": ["good.jsonl"] * 2, "weights": [1, 1], "seed": -1},
            "seed of the mixture: 0 to 4294967295 is expected, found -1",
        ),
        ({"sources": ["good.jsonl", "no*"], "weights": [1, 1]}, "no*: no file matches, seen from {folder}"),
        ("mine:missing", "data source: module 'mine' has no 'missing'"),
        ("mine:number", "mine:number: called without arguments it must return rows: TypeError: "),
        ("mine:none", "mine:none: it returned no rows; return at least one mapping"),
        ("mine:broken", "mine:broken: called without arguments it must return rows: KeyError: 'no luck'"),
        (
            "mine:letters",
            'mine:letters, row 1: an object is expected, such as {{"text": "..."}}; found a text',
        ),
        ("mine:numbered", "mine:numbered, row 1: a column's name must be text, found 1"),
        ("mine:Late", "mine:Late, row 2: cannot be read: IndexError: list index out of range"),
        ("nowhere:rows", "data source: no module 'nowhere', seen from {folder}"),
    ],
)
def test_other_sources_that_cannot_be_used(folder, monkeypatch, source, text):  # noqa: F811
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (folder / "mine.py").write_text(
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
    found = str(caught.value)
    expected = text.format(folder=folder)
    assert found.startswith(expected) if expected.endswith(": ") else found == expected


def test_your_own_source_is_called_or_asked_row_by_row(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "own_rows.py").write_text("def rows():\n    yield {'text': 'a'}\n    yield {'text': 'b'}\n")
    assert sources.read_rows("own_rows:rows") == [
        ("own_rows:rows", 1, {"text": "a"}),
        ("own_rows:rows", 2, {"text": "b"}),
    ]
    assert sources.open_rows("own_rows:rows").identity == ({"source": "own_rows:rows", "rows": 2},)
    del sys.modules["own_rows"]


def test_a_hugging_face_data_set(folder, monkeypatch):  # noqa: F811
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return made

    made = datasets.Dataset.from_list(ROWS)
    made.info.download_checksums = {f"hf://datasets/o/n@{'ab' * 20}/data/train.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"hf": "o/n", "config": "de", "split": "train[:3]", "revision": "main"}
    assert sources.read_rows(source)[1] == ("hf o/n de train[:3]", 2, ROWS[1])
    # trust_remote_code is not passed, whatever its default
    assert asked == [(("o/n", "de"), {"split": "train[:3]", "revision": "main"})]
    assert sources.open_rows(source).identity == ({**source, "commits": ["ab" * 20], "rows": 3},)

    def unreachable(*args, **kwargs):
        raise ConnectionError("no way to https://h.example/o/n?signature=secret\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert error({"hf": "o/n", "split": "train"}) == (
        "hf o/n train: cannot be loaded: ConnectionError: no way to (address) at all; check name, config, split and "
        "revision"
    )
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "set").mkdir()
    write_rows(folder / "set" / "train.jsonl", ROWS)
    assert values({"hf": "set", "split": "train"}) == ROWS  # a folder is one too
    found = error({"hf": "set", "split": "dev"})
    assert found.startswith("hf set dev: cannot be loaded: ") and found.endswith(
        "; check name, config, split and revision"
    )


def test_what_was_read_is_named_with_its_hash(folder, tokenizer):  # noqa: F811
    write_rows(folder / "t.jsonl", ROWS)
    (folder / "u.txt").write_bytes(b"eins\n")
    found = load(tokenizer, train=["t.jsonl", "u.txt"]).train.sources
    assert found == tuple(
        {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (("t.jsonl", (folder / "t.jsonl").read_bytes()), ("u.txt", b"eins\n"))
    )


# ------------------------------------------------------------------------------------------------ steps


def numbers(prompt_set) -> list[int]:
    return [prompt.row.number for prompt in prompt_set.prompts]


def test_select_and_rename(folder, tokenizer):  # noqa: F811
    write_rows(folder / "t.jsonl", [{"q": "a", "a": "b", "id": 1}])
    fields = {"held_out": "t.jsonl", "column": "text"}
    kept = load(tokenizer, **fields, select=["a", "q"], rename={"q": "text"}).train
    assert kept.prompts[0].row.values == {"a": "b", "text": "a"}
    assert kept.summary() == "1 prompts of 1 to 1 tokens, from 1 rows; columns left out by select: id"
    for wrong, text in [
        ({"select": ["text"]}, "t.jsonl, row 1: no column 'text'; the row has: q, a, id"),
        ({"select": ["a"], "rename": {"q": "text"}}, "t.jsonl, row 1: no column 'q'; the row has: a"),
        (
            {"rename": {"q": "a"}},
            "t.jsonl, row 1: rename: there is a column 'a' already; leave it out with select",
        ),
    ]:
        assert refused(tokenizer, **fields, **wrong) == text
    assert refused(tokenizer, ValueError, **fields, select=[]) == (
        "data.select: at least one column is expected, or None for all"
    )


def test_filter_tokens_over_several_columns(folder, tokenizer):  # noqa: F811
    rows = [{"text": "x" * n, "other": "y" * m} for n, m in ((3, 3), (5, 1), (4, 4), (1, 6))]
    write_rows(folder / "t.jsonl", rows)

    def kept(combine, max_tokens, *columns):
        limits = {"columns": columns, "combine": combine, "max_tokens": max_tokens}
        found = load(tokenizer, filter_tokens=limits, held_out="t.jsonl").train
        assert len(found.prompts) + found.dropped.get("filter_tokens", 0) == 4
        return numbers(found)

    assert kept("max", 4, "text", "other") == [1, 3]
    assert kept("sum", 7, "text", "other") == [1, 2, 4]
    assert kept("sum", 4, "text") == [1, 3, 4]
    for limits, text in [
        (
            {"columns": ("text",), "combine": "mean", "max_tokens": 3},
            "data.filter_tokens.combine: 'max' or 'sum'",
        ),
        ({"columns": (), "combine": "max", "max_tokens": 3}, "data.filter_tokens: at least one column and "),
        ({"columns": ("text",), "combine": "max"}, "data.filter_tokens.max_tokens is missing: an integer"),
    ]:
        assert refused(tokenizer, ValueError, train="good.jsonl", filter_tokens=limits).startswith(text)
    limits = {"columns": ("id",), "combine": "max", "max_tokens": 3}
    assert (
        refused(tokenizer, filter_tokens=limits) == "t.jsonl, row 1: no column 'id'; the row has: text, other"
    )


def test_deduplicate_comes_before_take(folder, tokenizer):  # noqa: F811
    write_rows(folder / "t.jsonl", [{"text": t, "id": i} for i, t in enumerate("aabacad")])
    found = load(tokenizer, deduplicate=True, take=3).train
    assert numbers(found) == [1, 3, 5]
    assert found.dropped == {"deduplicate": 2, "take": 2}
    assert numbers(load(tokenizer, deduplicate=True).train) == [1, 3, 5, 7]


def test_bad_rows_are_skipped_and_counted(folder, tokenizer):  # noqa: F811
    (folder / "t.jsonl").write_bytes(b'{"text": "a"}\nno\n{"text": 3}\n{"text": "b"}\n{"text": "too long"}')

    def check(messages, row):
        if row["text"] == "b":
            raise ValueError("the judge cannot judge b")

    fields = {"max_prompt_tokens": 4, "on_bad_row": "skip"}
    found = load(tokenizer, **fields, on_long="drop", held_out="t.jsonl", check=check).train
    assert numbers(found) == [1] and found.dropped == {"on_bad_row": 3, "max_prompt_tokens": 1}
    assert found.summary() == (
        "1 prompts of 1 to 1 tokens, from 5 rows; left out: on_bad_row 3, max_prompt_tokens 1; the first bad row: "
        "t.jsonl, row 2: not JSON: Expecting value at column 1; each line holds one object"
    )
    # what has a field of its own is not a bad row
    assert refused(tokenizer, **fields, held_out="t.jsonl").startswith(
        "t.jsonl, row 5: the prompt has 8 tokens"
    )
    write_rows(folder / "t.jsonl", [{"text": "b"}])
    assert refused(tokenizer, held_out="t.jsonl", check=check) == "t.jsonl, row 1: the judge cannot judge b"
    (folder / "t.jsonl").write_bytes(b"no\n3\n")
    assert refused(tokenizer, on_bad_row="skip") == (
        "t.jsonl: no prompt is left of 2 rows (on_bad_row dropped 2; first: t.jsonl, row 1: not JSON: Expecting value "
        "at column 1; each line holds one object); loosen these fields"
    )
    assert (
        refused(tokenizer, train="none*", on_bad_row="skip") == f"none*: no file matches, seen from {folder}"
    )


def test_texts_and_conversations_in_one_column(folder, tokenizer):  # noqa: F811
    turns = [{"role": "user", "content": "a"}]
    write_rows(folder / "t.jsonl", [{"text": "a"}, {"text": turns}, {"text": "b"}])
    mixed = "make all of them lists of messages"
    assert refused(tokenizer) == (
        f"t.jsonl, row 2: column 'text' is a list of messages, but text in t.jsonl, row 1; {mixed}"
    )
    assert numbers(load(tokenizer, on_bad_row="skip").train) == [1, 3]
    write_rows(folder / "t.jsonl", [{"text": turns}, {"text": "a"}])
    assert refused(tokenizer, max_prompt_tokens=64) == (
        f"t.jsonl, row 2: column 'text' is text, but a list of messages in t.jsonl, row 1; {mixed}"
    )
