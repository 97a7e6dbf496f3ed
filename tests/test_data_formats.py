"""Files as people have them: compressed, separated by tabs, saved by datasets, in shards; and numbers in templates."""

from __future__ import annotations

import bz2
import gc
import gzip
import hashlib
import json
import lzma
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from fake_data import follows, load_data, load_error
from tiny_run import write_rows

from xpo_jax.data import conversations, sources
from xpo_jax.data.rows import DataError

CONTENTS = {
    "jsonl": '{"text": "Guten Tag."}\n\n{"text": "Grüße!"}\n',
    "json": '[{"text": "Guten Tag."}, {"text": "Grüße!"}]',
    "csv": "text\nGuten Tag.\nGrüße!\n",
    "tsv": 'text\tnote\nGuten Tag.\t"a ""b"""\nGrüße!\tc, d\n',
    "txt": "Guten Tag.\nGrüße!\n",
}


def zstandard(data: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_file_has_the_rows_of_the_file(data_folder, kind, compression):
    content = CONTENTS[kind].encode()
    plain, packed = data_folder / f"t.{kind}", data_folder / f"t.{kind}.{compression}"
    plain.write_bytes(content)
    # in two parts, as `cat a.gz b.gz` makes them
    packed.write_bytes(COMPRESS[compression](content[:9]) + COMPRESS[compression](content[9:]))
    expected = [(row.number, row.values) for row in sources.read_rows(plain.name)]
    rows = sources.open_rows(packed.name)
    assert [(row.number, row.values) for row in rows] == expected and len(expected) == 2
    assert rows[0].file == packed.name  # for errors
    data = packed.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert rows.identity == ({"file": packed.name, "bytes": len(data), "sha256": digest},)


def test_decompressed_file_is_removed_with_its_rows(data_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(data_folder / "tmp"))
    (data_folder / "tmp").mkdir()
    (data_folder / "t.jsonl.gz").write_bytes(gzip.compress(CONTENTS["jsonl"].encode()))
    rows = sources.open_rows("*.jsonl.gz")
    assert len(list((data_folder / "tmp").iterdir())) == 1 and rows[1].values == {"text": "Grüße!"}
    del rows
    gc.collect()
    assert list((data_folder / "tmp").iterdir()) == []


def test_compressed_file_that_cannot_be_read_names_file_and_remedy(data_folder, tokenizer):
    data = gzip.compress(CONTENTS["jsonl"].encode() * 100)
    for name, content, text in (
        ("cut.jsonl.gz", data[:-20], "cannot be decompressed: ... compress the file again"),
        ("other.jsonl.gz", b"text", "cannot be decompressed: ... compress the file again"),
        ("other.jsonl.bz2", b"text", "cannot be decompressed: ... compress the file again"),
        ("other.jsonl.xz", b"text", "cannot be decompressed: ... compress the file again"),
        ("other.jsonl.zst", b"text", "cannot be decompressed: ... compress the file again"),
        ("empty.jsonl.gz", gzip.compress(b""), "the file is empty ... one JSON object per line"),
        ("t.parquet.gz", data, "the extension '.parquet.gz' is unknown ... .jsonl ... .gz, .zst, .bz2, .xz"),
        ("t.gz", data, "the extension '.gz' is unknown ... .jsonl"),
        ("bad.jsonl.gz", gzip.compress(b'{"text": "a"}\n{\n'), "row 2: not JSON ... one object per line"),
    ):
        (data_folder / name).write_bytes(content)
        error = load_error(tokenizer, train=name)
        assert error.startswith(name) and follows(error.removeprefix(name).lstrip(":, "), text), error
    assert follows(load_error(tokenizer, train="none.jsonl.gz"), "none.jsonl.gz: no such file")


def test_tsv_with_a_wrong_row_names_it(data_folder, tokenizer):
    (data_folder / "t.tsv").write_text("text\tnote\na\tb\na\tb\tc\n")
    assert follows(load_error(tokenizer, train="t.tsv"), "t.tsv, row 3: has 3 fields ... has 2; quote tabs")
    (data_folder / "t.tsv").write_text('text\n"a" b\n')
    assert follows(load_error(tokenizer, train="t.tsv"), "t.tsv: not TSV: ... separate fields by tabs")


# ---- folders --------------------------------------------------------------------------------------


def test_folder_of_save_to_disk_is_read(data_folder, tokenizer):
    import datasets

    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": "c", "n": 3}]
    data = datasets.Dataset.from_list(rows)
    data.with_format("numpy").save_to_disk("saved", num_shards=2)
    assert [row.values for row in sources.read_rows("saved")] == rows
    assert [len(prompt.tokens) for prompt in load_data(tokenizer, train="saved").train.prompts] == [1, 1, 1]
    identity = sources.open_rows("saved").identity
    assert identity[0]["folder"] == "saved" and identity[0]["rows"] == 3
    data.map(lambda row: {"n": -row["n"]}).save_to_disk("other")
    assert sources.open_rows("other").identity[0]["sha256"] != identity[0]["sha256"]
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk("both")
    assert follows(
        load_error(tokenizer, train="both"), "both: holds the splits train, test; write both/train"
    )
    assert len(sources.read_rows("both/train")) == 3
    Path("saved/state.json").write_text("{}")
    assert follows(
        load_error(tokenizer, train="saved"), "saved: cannot be loaded ... save the data set again"
    )


def write_shard(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), path)


