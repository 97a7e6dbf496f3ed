"""Whole runs of the other families, from a Hugging Face folder to an export; test_decoder.py has their logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from fake_models import SPEAKING, write_model
from tiny_run import changed_config, read_metrics, run_name, write_prompts

from xpo_jax.models.hf import model_folder
from xpo_jax.models.llama import LlamaConfig
from xpo_jax.models.qwen3 import Qwen3Config
from xpo_jax.models.rope import Llama3

SHAPE = dataclasses.asdict(SPEAKING)
CONFIGS = {
    "qwen3": Qwen3Config(**{**SHAPE, "head_dim": 8, "tie_word_embeddings": False}),
    "llama": LlamaConfig(**{**SHAPE, "rope_scaling": Llama3(8.0, 1.0, 4.0, 16)}),
}
LIBRARY_TOKENIZER = {"qwen3": "Qwen2Tokenizer", "llama": "PreTrainedTokenizerFast"}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_a_family_learns_and_exports_what_it_read(name, tmp_path):
    config = CONFIGS[name]
    source = write_model(tmp_path / "model", config=config)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = LIBRARY_TOKENIZER[name]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    write_prompts(tmp_path)
    status, _, err = run_name(tmp_path, "run", changed_config(tmp_path, steps=2))
    assert status == 0, err
    first = next(row for row in read_metrics(tmp_path / "run") if "grad_norm" in row)
    assert abs(first["objective/kl"]) < 1e-4 and first["grad_norm"] > 0
    export = tmp_path / "run" / "export"
    assert model_folder.read_config(export) == config
    before, after = (model_folder.load_params(folder, config) for folder in (source, export))
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), before, after)
    assert min(jax.tree.leaves(moved)) > 0
    assert json.loads((export / "config.json").read_text())["model_type"] == name
