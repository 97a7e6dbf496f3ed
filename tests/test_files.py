"""Strict JSON, read and written, and atomic replacement."""

import datetime
import json

import jax.numpy as jnp
import numpy as np
import pytest
from file_helpers import files_of_at_most, strict

from xpo_jax.io.files import WriteError, append_whole, atomic_write, read_json, to_json


def test_to_json_numbers_are_strict_and_short():
    assert (
        to_json({"a": np.float32(0.1), "b": jnp.float32(0.1), "c": 0.1}) == '{"a": 0.1, "b": 0.1, "c": 0.1}'
    )
    assert to_json([jnp.bfloat16(0.1), np.float64(1 / 3), np.int32(7), np.bool_(True), True, 2**70]) == (
        "[0.100097656, 0.3333333333333333, 7, true, true, 1180591620717411303424]"
    )
    assert to_json([float("nan"), np.float32("inf"), jnp.float32("-inf"), np.float64("nan")]) == (
        "[null, null, null, null]"
    )
    assert to_json((np.arange(3), np.array([0.5, np.nan], np.float32))) == "[[0, 1, 2], [0.5, null]]"


def test_to_json_float32_reads_back_exactly():
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    back = np.array(strict(to_json(numbers)), np.float32)
    assert np.array_equal(back.view(np.uint32), numbers.view(np.uint32))


def test_to_json_texts_and_dates():
    assert to_json({"ä": "„ß“\n", 3: datetime.date(2024, 2, 29)}) == '{"ä": "„ß“\\n", "3": "2024-02-29"}'
    assert json.loads(to_json({"half": "\ud83d"})) == {"half": "\ud83d"}
    assert "\n" not in to_json({"text": "a\nb\r"})
    with pytest.raises(TypeError, match="^set does not fit into JSON$"):
        to_json({"a": {1}})


def test_atomic_write_replaces_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    with open(path) as reader:
        atomic_write(path, "neü")
        assert reader.read() == "old"  # another file took its name
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "neü"
    with files_of_at_most(10), pytest.raises(WriteError) as caught:
        atomic_write(path, "x" * 1000)
    assert str(caught.value).startswith(f"{path}: cannot be written (File too large); free space")
    assert path.read_text() == "neü"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; restore it"),
        (b"{", "is not valid JSON (Expecting property name"),
        (b'{"a": "\xff"}', "is not valid JSON ('utf-8' codec"),
        (b"[1]", "holds a list, not a JSON object; restore it"),
    ],
)
def test_read_json_unreadable_file_is_named_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path, remedy="restore it")
    text = str(caught.value)
    assert text.startswith(f"{path} {message}") and text.endswith("; restore it") and "\n" not in text


def test_read_json_returns_what_to_json_wrote(tmp_path):
    values = {"a": [1, 0.1, None], "ä": "\n"}
    atomic_write(tmp_path / "a.json", to_json(values))
    assert read_json(tmp_path / "a.json", remedy="") == values
    with pytest.raises(ValueError, match="cannot be read .Is a directory.; remove it$"):
        read_json(tmp_path, remedy="remove it")


def test_append_whole_full_disk_leaves_the_file_as_it_was(tmp_path):
    with open(tmp_path / "log", "ab", buffering=0) as file:
        append_whole(file, b"12345")
        with files_of_at_most(8), pytest.raises(OSError, match="File too large"):
            append_whole(file, b"67890")
        append_whole(file, b"6")
    assert (tmp_path / "log").read_bytes() == b"123456"
