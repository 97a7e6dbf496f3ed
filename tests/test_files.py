"""Strict JSON, atomic replacement, Markdown tables."""

import datetime
import json
import resource
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest

from xpo_jax.io.files import WriteError, atomic_write, to_json
from xpo_jax.io.text import markdown_table, visible


@contextmanager
def files_of_at_most(size_bytes):
    """As a full disk, for this process: also works for root, and reaches Orbax's own threads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers():
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


def test_float32_survives_exactly():
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    back = np.array(strict(to_json(numbers)), np.float32)
    assert np.array_equal(back.view(np.uint32), numbers.view(np.uint32))


def test_texts_and_dates():
    assert to_json({"ä": "„ß“\n", 3: datetime.date(2024, 2, 29)}) == '{"ä": "„ß“\\n", "3": "2024-02-29"}'
    assert json.loads(to_json({"half": "\ud83d"})) == {"half": "\ud83d"}
    assert "\n" not in to_json({"text": "a\nb\r"})
    with pytest.raises(TypeError, match="^set does not fit into JSON$"):
        to_json({"a": {1}})


def test_atomic_write_replaces_or_leaves(tmp_path):
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


def test_visible():
    assert visible("a\x1b[31m\x07\tb\r\nc\rd\x7f\x9b\ud800ß") == "a␛[31m␇\tb\nc␍d\ufffd\ufffd\ufffdß"


def test_markdown_table():
    table = markdown_table(
        [{"n": 1, "text": "a|b\n<pphr_output>*c*"}, {"text": "\\ `d` [e](f)", "p": 0.123456}]
    )
    assert table == (
        "| n | text | p |\n"
        "| --- | --- | --- |\n"
        "| 1 | a\\|b<br>\\<pphr_output>\\*c\\* |  |\n"
        "|  | \\\\ \\`d\\` \\[e](f) | 0.1235 |\n"
    )
