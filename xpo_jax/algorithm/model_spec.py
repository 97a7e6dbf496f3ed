"""The architecture that policy and reference share, in both layouts, and how its arrays are split over a mesh.

Training holds all layers in one array each (`params`, float32); sampling and scoring hold one array per layer in the
compute dtype (`weights`). Nothing is allocated here: the trees are of ShapeDtypeStructs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xpo_jax.models import attention_kernels, registry
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.layers import KEY_VALUES, narrow
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
      stacked, unstacked: the graphdefs of the two layouts.
      params, weights: the parameters in these layouts, as ShapeDtypeStructs.
      params_sharding, weights_sharding: a NamedSharding for each.
      kernels: which implementations compute attention.
    """

    # long: two layouts of one model, each with graphdef, shapes and shardings
    mesh: Mesh
    config: ModelConfig
    dtype: np.dtype
    stacked: Any
    unstacked: Any
    params: Params
    weights: Params
    params_sharding: Any
    weights_sharding: Any
    kernels: attention_kernels.Kernels

    @property
    def shards(self) -> int:
        """G, the groups of devices that a batch is split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(self.params))

    def for_sampling(self, params: Params) -> Params:
        """Cast stacked master weights to the compute dtype, unstack them, and gather what fsdp splits."""
        unstacked = registry.family(self.config).unstack(params)
        if self.mesh.shape["fsdp"] == 1:
            return jax.tree.map(lambda p: narrow(p, self.dtype), unstacked)
        leaves, tree = jax.tree.flatten(unstacked)
        splits = jax.tree.leaves(self.weights_sharding)
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


def make_model_spec(
    mesh: Mesh,
    config: ModelConfig,
    *,
    dtype: Any,
    remat: bool,
    batch_size: int,
    prompt_tokens: int,
    attention: str = attention_kernels.AUTO,
) -> ModelSpec:
    """Build the spec of an architecture.

    Args:
      mesh, config, dtype: see `ModelSpec`.
      remat: recompute layers in the backward pass.
      batch_size, prompt_tokens: of the largest batch of prompts, whose keys and values the mesh must divide as well.
      attention: `settings.Model.attention`, see models/attention_kernels.py.

    Raises:
      ValueError: a mesh that does not divide the model, with the sizes that would; or no rule for "auto" attention.
    """
    device = mesh.devices.flat[0]
    kernels = attention_kernels.choose_for(attention, device, dtype=dtype, head_dim=config.head_dim)
    stacked, params = registry.abstract_model(config, stacked=True, remat=remat, kernels=kernels)
    unstacked, weights = registry.abstract_model(config, stacked=False, kernels=kernels)
    weights = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), weights)
    rules = (("key_values", KEY_VALUES), *registry.family(config).sharding)
    key_values = jax.ShapeDtypeStruct(
        (batch_size, config.num_key_value_heads, prompt_tokens, config.head_dim), dtype
    )
    # in one call, so that the error lists the mesh sizes that would work for all arrays
    params_sharding = sharding.shardings(mesh, {**params, "key_values": key_values}, rules)
    del params_sharding["key_values"]  # the model itself pins them
    return ModelSpec(
        mesh=mesh,
        config=config,
        dtype=np.dtype(dtype),
        stacked=stacked,
        unstacked=unstacked,
        params=params,
        weights=weights,
        params_sharding=params_sharding,
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
