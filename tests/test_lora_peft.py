"""What the `peft` package makes of our adapter folders, and we of its own; skipped where torch or peft is missing.

pip install torch==2.13.0 peft==0.21.2
"""

import dataclasses

import jax
import numpy as np
import pytest
from fake_models import SPEAKING, random_adapter, write_model
from flax import nnx

from xpo_jax.models import lora, registry
from xpo_jax.models.hf import adapter, model_folder
from xpo_jax.models.llama import LlamaConfig
from xpo_jax.models.lora import LoRA
from xpo_jax.models.qwen3 import Qwen3Config

torch = pytest.importorskip("torch", reason="compares with PEFT, which needs torch")
peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")

pytestmark = pytest.mark.needs_torch
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
MODELS = {
    "qwen2": SPEAKING,
    "qwen3": Qwen3Config(**dataclasses.asdict(SPEAKING)),
    "llama": LlamaConfig(**dataclasses.asdict(SPEAKING)),
}
TOKENS = np.random.default_rng(0).integers(0, 259, (3, 17)).astype(np.int32)


def ours(folder, params, adapters):
    """Return the logits of the base in a folder with an adapter applied."""
    config = model_folder.read_config(folder)
    graphdef, _ = registry.abstract_model(config, stacked=True, adapters=adapters)
    model = nnx.merge(graphdef, lora.join(model_folder.load_params(folder, config), params))
    return np.asarray(jax.jit(lambda model, tokens: model.unembed(model.prefill(tokens)[0]))(model, TOKENS))


def loaded(folder):
    """Return the base as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_peft_loads_our_folder_and_gives_our_logits(tmp_path, family, rslora):
    base = tmp_path / "base"
    base.mkdir()
    write_model(base, config=MODELS[family])
    adapters = LoRA(rank=4, alpha=6.0, targets=TARGETS, rslora=rslora, start=None)
    params = random_adapter(1, MODELS[family], adapters, scale=0.3)
    adapter.save_adapter(tmp_path / "adapter", params, MODELS[family], adapters, "base")
    expected = logits(peft.PeftModel.from_pretrained(loaded(base), tmp_path / "adapter"))
    np.testing.assert_allclose(ours(base, params, adapters), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - logits(loaded(base))).max() > 0.1


@pytest.mark.parametrize("targets", [list(TARGETS), "all-linear", r".*self_attn\.[qv]_proj"])
def test_folder_that_peft_wrote_gives_its_logits(tmp_path, targets):
    base = tmp_path / "base"
    base.mkdir()
    write_model(base)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(loaded(base), settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    names = {"all-linear": (".*_proj",)}.get(targets, (targets,)) if isinstance(targets, str) else TARGETS
    adapters = LoRA(rank=4, alpha=6.0, targets=names, rslora=False, start=str(tmp_path / "adapter"))
    params = adapter.load_adapter(tmp_path / "adapter", model_folder.read_config(base), adapters)
    np.testing.assert_allclose(ours(base, params, adapters), logits(model), rtol=0, atol=1e-4)


def test_peft_adapter_with_dora_is_refused(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_model(base)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(loaded(base), settings).save_pretrained(tmp_path / "adapter")
    adapters = LoRA(rank=4, alpha=6.0, targets=("q_proj",), rslora=False, start=None)
    with pytest.raises(ValueError, match="use_dora True: not computed"):
        adapter.check_adapter(tmp_path / "adapter", SPEAKING, adapters)
