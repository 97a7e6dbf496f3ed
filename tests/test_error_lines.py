"""Errors that would mislead if they named only what the program missed."""

import functools
import json

import datasets
import pytest

from xpo_jax.data import sources
from xpo_jax.data.rows import SourceError
from xpo_jax.experiment.judge_factory import make_judge
from xpo_jax.models.hf import model_folder
from xpo_jax.reporting import run_reader


def margin_judge(comparisons, margin):
    return [margin] * len(comparisons)


def plain_judge(comparisons):
    return [0.75] * len(comparisons)


class Callable:
    def __call__(self, comparisons):
        return [0.75] * len(comparisons)


bound = functools.partial(margin_judge, margin=0.75)
renamed = functools.partial(plain_judge)
instance = Callable()


@pytest.mark.parametrize("name", ["bound", "renamed", "instance", "plain_judge", "Callable"])
def test_make_judge_partial_or_object_that_takes_comparisons_is_the_judge(name):
    judge = make_judge({"name": f"test_error_lines:{name}"}, "judge")
    assert judge([None] * 2) == [0.75, 0.75]


def test_read_config_of_an_adapter_says_what_it_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(
        ValueError,
        match=r"an adapter \(LoRA\) of owner/base, not a model; give that model, and this folder as lora.start",
    ):
        model_folder.read_config(tmp_path)


@pytest.mark.parametrize("source", ['["a.jsonl"]', "['a.jsonl', 'b.jsonl']", '[{"hf": "x"}]', '{"hf": "x"}'])
def test_open_rows_list_as_text_is_refused_as_such(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceError, match="is a list or mapping as text; write it in a config, because on the command"
    ):
        sources.open_rows(source)


def test_open_rows_glob_that_begins_with_a_bracket_is_a_glob(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert len(sources.open_rows("[ab].jsonl")) == 1


def test_open_rows_cache_that_cannot_be_written_is_named(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "home/.cache/huggingface")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SourceError, match=r"huggingface: Permission denied\); set HF_HOME to a folder"):
        sources.open_rows({"hf": "owner/name", "split": "train"})


def test_read_run_without_metrics_says_so(tmp_path):
    for name in ("xpo_jax_run.json", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        ValueError, match="this run has written no metrics yet; wait for its first evaluation"
    ):
        run_reader.read(tmp_path)
