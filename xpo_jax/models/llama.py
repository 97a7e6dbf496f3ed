"""Llama 3 and what has its architecture, such as SmolLM2: no biases, and RoPE scaling.

Left out on purpose: biases, which Llama's config allows and its published models do not have; a config with one is
refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from xpo_jax.models.decoder_config import DecoderConfig
from xpo_jax.models.decoder_family import decoder_family

_NO_BIAS = ", a bias that no published Llama has"


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Shapes and constants of a Llama."""

    model_type: ClassVar[str] = "llama"
    label: ClassVar[str] = "a Llama"
    defaults: ClassVar[Mapping[str, Any]] = {"rope_theta": 1e4}
    refused: ClassVar[Mapping[str, str]] = {"attention_bias": _NO_BIAS, "mlp_bias": _NO_BIAS}


FAMILY = decoder_family(LlamaConfig, reward_architecture="LlamaForSequenceClassification")
