"""What the planner knows by name: published models' shapes, and accelerators with the figures of their makers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from xpo_jax.models.family import ModelConfig
from xpo_jax.models.registry import read_model_config


def _sizes(names: tuple[str, ...], *rows: tuple[Any, ...], **common: Any) -> dict[str, ModelConfig]:
    """Return models by name and size; a row has what differs, under the names."""
    return {row[0]: read_model_config({**common, **dict(zip(names, row[1:], strict=True))}) for row in rows}


_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_QWEN = {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131072,
}
_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}

# From the config.json of each release: {pattern of the names: {size: shapes}}. Base, instruct, coder and math models of
# one size have the same shape, and so do those of Qwen2.
MODELS = {
    r"Qwen2(?:\.5)?(?:-Coder|-Math)?-(\d+(?:\.\d+)?B)(?:-Instruct)?": _sizes(
        (*_SHAPE, "vocab_size", "tie_word_embeddings"),
        ("0.5B", 896, 4864, 24, 14, 2, 151936, True),
        ("1.5B", 1536, 8960, 28, 12, 2, 151936, True),
        ("3B", 2048, 11008, 36, 16, 2, 151936, True),
        ("7B", 3584, 18944, 28, 28, 4, 152064, False),
        ("14B", 5120, 13824, 48, 40, 8, 152064, False),
        ("32B", 5120, 27648, 64, 40, 8, 152064, False),
        ("72B", 8192, 29568, 80, 64, 8, 152064, False),
        model_type="qwen2",
        max_position_embeddings=32768,
        **_QWEN,
    ),
    r"Qwen3-(\d+(?:\.\d+)?B)(?:-Base)?": _sizes(
        (*_SHAPE, "tie_word_embeddings"),
        ("0.6B", 1024, 3072, 28, 16, 8, True),
        ("1.7B", 2048, 6144, 28, 16, 8, True),
        ("4B", 2560, 9728, 36, 32, 8, True),
        ("8B", 4096, 12288, 36, 32, 8, False),
        ("14B", 5120, 17408, 40, 40, 8, False),
        ("32B", 5120, 25600, 64, 64, 8, False),
        model_type="qwen3",
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        **_QWEN,
    ),
    r"(?:Meta-)?Llama-3\.[123]-(\d+B)(?:-Instruct)?": _sizes(
        (*_SHAPE, "tie_word_embeddings", "rope_scaling"),
        ("1B", 2048, 8192, 16, 32, 8, True, {**_SCALING, "factor": 32}),
        ("3B", 3072, 8192, 28, 24, 8, True, {**_SCALING, "factor": 32}),
        ("8B", 4096, 14336, 32, 32, 8, False, {**_SCALING, "factor": 8}),
        ("70B", 8192, 28672, 80, 64, 8, False, {**_SCALING, "factor": 8}),
        **_LLAMA,
    ),
    r"SmolLM2-(\d+(?:\.\d+)?[MB])(?:-Instruct)?": _sizes(
        (*_SHAPE, "rope_theta"),
        ("135M", 576, 1536, 30, 9, 3, 1e5),
        ("360M", 960, 2560, 32, 15, 5, 1e5),
        ("1.7B", 2048, 8192, 24, 32, 32, 1.3e5),
        **{**_LLAMA, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    ),
}
SIZES = MODELS[next(iter(MODELS))]  # of Qwen2.5


def size_of(name: str) -> ModelConfig | None:
    """Return the shapes of a model by its name ("Qwen/Qwen2.5-7B-Instruct", "Qwen3-8B"); None if unknown."""
    for pattern, sizes in MODELS.items():
        match = re.fullmatch(rf"(?:.*/)?{pattern}(?:@.*)?", name, re.IGNORECASE)
        if match and match[1].upper() in sizes:
            return sizes[match[1].upper()]
    return None


def known_models() -> str:
    """Return the names that `size_of` knows, for errors."""
    names = ("Qwen2.5", "Qwen3", "Llama-3.x", "SmolLM2")
    return "; ".join(f"{name}-{', '.join(sizes)}" for name, sizes in zip(names, MODELS.values(), strict=True))


class Device(NamedTuple):
    """One accelerator: memory in bytes, bfloat16 peak in dense FLOP/s, memory bandwidth in bytes/s."""

    memory: float
    peak_flops: float
    bandwidth: float


def platform(device: str | None) -> str:
    """Return the platform of a key of `DEVICES`, "tpu" or "gpu"; of an unknown device "gpu"."""
    return "tpu" if device is not None and device.startswith("tpu") else "gpu"


# From the makers' data sheets, per chip and without sparsity: NVIDIA's for the SXM form, Google Cloud's TPU pages
# ("per chip"). A program gets less: CUDA and the runtime hold a few hundred MB, and JAX takes three quarters of a GPU
# unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
DEVICES = {
    "a100-80gb": Device(80e9, 312e12, 2039e9),
    "h100-80gb": Device(80e9, 989e12, 3350e9),
    "h200": Device(141e9, 989e12, 4800e9),
    "tpu-v4": Device(32e9, 275e12, 1228e9),
    "tpu-v5e": Device(16e9, 197e12, 819e9),
    "tpu-v5p": Device(95e9, 459e12, 2765e9),
    "tpu-v6e": Device(32e9, 918e12, 1640e9),
}

# What JAX calls a device (its device_kind, in lower case), in order: the first part that occurs in it counts. Other
# forms of an H100 or A100 have less memory or bandwidth, so they are not among these.
_KINDS = (
    ("h200", "h200"),
    ("h100 80gb hbm3", "h100-80gb"),
    ("a100-sxm4-80gb", "a100-80gb"),
    ("v5 lite", "tpu-v5e"),
    ("v5e", "tpu-v5e"),
    ("v6 lite", "tpu-v6e"),
    ("v6e", "tpu-v6e"),
    ("tpu v5", "tpu-v5p"),
    ("tpu v4", "tpu-v4"),
)


def by_kind(device_kind: str) -> Device | None:
    """Return the data sheet of a device by what JAX calls it; None if it is not known."""
    name = device_kind.lower()
    return next((DEVICES[key] for part, key in _KINDS if re.search(rf"\b{part}\b", name)), None)
