"""Whole runs of the other families, from a Hugging Face folder to an export; test_decoder.py has their logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from fake_models import SPEAKING, write_model
from flax import nnx
from tiny_run import changed_config, read_metrics, run_name, write_prompts

from xpo_jax.models import registry
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


def run_of(name, folder):
    """Run two steps of a family's model with random weights; return the folder that the run read."""
    source = write_model(folder / "model", config=CONFIGS[name])
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = LIBRARY_TOKENIZER[name]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    write_prompts(folder)
    status, _, err = run_name(folder, "run", changed_config(folder, steps=2))
    assert status == 0, err
    return source


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_a_family_learns_and_exports_what_it_read(name, tmp_path):
    config = CONFIGS[name]
    source = run_of(name, tmp_path)
    first = next(row for row in read_metrics(tmp_path / "run") if "grad_norm" in row)
    assert abs(first["objective/kl"]) < 1e-4 and first["grad_norm"] > 0
    export = tmp_path / "run" / "export"
    assert model_folder.read_config(export) == config
    before, after = (model_folder.load_params(folder, config) for folder in (source, export))
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), before, after)
    assert min(jax.tree.leaves(moved)) > 0
    assert json.loads((export / "config.json").read_text())["model_type"] == name


@pytest.mark.needs_torch
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_gives_our_logits_of_a_run_s_export(name, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with transformers' models, which need torch")
    from transformers import AutoModelForCausalLM

    run_of(name, tmp_path)
    export = tmp_path / "run" / "export"
    tokens = np.random.default_rng(0).integers(0, 259, (3, 17)).astype(np.int32)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
        expected = loaded(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    graphdef, _ = registry.abstract_model(CONFIGS[name], stacked=True)
    model = nnx.merge(graphdef, model_folder.load_params(export, CONFIGS[name]))
    ours = np.asarray(model.unembed(model.prefill(tokens)[0]))
    np.testing.assert_allclose(ours[..., : expected.shape[-1]], expected, rtol=0, atol=1e-4)
