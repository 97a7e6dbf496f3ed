"""Held-out prompts: forgotten ones are refused, and a part that is split off never overlaps with training."""

from __future__ import annotations

import pytest
from fake_data import follows, load_data, load_error
from ml_collections import ConfigDict
from tiny_run import tiny_config, write_rows

from xpo_jax.config.evaluation import Evaluation
from xpo_jax.config.schema import ConfigError
from xpo_jax.data import prompt_sets
from xpo_jax.data.split import HeldOut, check_held_out
from xpo_jax.experiment.data_setup import load_data as load_run_data


def numbers(prompt_set):
    return [prompt.row.values["n"] for prompt in prompt_set.prompts]


@pytest.fixture
def rows(data_folder):
    """Write twenty rows, of which the last four repeat earlier texts."""
    write_rows(data_folder / "t.jsonl", [{"text": f"text {n % 16}", "n": n} for n in range(20)])


@pytest.mark.parametrize("limit", [5, 50_000])
@pytest.mark.parametrize(
    ("held_out", "count"), [(0.25, 4), (3, 3), ("0.25", 4), ("3", 3), ({"size": 0.25}, 4)]
)
def test_part_is_split_off_without_overlap(rows, tokenizer, monkeypatch, held_out, count, limit):
    monkeypatch.setattr(prompt_sets, "MAX_ROWS_IN_MEMORY", limit)  # above it, prompts are streamed
    data = load_data(tokenizer, held_out=held_out)
    train, other = numbers(data.train), numbers(data.held_out)
    assert len(other) == count and other == sorted(other) and train == sorted(train)
    assert {n % 16 for n in train}.isdisjoint(n % 16 for n in other)
    assert {n % 16 for n in train} | {n % 16 for n in other} == {*range(16)}
    assert data.train.dropped == {"held_out": 20 - len(train)}
    assert data.held_out.summary().endswith("; split off from train by seed 0")
    assert data.overlap() in (0, None)
    again = load_data(tokenizer, held_out=held_out)
    assert (numbers(again.train), numbers(again.held_out)) == (train, other)
    assert again.train.fingerprint == data.train.fingerprint != data.held_out.fingerprint


def test_part_depends_on_the_seed_and_not_on_other_rows(rows, tokenizer, data_folder):
    chosen = {
        seed: set(numbers(load_data(tokenizer, held_out={"size": 4, "seed": seed}).held_out))
        for seed in range(5)
    }
    assert len({frozenset(part) for part in chosen.values()}) == 5
    part = load_data(tokenizer, held_out=4)
    write_rows(data_folder / "t.jsonl", [{"text": f"text {n}", "n": n} for n in range(16)])
    assert numbers(load_data(tokenizer, held_out=4).held_out) == numbers(part.held_out)


def test_take_is_applied_to_what_is_left_for_training(rows, tokenizer):
    whole, part = (load_data(tokenizer, held_out=0.25, take=take) for take in (None, 5))
    assert numbers(part.train) == numbers(whole.train)[:5]
    assert numbers(part.held_out) == numbers(whole.held_out)
    assert part.train.dropped == {**whole.train.dropped, "take": len(whole.train.prompts) - 5}


@pytest.mark.parametrize(
    ("held_out", "text"),
    [
        (0.0, "data.held_out: ... fraction below 1 or a number of prompts ... 0.0"),
        (-1, "data.held_out: ... -1"),
        (1.5, "data.held_out: ... 1.5"),
        (1.0, "data.held_out: ... 1.0"),
        (16, "data.held_out: 16 of 16 different prompts ... lower it"),
        ({"size": 0.1, "sed": 1}, "data.held_out: ... size and seed ... sed"),
        ({"size": 0.1, "seed": -1}, "data.held_out: ... seed ... -1"),
    ],
)
def test_part_that_cannot_be_is_refused(rows, tokenizer, held_out, text):
    error = load_error(tokenizer, ConfigError, held_out=held_out)
    assert follows(error, text), error


# ---- forgotten ------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["t.jsonl", ("t.jsonl", "t.jsonl"), {"hf": "owner/name", "split": "train"}])
def test_own_prompts_with_the_held_out_prompts_of_the_package_are_refused(rows, tokenizer, train):
    error = load_error(tokenizer, ConfigError, train=train, held_out="embedded:held_out")
    assert follows(
        error,
        "data.held_out ... embedded:held_out ... 0.1 ... split off ... ['embedded:held_out'] in a config",
    )


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("embedded:train", "embedded:held_out"),
        (("embedded:train", "t.jsonl"), "embedded:held_out"),
        ({"sources": ["t.jsonl", "embedded:train"], "weights": [1, 1]}, "embedded:held_out"),
        ("t.jsonl", ("embedded:held_out",)),
        ("t.jsonl", "t.jsonl"),
    ],
)
def test_other_held_out_prompts_are_accepted(train, held_out):
    assert check_held_out(train, held_out) == held_out
    assert check_held_out(train, 0.5) == HeldOut(0.5, 0)


def test_offline_run_splits_its_held_out_prompts_off_and_refuses_forgotten_ones(tmp_path, tokenizer):
    config = tiny_config(tmp_path)
    write_rows(tmp_path / "dpo.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    config.offline = ConfigDict({"pairs": str(tmp_path / "dpo.jsonl")})
    evaluation = Evaluation(**config.evaluation)

    def judge(comparisons):
        raise AssertionError(comparisons)

    def load():
        options = {"end_tokens": (258,), "max_new_tokens": 8, "evaluation_judge": judge}
        return load_run_data(config, evaluation, judge, tokenizer, **options)

    with config.ignore_type():
        config.data.held_out = 0.25
        data = load()
        assert (len(data.prompts.train.prompts), len(data.prompts.held_out.prompts)) == (8, 5)
        config.data.held_out = "embedded:held_out"
    with pytest.raises(ValueError, match=r"^data\.held_out: is embedded:held_out, German"):
        load()
