"""docs/data.md: every example is written to files and loaded as a config, and prints what the page shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from xpo_jax.config import loader as configs
from xpo_jax.data.prompts import load_prompts
from xpo_jax.experiment.judge_factory import make_judge
from xpo_jax.models.hf import hub, model_folder

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
EXAMPLES = {name: text for name, text in SECTIONS.items() if "`my_config.py`:" in text}
FILE = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^```text\ntraining: (.*)\n```$", re.MULTILINE)


@pytest.fixture(scope="module")
def tokenizer():
    folder = hub.find("embedded").folder
    return model_folder.load_tokenizer(folder, model_folder.read_config(folder))


def test_data_page_has_an_example_for_every_source_and_field():
    assert set(SECTIONS) - set(EXAMPLES) == {"A million rows"}
    headings = {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in SECTIONS}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) == headings
    assert load_prompts.__kwdefaults__ is None  # every field stands in a config
    fields = set(re.findall(r"`(\w+)\b", PAGE)) | set(re.findall(r"config\.data\.(\w+)", PAGE))
    not_fields = {"tokenizer", "max_new_tokens", "check"}
    assert set(load_prompts.__annotations__) - not_fields - {"return"} <= fields


@pytest.mark.parametrize("name", EXAMPLES)
def test_data_page_example_prints_what_the_page_shows(name, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for path, content in FILE.findall(EXAMPLES[name]):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content, encoding="utf-8")
    if "Hugging Face" in name:
        import datasets

        rows = datasets.Dataset.from_list([{"sentence": "It rained.", "label": 1}] * 2)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    config = configs.load("my_config.py")
    data = configs.build(
        load_prompts, config.data, "data", tokenizer=tokenizer, max_new_tokens=32, check=None
    )
    make_judge(config.judge, "judge")
    for module in ("my_rows", "my_judge"):
        sys.modules.pop(module, None)
    (printed,) = PRINTED.findall(EXAMPLES[name])
    assert data.train.summary() == printed
    assert configs.load("my_config.py").data == config.data
