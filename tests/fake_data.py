"""Prompts as a config loads them, the errors of wrong ones, and records of a pairs log."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from xpo_jax.config import loader
from xpo_jax.data.pairs_log import pair_records
from xpo_jax.data.prompts import load_prompts
from xpo_jax.data.rows import DataError
from xpo_jax.values import Prompts, Samples, Verdicts


def load_data(tokenizer, max_new_tokens=64, check=None, **fields):
    """Load prompts as a config's `data` group does; of t.jsonl and good.jsonl where the fields name no other source."""
    group = {
        "train": "t.jsonl",
        "held_out": "good.jsonl",
        "select": None,
        "rename": None,
        "template": None,
        "column": "text",
        "filter_tokens": None,
        "filter_length": False,
        "max_prompt_tokens": 64,
        "buckets": (16, 32, 64),
        "on_long": "error",
        "on_bad_row": "error",
        "on_extra_keys": "error",
        "on_assistant_last": "error",
        "deduplicate": False,
        "take": None,
        "shuffle": True,
        "chat_template_arguments": None,
    }
    given = {"tokenizer": tokenizer, "max_new_tokens": max_new_tokens, "check": check}
    return loader.build(load_prompts, {**group, **fields}, "data", **given)


def load_error(tokenizer, kind=DataError, **fields) -> str:
    """Return the one line of the error that `load_data` raises."""
    try:
        load_data(tokenizer, **fields)
    except kind as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("load_data accepted the fields")


def follows(text: str, outline: str) -> bool:
    """Whether an error follows an outline such as "t.jsonl, row 2 ... column 13 ... one object per line".

    The first part (file, row or field) must begin the text; the others (values, remedy) must occur in this order.
    """
    first, *parts = map(re.escape, outline.split(" ... "))
    return re.match(".*".join([first, *parts]), text) is not None


def valid_ids(batch: Prompts) -> list[int]:
    """Return the ids of a batch's valid rows."""
    return [row["id"] for row, valid in zip(batch.rows, batch.valid, strict=True) if valid]


def same_batch(a: Prompts, b: Prompts) -> bool:
    """Whether two batches hold the same rows, messages and arrays."""
    return a.rows == b.rows and a.messages == b.messages and all(map(np.array_equal, a[2:], b[2:]))


PAIR_MESSAGES = [{"role": "user", "content": "Sag „ja“!"}]


def logged_pairs() -> list[dict[str, Any]]:
    """Return the log records of three rows: a verdict, a failure, and a padding row, which has none."""
    prompts = Prompts(
        rows=({"id": 1, "score": np.float32(0.1)}, {"id": 2}, {}),
        messages=(PAIR_MESSAGES, PAIR_MESSAGES, []),
        tokens=np.zeros((3, 2), np.int32),
        lengths=np.array([2, 1, 1], np.int32),
        position=np.array([4, 5, 6], np.int32),
        valid=np.array([True, True, False]),
    )
    first = Samples(
        np.array([[5, 9, 0], [6, 7, 8], [1, 1, 1]], np.int32),
        np.array([2, 3, 1]),
        np.array([True, False, True]),
    )
    second = Samples(
        np.array([[4, 0, 0], [9, 0, 0], [1, 1, 1]], np.int32),
        np.array([1, 1, 1]),
        np.array([True, True, True]),
    )
    verdicts = Verdicts(
        p_first=np.array([0.7, 0.5, 0.5], np.float32),
        weight=np.array([1, 0, 0], np.float32),
        reasons=("kürzer", "timed out", ""),
        scores=({"policy": 0.7, "reference": float("nan")}, {}, {}),
        shown=((1, 0), None, None),
        flipped=np.full(3, np.nan, np.float32),
        queries=2,
        orders=1,
    )
    texts = (["ja", "ja ja", ""], ["Ja.\nJa!", "\ud83d", ""])
    ref_logps = np.array([[-1.1, -2, 0], [-0.3, -4, 0]], np.float32)
    return pair_records(3, prompts, (first, second), texts, verdicts, verdicts.shown, ref_logps)
