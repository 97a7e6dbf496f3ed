"""The architecture that policy and reference share, in both layouts, and how its arrays are split over a mesh.

Training holds all layers in one array each (`params`, float32); sampling and scoring hold one array per layer in the
compute dtype (`weights`). With adapters, the weights that are not trained, the base, are held in the second form alone,
and policy and reference share their arrays; an update reads a stacked copy (`frozen`), which exists while it runs.
Nothing is allocated here: the trees are of ShapeDtypeStructs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xpo_jax.models import attention_kernels, registry
from xpo_jax.models import lora as adapters
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.layers import KEY_VALUES, narrow
from xpo_jax.models.lora import LoRA
from xpo_jax.runtime import sharding
from xpo_jax.values import Params

GATHERED = 4  # arrays that `for_sampling` gathers at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One architecture on one mesh.

    Args:
      mesh: see `sharding.make_mesh`.
      config: its shapes.
      dtype: of all computation but the master weights, the sums and the optimizer.
      lora: which weights are trained.
      stacked, unstacked: the graphdefs of the two layouts.
      params: the trained weights, stacked and float32, as ShapeDtypeStructs.
      frozen: the others, stacked, in `dtype`; {} where all are trained.
      weights: all weights, unstacked, in `dtype`.
      params_sharding, frozen_sharding, weights_sharding: a NamedSharding for each.
      kernels: which implementations compute attention.
    """

    # long: two layouts of one model, each with graphdef, shapes and shardings
    mesh: Mesh
    config: ModelConfig
    dtype: np.dtype
    lora: LoRA
    stacked: Any
    unstacked: Any
    params: Params
    frozen: Params
    weights: Params
    params_sharding: Any
    frozen_sharding: Any
    weights_sharding: Any
    kernels: attention_kernels.Kernels

    @property
    def shards(self) -> int:
        """G, the groups of devices that a batch is split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def parameters(self) -> int:
        """The number of the model's weights, without adapters."""
        return _count(self.frozen or self.params)

    @property
    def trained_parameters(self) -> int:
        """The number of weights that are trained."""
        return _count(self.params)

    @property
    def model_sharding(self) -> Any:
        """A NamedSharding for each of the model's weights, unstacked, without adapters."""
        return self.lora.frozen(self.weights_sharding) or self.weights_sharding

    def stack(self, base: Params) -> Params:
        """Stack the layers of weights that are not trained: the base, unstacked, becomes `frozen`."""
        layers = base["layers"]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[i] for i in sorted(layers)))
        return {**base, "layers": stacked}

    def for_sampling(self, params: Params) -> Params:
        """Cast stacked master weights to the compute dtype, unstack them, and gather what fsdp splits."""
        unstacked = registry.family(self.config).unstack(params)
        if self.mesh.shape["fsdp"] == 1:
            return jax.tree.map(lambda p: narrow(p, self.dtype), unstacked)
        leaves, tree = jax.tree.flatten(unstacked)
        splits = jax.tree.leaves(self.lora.trained(self.weights_sharding))
        weights: list[Any] = [None] * len(leaves)
        order = sorted(range(len(leaves)), key=lambda i: leaves[i].size)
        for number, i in enumerate(order):
            leaf = leaves[i]
            if number >= GATHERED:  # otherwise a TPU's scheduler gathers all arrays before it writes a result
                previous = order[number - GATHERED]
                leaf, weights[previous] = jax.lax.optimization_barrier((leaf, weights[previous]))
            gathered = jax.lax.with_sharding_constraint(narrow(leaf, self.dtype), splits[i])
            # a second time, which changes nothing: XLA copies what it gathers to a result, and this is that copy
            weights[i] = narrow(gathered, self.dtype)
        return jax.tree.unflatten(tree, weights)


def _count(tree: Params) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def make_model_spec(
    mesh: Mesh,
    config: ModelConfig,
    *,
    dtype: Any,
    remat: bool,
    batch_size: int,
    prompt_tokens: int,
    attention: str = attention_kernels.AUTO,
    lora: LoRA = adapters.OFF,
) -> ModelSpec:
    """Build the spec of an architecture.

    Args:
      mesh, config, dtype: see `ModelSpec`.
      remat: recompute layers in the backward pass.
      batch_size, prompt_tokens: of the largest batch of prompts, whose keys and values the mesh must divide as well.
      attention: `settings.Model.attention`, see models/attention_kernels.py.
      lora: which weights are trained; all by default.

    Raises:
      ValueError: a mesh that does not divide the model, with the sizes that would; no rule for "auto" attention; or
        a target of `lora` that the model does not have.
    """
    device = mesh.devices.flat[0]
    kernels = attention_kernels.choose_for(attention, device, dtype=dtype, head_dim=config.head_dim)
    options: dict[str, Any] = {"kernels": kernels, "adapters": lora}
    stacked, params = registry.abstract_model(config, stacked=True, remat=remat, **options)
    unstacked, weights = registry.abstract_model(config, stacked=False, **options)

    def narrowed(tree: Params) -> Params:
        return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), tree)

    weights = narrowed(weights)
    rules = (("key_values", KEY_VALUES), *adapters.rules(registry.family(config).sharding))
    key_values = jax.ShapeDtypeStruct(
        (batch_size, config.num_key_value_heads, prompt_tokens, config.head_dim), dtype
    )
    # in one call, so that the error lists the mesh sizes that would work for all arrays
    stacked_sharding = sharding.shardings(mesh, {**params, "key_values": key_values}, rules)
    del stacked_sharding["key_values"]  # the model itself pins them
    return ModelSpec(
        mesh=mesh,
        config=config,
        dtype=np.dtype(dtype),
        lora=lora,
        stacked=stacked,
        unstacked=unstacked,
        params=lora.trained(params),
        frozen=narrowed(lora.frozen(params)),
        weights=weights,
        params_sharding=lora.trained(stacked_sharding),
        frozen_sharding=lora.frozen(stacked_sharding),
        weights_sharding=sharding.shardings(mesh, weights, rules, leave_out=("fsdp",)),
        kernels=kernels,
    )


def compute_dtype(name: str, platform: str) -> Any:
    """Resolve "auto": bfloat16 on accelerators and float32 on CPU, where bfloat16 is slower.

    Args:
      name: "auto", "float32" or "bfloat16".
      platform: of the devices that compute, see `sharding.platform`; not this process's default backend.
    """
    if name == "auto":
        return jnp.float32 if platform == "cpu" else jnp.bfloat16
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
