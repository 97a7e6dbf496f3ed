"""Qwen3, the dense models: heads of q and k are normed, no biases, and a head size of its own.

Left out on purpose: mixtures of experts (qwen3_moe), sliding windows, and biases; a config with one is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from xpo_jax.models.decoder_config import DecoderConfig
from xpo_jax.models.decoder_family import decoder_family


@dataclasses.dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """Shapes and constants of a Qwen3."""

    model_type: ClassVar[str] = "qwen3"
    label: ClassVar[str] = "a dense Qwen3"
    qk_norm: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"head_dim": 128}
    refused: ClassVar[Mapping[str, str]] = {"attention_bias": ", a bias that no published Qwen3 has"}


FAMILY = decoder_family(Qwen3Config, reward_architecture="Qwen3ForSequenceClassification")
