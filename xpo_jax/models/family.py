"""What a model family provides, and what the rest of the project requires of it.

A new family is one file that ends in a `Family`, like qwen2.py, and one line in registry.py. What resembles Llama is a
`DecoderConfig` (decoder_config.py) and takes its modules from decoder.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from xpo_jax.runtime.sharding import Rules


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one model, under Hugging Face's names."""

    # long: these are the fields of a config.json
    model_type: ClassVar[str]

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read the fields of a config.json; raise ValueError for a model that the family's modules do not compute."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Args:
      config: its `ModelConfig`.
      module: (config, *, rngs, stacked, remat, kernels) -> an nnx.Module with the passes `prefill`, `packed` and
        `decode`, `empty_caches`, `unembedding` and `unembed`, see decoder.py.
      tensors: (path in the stacked tree, Hugging Face's name, "identity" or "transpose") of every tensor; `{layer}`
        in a name stands for the layer's number.
      embedding, head: names of the input and output embeddings, which are one tensor in a tied model.
      sharding: the mesh axes of the master weights' axes; the first pattern that matches counts.
      unstack: turns the parameters with stacked layers into those with a list of layers.
      reward_architecture: what config.json calls the family's sequence classifier.
      reward_head: name of that classifier's own tensor, [labels D].
    """

    # long: all that a family is, in one record
    config: type[ModelConfig]
    module: Callable[..., Any]
    tensors: tuple[tuple[str, str, str], ...]
    embedding: str
    head: str
    sharding: Rules
    unstack: Callable[[dict[str, Any]], dict[str, Any]]
    reward_architecture: str
    reward_head: str
