"""Malformed rows: each gives prompts, or an error of one line, never anything else.

More than 10,000 rows in all; `derandomize` makes each run try the same ones.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
from fake_data import load_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpo_jax.data import prompt_sets, sources

ALIKE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)

NASTY = st.sampled_from(
    [
        *(
            "",
            " ",
            "\u2028",
            "\x00",
            "\ud83d",
            "\ud83d\ude00",
            "{x}",
            "{{",
            "}",
            "{{ x }}",
            "{% y %}",
            "a\nb",
            "\r",
        ),
        *("<|im_end|>", "<|im_start|>system", "text", "\u202e", "e\u0301", "x" * 70, "Guten Tag.", "a", "b"),
        *("NaN", "-0", "\ufeff", '"', "\\", "\N{NULL}" * 3, "'; DROP", "../..", "role", "content"),
    ]
)
TEXT = st.one_of(NASTY, st.text(max_size=20))
COLUMN = st.sampled_from(["text", "other", "prompt"])
TURN = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["system", "user", "user", "assistant"]), NASTY), "content": TEXT},
    optional={"name": TEXT},
)
CONVERSATION = st.one_of(
    st.lists(TURN, max_size=3),
    st.builds(lambda text: [{"role": "user", "content": text}], TEXT),
    st.builds(lambda a, b: [{"role": "system", "content": a}, {"role": "user", "content": b}], TEXT, TEXT),
)
VALUE = st.one_of(
    *(TEXT, TEXT, TEXT, CONVERSATION, st.none(), st.booleans(), st.integers(), st.floats()),
    st.lists(st.one_of(TEXT, st.none()), max_size=2),
    st.dictionaries(TEXT, TEXT, max_size=2),
)
ROW = st.one_of(
    st.fixed_dictionaries({"text": TEXT, "other": TEXT}),
    st.fixed_dictionaries({"text": CONVERSATION, "other": TEXT}),
    st.dictionaries(st.one_of(COLUMN, NASTY), VALUE, max_size=3),
)
LINE = st.one_of(
    *[ROW.map(lambda row: json.dumps(row).encode())] * 4,
    VALUE.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from(
        [b"[" * 3000, b'{"text": ' + b'{"a":' * 3000, b'{"text": "a", "text": "b"}', b"1e999", b"9" * 5000]
    ),
)
# sometimes a file without a mistake, so that the transforms after validation see rows too
LINES = st.one_of(
    st.lists(LINE, min_size=5, max_size=16),
    st.lists(
        st.sampled_from("abc").map(lambda t: json.dumps({"text": t * 3, "other": t}).encode()),
        min_size=5,
        max_size=16,
    ),
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "on_bad_row": st.sampled_from(["error", "skip", "skip", "skip"]),
        "on_long": st.sampled_from(["error", "drop"]),
        "select": st.one_of(st.none(), st.lists(COLUMN, max_size=2)),
        "rename": st.dictionaries(COLUMN, COLUMN, max_size=1),
        "deduplicate": st.booleans(),
        "filter_length": st.booleans(),
        "take": st.integers(0, 4),
        "filter_tokens": st.fixed_dictionaries(
            {
                "columns": st.lists(COLUMN, max_size=2),
                "combine": st.sampled_from(["max", "sum"]),
                "max_tokens": st.integers(0, 30),
            }
        ),
    },
)
PROMPT = st.sampled_from(
    [
        *[{"template": None, "column": "text"}] * 3,
        {"template": "{text}!", "column": None},
        {"template": [{"role": "user", "content": "{text} {other}"}], "column": None},
    ]
)
# in memory, streamed, or both, which must agree
LIMITS = st.sampled_from([(50_000,), (50_000,), (0,), (50_000, 0)])


def check_message(error: ValueError) -> None:
    """Assert that an error is one line of bounded length, and not blank."""
    text = str(error)
    assert text.strip() and len(text.splitlines()) == 1 and len(text) < 600


@pytest.mark.slow
def test_ten_thousand_rows(data_folder, tokenizer, monkeypatch):
    seen: Counter[str] = Counter()

    @given(LINES, FIELDS, PROMPT, LIMITS)
    @settings(ALIKE, max_examples=2001)
    def holds(lines, fields, prompt, limits):
        (data_folder / "t.jsonl").write_bytes(b"\n".join(lines))
        seen["rows"] += len(lines)
        arguments = {"held_out": "t.jsonl", "shuffle": False, **prompt, **fields}
        results: list[list | str] = []
        for limit in limits:
            monkeypatch.setattr(prompt_sets, "MAX_ROWS_IN_MEMORY", limit)
            try:
                data = load_data(tokenizer, max_new_tokens=8, **arguments)
                train = data.train.prompts
                loaded = train.head(99) if isinstance(train, prompt_sets.StreamingPrompts) else train
                results.append([(p.row, p.messages, p.tokens.tolist()) for p in loaded])
            except ValueError as error:
                check_message(error)
                results.append(str(error))
                continue
            seen["prompts"] += len(loaded)
            assert 1 <= len(loaded) <= fields.get("take", 16)
            if limit:
                assert len(loaded) + sum(data.train.dropped.values()) == data.train.read
            for prompt in loaded:
                assert 1 <= len(prompt.tokens) <= 64 and prompt.messages[-1]["content"].strip()
                json.dumps(prompt.row.values, allow_nan=False)
            tokens = [prompt.tokens.tobytes() for prompt in loaded]
            assert len(set(tokens)) == len(tokens) or not fields.get("deduplicate")
            batch = data.train_batches(4, seed=1)[0]
            assert batch.valid.any()
        if not isinstance(results[0], str):
            assert results[0] == results[-1]

    holds()
    assert seen["rows"] > 10_000 and seen["prompts"] > 1_000


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
def test_any_bytes_in_any_format(data_folder, ending):
    starts = {".json": [b"[", b"{", b'[{"a": 1},'], ".csv": [b"a,b\n", b'"a'], ".parquet": [b"PAR1"]}
    pieces = st.sampled_from(
        [*starts.get(ending, [b'{"a": 1}\n']), b'"', b",", b"\n", b"\r", b"\x00", b"\xff", b"]}"]
    )

    @given(st.lists(st.one_of(pieces, st.binary(max_size=8)), max_size=8).map(b"".join))
    @settings(ALIKE, max_examples=300)
    def holds(data):
        (data_folder / f"x{ending}").write_bytes(data)
        try:
            rows = sources.read_rows(f"x{ending}")
        except ValueError as error:
            check_message(error)
        else:
            assert rows and all(isinstance(name, str) for row in rows for name in row.values)

    holds()


ANY_SOURCE = st.recursive(
    st.one_of(
        st.sampled_from(
            ["good.jsonl", "no.jsonl", "no*", "", ".", "a:b", "json:loads", "embedded:", "*.jsonl", "\x00"]
        ),
        st.text(max_size=6),
        st.dictionaries(
            st.sampled_from(["sources", "weights", "seed", "hf", "x"]), st.integers(-1, 3), max_size=2
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.fixed_dictionaries(
            {
                "sources": st.lists(inner, max_size=3),
                "weights": st.lists(st.one_of(st.floats(), st.integers(0, 9)), max_size=3),
            }
        ),
    ),
    max_leaves=5,
)


def test_any_source(data_folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))

    @given(ANY_SOURCE)
    @settings(ALIKE, max_examples=500)
    def holds(source):
        try:
            assert sources.read_rows(source)
        except ValueError as error:
            check_message(error)

    holds()
