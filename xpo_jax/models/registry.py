"""The model families by config.json's `model_type`; nothing else in the project names a family."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from xpo_jax.models import llama, lora, qwen2, qwen3
from xpo_jax.models.family import Family, ModelConfig

FAMILIES: dict[str, Family] = {
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "llama": llama.FAMILY,
}


def family(config: ModelConfig) -> Family:
    """Return the family of a model."""
    return FAMILIES[config.model_type]


def read_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Read the fields of a config.json, in the way of the family that its `model_type` names.

    Raises:
      ValueError: an unknown family, or a model that its modules do not compute.
    """
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"config.json: model_type is {name!r}; xpo_jax computes {', '.join(FAMILIES)}, choose a model of these"
        )
    return FAMILIES[name].config.from_hf(hf)


def abstract_model(config: ModelConfig, *, stacked: bool, **options: Any) -> tuple[Any, Any]:
    """Return the graphdef of a model and its parameters as ShapeDtypeStructs; nothing is allocated.

    Args:
      stacked: with all layers in one array each (training), or in a list (sampling).
      options: `remat` and `kernels`, as the family's module takes them; `adapters`, see lora.py.
    """
    graphdef, params = _split(config, stacked, **options)
    return graphdef, nnx.to_pure_dict(params)


def param_shapes(config: ModelConfig) -> Any:
    """Return the tree of stacked float32 parameters, as ShapeDtypeStructs."""
    params = abstract_model(config, stacked=True)[1]
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, "float32"), params)


@functools.cache  # tracing the constructor takes a second, and a run asks ten times
def _split(
    config: ModelConfig, stacked: bool, adapters: lora.LoRA = lora.OFF, **options: Any
) -> tuple[Any, nnx.State[Any, Any]]:
    def make() -> Any:
        model = family(config).module(config, rngs=nnx.Rngs(0), stacked=stacked, **options)
        lora.attach(model, adapters)
        return model

    return nnx.split(nnx.eval_shape(make))
