"""The README.md of an export, to the letter, and what must not be in it."""

import re
from pathlib import Path

import pytest
from tiny_run import tiny_config

from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.models.hf.hub import Model
from xpo_jax.reporting.model_card import card

HUB = Model("some-one/Tiny@v1", Path("/cache/snapshots/bbb"), "b" * 40, "commit ...")
FOUND = {
    "win_rate": 0.63537,
    "win_rate_low": 0.6174,
    "win_rate_high": 0.65335,
    "kl": 2.00219,
    "valid": 0.9415,
    "valid_reference": 0.95825,
    "copy_rate": None,
    "copy_rate_reference": None,
}


@pytest.fixture
def top(tmp_path):
    config = tiny_config(tmp_path)
    config.judge.key = "sk-secret"
    config.data.train = "/users/someone/train.jsonl"
    del config.loss.alpha
    config.loss.alpha = {"kind": "linear", "start": 1e-3, "end": 0.0, "steps": 4}
    return configs.build(settings.Experiment, config, "config")


def test_card_states_origin_and_measurements(top):
    text = card(top, HUB, HUB, FOUND, held_out=1000, step=4)
    assert text.startswith(
        "---\n"
        'base_model: "some-one/Tiny"\n'
        "library_name: transformers\n"
        "pipeline_tag: text-generation\n"
        "---\n\n"
        "# Tiny, after 4 steps of XPO\n\n"
        f"`some-one/Tiny` (commit {'b' * 40}), trained with"
    )
    assert "the reference, a frozen copy of it, by the judge `fakes:LongerText`.\n" in text
    assert "on 1000 held-out prompts" in text
    assert (
        "| | reference | this model |\n"
        "|---|---|---|\n"
        "| win rate against the reference | 50.0% | 63.5% [61.7%, 65.3%] |\n"
        "| KL to the reference, nats per sequence | 0 | 2 |\n"
        "| valid answers | 95.8% | 94.2% |\n"
        "\n## Settings\n"
    ) in text
    assert (
        '"alpha": {\n      "end": 0.0,\n      "kind": "linear",' in text and '"learning_rate": 0.01' in text
    )


def test_card_states_the_chat_template_arguments(top):
    assert "chat_template_arguments" not in card(top, HUB, HUB, FOUND, held_out=3, step=4)
    top.data["chat_template_arguments"] = {"enable_thinking": False}
    text = card(top, HUB, HUB, FOUND, held_out=3, step=4)
    assert '"chat_template_arguments": {\n    "enable_thinking": false\n  }\n}\n```' in text


def test_card_names_nothing_of_the_machine(top, tmp_path):
    folder = Model("/users/someone/models/Qwen `2.5`", Path("/users/someone/models/Qwen `2.5`"))
    other = Model("../elsewhere/reference", Path("../elsewhere/reference"))
    text = card(
        top, folder, other, FOUND | {"win_rate": None, "valid": None, "kl": float("nan")}, held_out=3, step=4
    )
    assert 'base_model: "Qwen `2.5`"\n' in text and "\n`Qwen 2.5`, trained with" in text
    assert "the reference, `reference`, by" in text
    assert "| this model |\n|---|---|---|\n| win rate against the reference | 50.0% | no verdicts |\n" in text
    assert "valid answers" not in text
    assert not re.search(r"users|someone|elsewhere|cache|sk-secret|train\.jsonl", text)
    assert str(tmp_path) not in text


def test_card_of_an_adapter_states_its_settings_and_no_path(tmp_path):
    config = tiny_config(tmp_path)
    with config.ignore_type():
        config.lora.rank, config.lora.start = 4, "/users/someone/adapter"
    top = configs.build(settings.Experiment, config, "config")
    text = card(top, HUB, HUB, FOUND, held_out=1000, step=4)
    assert '"lora"' in text and '"rank": 4' in text and "someone/adapter" not in text


def test_card_states_by_what_and_how_surely_a_policy_was_chosen(top):
    values = {"exported_value": 0.61234, "exported_value_low": 0.6, "exported_value_high": 0.62}
    chosen = {"exported_by": "mean score", **values}
    text = card(top, HUB, HUB, {**FOUND, **chosen}, held_out=1000, step=2)
    assert (
        "# Tiny, after 2 steps of XPO\n" in text
        and "\nAfter step 2, the best of its run, on 1000 held-out" in text
    )
    assert "| chosen by: mean score |  | 0.6123 [0.6, 0.62] |\n\n## Settings" in text
