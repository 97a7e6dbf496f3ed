"""Write a model of a real size with random weights: no download, and the same numbers everywhere.

    python -m tools.build.random_model build/random_0.5b

The shape is Qwen2.5-0.5B's, the file bfloat16. The weights come from the raw bits of a generator whose stream NumPy
guarantees, so golden values can be stored without the weights. They are scaled so that logits are neither flat nor
concentrated on one token. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}


def write(folder: Path, config: dict, seed: int = 0) -> Path:
    """Write config.json and model.safetensors of a Qwen2 with tied embeddings; returns the folder."""
    D, F, H = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    KV = config["num_key_value_heads"] * D // H
    names = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (D, D),
            "self_attn.q_proj.bias": (D,),
            "self_attn.k_proj.weight": (KV, D),
            "self_attn.k_proj.bias": (KV,),
            "self_attn.v_proj.weight": (KV, D),
            "self_attn.v_proj.bias": (KV,),
            "self_attn.o_proj.weight": (D, D),
            "post_attention_layernorm.weight": (D,),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }.items():
            names[f"model.layers.{layer}.{name}"] = shape
    bits = np.random.PCG64(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _draw(bits, name, shape) for name, shape in names.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _draw(bits: np.random.PCG64, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uniformly around 0 (around 1 for norms). Embeddings are small because they are also the unembedding."""
    if "norm" in name:
        middle, deviation = 1.0, 0.2
    else:
        middle, deviation = 0.0, 0.1 if "embed" in name or name.endswith("bias") else 1.2 / shape[1] ** 0.5
    size = int(np.prod(shape))
    raw = bits.random_raw(-(-size // 4)).astype("<u8").view("<i2")[:size]  # 16 bits each, from -2**15
    uniform = raw.astype(np.float32) * np.float32(3**0.5 / 2**15 * deviation)
    return (uniform + np.float32(middle)).reshape(shape).astype(ml_dtypes.bfloat16)


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write it; about 1 GB")
    print(write(parser.parse_args().folder, CONFIG_05B))


if __name__ == "__main__":
    main()