def test_folder_of_parquet_shards_is_read_in_order(data_folder, tokenizer):
    for i, texts in enumerate((("a", "b"), ("c",))):
        write_shard(data_folder / "hub" / "data" / f"train-{i:05}-of-00002.parquet", *texts)
    (data_folder / "hub" / "README.md").write_text("A data set.")
    rows = sources.read_rows("hub")
    assert [row.values["text"] for row in rows] == ["a", "b", "c"]
    assert rows[2].at == "hub/data/train-00001-of-00002.parquet, row 1"
    write_shard(data_folder / "hub" / "data" / "test-00000-of-00001.parquet", "d")
    error = load_error(tokenizer, train="hub")
    assert follows(error, "hub: ... more than one split ... hub/data/test*.parquet, hub/data/train*.parquet")
    assert len(sources.read_rows("hub/data/train*.parquet")) == 3
    write_shard(data_folder / "part" / "train-00000-of-00002.parquet", "a")
    assert follows(
        load_error(tokenizer, train="part"), "part: holds 1 of the 2 shards ... complete the download"
    )
    write_shard(data_folder / "spark" / "part-7.parquet", "a")
    write_shard(data_folder / "spark" / "part-8.parquet", "b")
    assert len(sources.read_rows("spark")) == 2


# ---- integers and booleans ------------------------------------------------------------------------


def test_template_shows_integers_and_booleans_as_json_does(data_folder, tokenizer):
    write_rows(data_folder / "t.jsonl", [{"n": 7, "yes": True, "no": False, "big": 10**20, "zero": 0}])
    data = load_data(tokenizer, template="{n} {yes} {no} {big} {zero}", column=None, held_out="t.jsonl")
    assert data.train.prompts[0].messages[0]["content"] == f"7 true false {10**20} 0"
    assert data.train.prompts[0].row.values["yes"] is True


@pytest.mark.parametrize("value", [1.5, None, [1], {"a": 1}])
def test_other_values_in_a_template_are_refused(value):
    with pytest.raises(DataError, match=r"^t\.jsonl, row 1: column 'n' must be text"):
        conversations.text(value, "t.jsonl, row 1", "column 'n'")


def test_data_set_integers_of_numpy_are_shown_as_well(data_folder, tokenizer):
    write_shard(data_folder / "t.parquet", "a")
    table = pyarrow.table({"text": ["a"], "n": pyarrow.array([3], pyarrow.int8()), "b": [True]})
    pyarrow.parquet.write_table(table, data_folder / "t.parquet")
    data = load_data(tokenizer, train="t.parquet", held_out="t.parquet", template="{n}{b}", column=None)
    assert data.train.prompts[0].messages[0]["content"] == "3true" and json.dumps(True) == "true"
