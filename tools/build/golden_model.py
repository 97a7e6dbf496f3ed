"""Make the tiny models and their logits that tests/test_decoder.py and tests/test_hf.py compare with.

    pip install torch transformers safetensors
    python -m tools.build.golden_model tests/golden
    python -m tools.build.golden_model tests/golden --only=qwen3_tied

Each folder <family>_<name> is a Hugging Face folder with random weights, and a logits.npz: for several lengths
T, ids_<T> i64[2 T] and logits_<T> f32[2 T V], which transformers computes in float32 from the written folder.
The models differ in what a reader can get wrong: tied or not, head counts, a head size that is not
hidden / heads, the rotary base and its key in config.json, RoPE scaling, the dtype on disk, one file or
several. Biases and norm scales are far from 0 and 1, and weights are large enough for sharp attention, so that an
omitted or exchanged tensor changes the logits.

random_0.5b.npz holds the same for Qwen2.5-0.5B's shape, with the weights of tools/build/random_model.py: for
ids i64[T], at `positions`, the logits of the tokens `columns`, the most likely token and the log of the sum of
exponentials over all; `greedy`, the tokens that follow the first `prompt` ids; `margin`, the smallest lead of a
greedy token over the second; and `bfloat16_rms`, the error of transformers itself in bfloat16.

Only the golden builders need torch.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tools.build import random_model

LENGTHS = (1, 6, 19)
COMMON = {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "attn_implementation": "eager"}
SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "qwen2_tied": {
        "config": {
            "vocab_size": 130,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "rope_theta": 1e4,
        "old_spelling": False,
        "dtype": "float32",
    },
    "qwen2_untied_sharded": {
        "config": {
            "vocab_size": 150,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
        "rope_theta": 1e6,
        "old_spelling": True,
        "dtype": "float32",
        "max_shard_size": "60KB",
    },
    "qwen2_tied_one_kv_bf16": {
        "config": {
            "vocab_size": 120,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        "rope_theta": 1e6,
        "old_spelling": True,
        "dtype": "bfloat16",
    },
    "qwen2_untied_head_dim_f16": {
        "config": {
            "vocab_size": 130,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
        },
        "rope_theta": 1e4,
        "old_spelling": False,
        "dtype": "float16",
    },
    "qwen2_yarn": {
        "config": {**SMALL, "head_dim": 16, "tie_word_embeddings": True},
        "rope_theta": 1e2,
        "rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        "old_spelling": True,
        "dtype": "bfloat16",
    },
    "qwen3_tied": {
        "config": {**SMALL, "head_dim": 16, "tie_word_embeddings": True},
        "rope_theta": 1e6,
        "old_spelling": False,
        "dtype": "bfloat16",
    },
    "qwen3_untied_old": {
        "config": {**SMALL, "head_dim": 8, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "rope_theta": 1e4,
        "old_spelling": True,
        "dtype": "bfloat16",
    },
    "llama_untied": {  # of its eight frequencies one stays, two are interpolated, five are divided
        "config": {**SMALL, "head_dim": 16, "tie_word_embeddings": False},
        "rope_theta": 1e2,
        "rope": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "old_spelling": False,
        "dtype": "bfloat16",
    },
    "llama_tied_old": {  # as SmolLM2
        "config": {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "rope_theta": 1e5,
        "old_spelling": True,
        "dtype": "bfloat16",
    },
}


def randomize(model: torch.nn.Module) -> None:
    """Draw all weights: matrices preserve the scale of their input, biases and norms are far from 0 and 1."""
    for name, p in model.named_parameters():
        noise = torch.randn_like(p)
        if "norm" in name:
            p.data = 1 + 0.4 * noise
        elif name.endswith("bias") or "embed_tokens" in name:
            p.data = 0.5 * noise
        else:
            p.data = 1.5 * noise / p.shape[1] ** 0.5


@torch.no_grad()
def real_shape(golden: Path, *, length: int = 24, prompt: int = 12, new_tokens: int = 64) -> None:
    """Write random_0.5b.npz."""
    bits = np.random.PCG64(1)
    ids = (bits.random_raw(length) % random_model.CONFIG_05B["vocab_size"]).astype(np.int64)
    columns = np.sort((bits.random_raw(512) % random_model.CONFIG_05B["vocab_size"]).astype(np.int64))
    positions = [0, 5, prompt - 1, length - 1]
    with tempfile.TemporaryDirectory() as folder:
        random_model.write(Path(folder), random_model.CONFIG_05B)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    logits = model(input_ids=torch.tensor(ids[None])).logits[0, positions]
    greedy, margins, cache, last = [], [], None, torch.tensor(ids[None, :prompt])
    for _ in range(new_tokens):
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache, (first, second) = out.past_key_values, torch.topk(out.logits[0, -1], 2).values.tolist()
        last = out.logits[:, -1:].argmax(-1)
        greedy.append(last.item())
        margins.append(first - second)
    rounded = model.to(torch.bfloat16)(input_ids=torch.tensor(ids[None])).logits[0, positions].float()
    arrays = {
        "ids": ids,
        "prompt": prompt,
        "positions": positions,
        "columns": columns,
        "logits": logits[:, columns].numpy(),
        "argmax": logits.argmax(-1).numpy(),
        "logsumexp": torch.logsumexp(logits, -1).numpy(),
        "greedy": greedy,
        "margin": min(margins),
        "bfloat16_rms": (rounded - logits).square().mean().sqrt().item(),
    }
    np.savez_compressed(golden / "random_0.5b.npz", **arrays)
    print(
        f"random_0.5b.npz: {(golden / 'random_0.5b.npz').stat().st_size / 1000:.0f} kB, logits' standard deviation"
        f" {logits.std():.2f}, {len(set(greedy))} different tokens of {new_tokens}, smallest lead"
        f" {min(margins):.4f}; in bfloat16 the error of transformers is {arrays['bfloat16_rms']:.4f} (rms)"
    )


def main() -> None:
    """Write the models and their logits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("golden", type=Path, help="folder to write the models into, tests/golden")
    parser.add_argument("--only", help="the name of one model")
    options = parser.parse_args()
    if options.only in (None, "random_0.5b"):
        real_shape(options.golden)

    for number, (name, spec) in enumerate(MODELS.items()):
        if options.only not in (None, name):
            continue
        torch.manual_seed(number)
        folder = options.golden / name
        shutil.rmtree(folder, ignore_errors=True)
        rope = {"rope_type": "default", **spec.get("rope", {}), "rope_theta": spec["rope_theta"]}
        config = AutoConfig.for_model(
            name.partition("_")[0], **{**COMMON, **spec["config"]}, rope_parameters=rope
        )
        model = AutoModelForCausalLM.from_config(config)
        randomize(model)
        model.to(getattr(torch, spec["dtype"])).save_pretrained(
            folder, max_shard_size=spec.get("max_shard_size", "1GB")
        )
        (folder / "generation_config.json").unlink()
        if spec["old_spelling"]:  # as transformers 4 wrote it, and as in Qwen's folders
            path = folder / "config.json"
            config = json.loads(path.read_text())
            rope = config.pop("rope_parameters")
            config["rope_theta"] = rope.pop("rope_theta")
            if rope.pop("rope_type") != "default":
                config["rope_scaling"] = {"type": spec["rope"]["rope_type"], **rope}
            config["torch_dtype"] = config.pop("dtype")
            path.write_text(json.dumps(config, indent=2) + "\n")

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model.eval()
        arrays = {}
        for length in LENGTHS:
            ids = torch.randint(0, model.config.vocab_size, (2, length))
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            arrays[f"ids_{length}"] = ids.numpy()
            arrays[f"logits_{length}"] = logits.numpy()
        np.savez_compressed(folder / "logits.npz", **arrays)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 1000:.0f} kB, logits' standard deviation {logits.std():.2f}")


if __name__ == "__main__":
    main()
