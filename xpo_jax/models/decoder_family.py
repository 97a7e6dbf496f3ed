"""The family of a `DecoderConfig`: Hugging Face's tensors, sharding rules, and the layout of one array per layer."""

from __future__ import annotations

from typing import Any

import jax

from xpo_jax.models.decoder import Decoder
from xpo_jax.models.decoder_config import DecoderConfig
from xpo_jax.models.family import Family
from xpo_jax.runtime.sharding import Rules

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # as Hugging Face names them


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Turn the parameters of Decoder(stacked=True) into those of Decoder(stacked=False)."""
    layers = params["layers"]
    L = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": {i: jax.tree.map(lambda p, i=i: p[i], layers) for i in range(L)}}


def tensors(config: type[DecoderConfig]) -> tuple[tuple[str, str, str], ...]:
    """Return a family's table of tensors: (path in the stacked tree, Hugging Face's name, how it becomes ours)."""
    of_layers = [("input_layernorm", "scale", "weight", "identity")]
    for name in ("q_proj", "k_proj", "v_proj"):
        of_layers.append((f"self_attn.{name}", "kernel", "weight", "transpose"))
        if config.qkv_bias:
            of_layers.append((f"self_attn.{name}", "bias", "bias", "identity"))
    if config.qk_norm:
        of_layers += [(f"self_attn.{name}", "scale", "weight", "identity") for name in ("q_norm", "k_norm")]
    of_layers += [
        ("self_attn.o_proj", "kernel", "weight", "transpose"),
        ("post_attention_layernorm", "scale", "weight", "identity"),
        *((f"mlp.{name}", "kernel", "weight", "transpose") for name in ("gate_proj", "up_proj", "down_proj")),
    ]
    return (
        ("embed_tokens.embedding", EMBEDDING, "identity"),
        *(
            (f"layers.{part}.{ours}", f"model.layers.{{layer}}.{part}.{hf}", how)
            for part, ours, hf, how in of_layers
        ),
        ("norm.scale", "model.norm.weight", "identity"),
        ("lm_head.kernel", HEAD, "transpose"),
    )


def sharding(config: type[DecoderConfig]) -> Rules:
    """Return which mesh axis each axis of a master weight is split over; the first pattern that matches counts.

    For sampling, fsdp is left out: weights are gathered once per step instead of once per token.
    """
    of_bias = ((r"layers\..*\.(q_proj|k_proj|v_proj)\.bias", (None, "tensor")),) if config.qkv_bias else ()
    return (
        (r"embed_tokens\.embedding", ("tensor", "fsdp")),
        (r"lm_head\.kernel", ("fsdp", "tensor")),
        (r"layers\..*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.kernel", (None, "fsdp", "tensor")),
        *of_bias,
        (r"layers\..*\.(o_proj|down_proj)\.kernel", (None, "tensor", "fsdp")),
        (r"layers\..*norm\.scale", (None, None)),
        (r"norm\.scale", (None,)),
    )


def decoder_family(config: type[DecoderConfig], *, reward_architecture: str) -> Family:
    """Return the family of a config: its modules are those of this file."""
    return Family(
        config=config,
        module=Decoder,
        tensors=tensors(config),
        embedding=EMBEDDING,
        head=HEAD,
        sharding=sharding(config),
        unstack=unstack,
        reward_architecture=reward_architecture,
        reward_head="score.weight",
    )
