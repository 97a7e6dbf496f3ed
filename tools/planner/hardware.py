"""What the planner knows by name: the published Qwen2.5 shapes, and accelerators with the figures of their makers."""

from __future__ import annotations

import re
from typing import NamedTuple

from xpo_jax.models.qwen2 import Qwen2Config


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=vocab == 151936,  # the three small ones
        max_position_embeddings=32768,
    )


# From the config.json of each release. Base, instruct, coder and math models of one size have the same shape, and
# so do those of Qwen2.
SIZES = {
    "0.5B": _qwen(896, 4864, 24, 14, 2, 151936),
    "1.5B": _qwen(1536, 8960, 28, 12, 2, 151936),
    "3B": _qwen(2048, 11008, 36, 16, 2, 151936),
    "7B": _qwen(3584, 18944, 28, 28, 4, 152064),
    "14B": _qwen(5120, 13824, 48, 40, 8, 152064),
    "32B": _qwen(5120, 27648, 64, 40, 8, 152064),
    "72B": _qwen(8192, 29568, 80, 64, 8, 152064),
}
_NAME = re.compile(
    r"(?:.*/)?Qwen2(?:\.5)?(?:-Coder|-Math)?-(\d+(?:\.\d+)?B)(?:-Instruct)?(?:@.*)?", re.IGNORECASE
)


def size_of(name: str) -> Qwen2Config | None:
    """Return the shapes of a model by its name ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-Coder-3B"); None if unknown."""
    match = _NAME.fullmatch(name)
    return SIZES.get(match[1].upper()) if match else None


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
