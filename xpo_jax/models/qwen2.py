"""Qwen2 and Qwen2.5: biases on q, k and v.

Left out on purpose: sliding windows; a config with them is refused.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from xpo_jax.models.decoder_config import DecoderConfig
from xpo_jax.models.decoder_family import decoder_family


@dataclasses.dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Shapes and constants of a Qwen2 or Qwen2.5."""

    model_type: ClassVar[str] = "qwen2"
    label: ClassVar[str] = "a Qwen2 or Qwen2.5"
    qkv_bias: ClassVar[bool] = True


FAMILY = decoder_family(Qwen2Config, reward_architecture="Qwen2ForSequenceClassification")
