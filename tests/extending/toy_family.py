"""A model family, as CONTRIBUTING.md shows it: the next token depends on the last one alone.

It has no layers and no attention, so its caches are empty; qwen2.py is the example of a decoder that has both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from xpo_jax.models.family import Family, ModelConfig
from xpo_jax.values import Array


@dataclasses.dataclass(frozen=True)
class BigramConfig(ModelConfig):
    """Shapes and constants of a bigram model."""

    model_type: ClassVar[str] = "bigram"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> BigramConfig:
        """Read the fields of a config.json."""
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if hf.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; is this a bigram model?")
        return cls(**{name: hf[name] for name in names})


class Bigram(nnx.Module):
    """Two tables: a token's hidden state, and the logits of a hidden state."""

    def __init__(self, config: BigramConfig, *, rngs: nnx.Rngs, **_: Any):
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def prefill(self, tokens: Array) -> tuple[Array, Any]:
        """Encode right-padded prompts i32[B P]: hidden [B P D], and the cache of each layer."""
        return self._hidden(tokens), []

    def packed(self, tokens: Array, positions: Array, part: Array, prompt: Array) -> Array:
        """Encode rows that hold several prompts and their responses, see `packing.Packed`: hidden [R W D]."""
        return self._hidden(tokens)

    def decode(
        self, token: Array, t: Array, prompt_lengths: Array, prompt_caches: Any, caches: Any
    ) -> tuple[Array, Any]:
        """Run response token t of each row, i32[B]: hidden [B D], and the caches with slot t filled."""
        return self._hidden(token), caches

    def empty_caches(self, B: int, T: int) -> list[Any]:
        """Return room for the keys and values of T response tokens of B rows, for each layer."""
        return []

    def unembedding(self) -> Array:
        """Return the table [V D] whose products with a hidden state are its logits."""
        return self.lm_head.kernel[...].T

    def unembed(self, hidden: Array) -> Array:
        """Return the logits f32[... V] of hidden [... D]."""
        return jnp.einsum("...d,vd->...v", hidden, self.unembedding(), preferred_element_type=jnp.float32)

    def _hidden(self, tokens: Array) -> Array:
        return jnp.take(self.embed_tokens.embedding[...], tokens, axis=0)


FAMILY = Family(
    config=BigramConfig,
    module=Bigram,
    tensors=(
        ("embed_tokens.embedding", "model.embed_tokens.weight", "identity"),
        ("lm_head.kernel", "lm_head.weight", "transpose"),
    ),
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    sharding=(
        (r"embed_tokens\.embedding", ("tensor", "fsdp")),
        (r"lm_head\.kernel", ("fsdp", "tensor")),
    ),
    unstack=lambda params: params,
    reward_architecture="BigramForSequenceClassification",
    reward_head="score.weight",
)
