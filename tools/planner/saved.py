"""What the backward pass of an update keeps per row: read off the traced function, and of an MLP by its shapes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from xpo_jax.algorithm.logps import packed_logps
from xpo_jax.algorithm.packing import CANDIDATES, Packer
from xpo_jax.models import registry
from xpo_jax.models.attention_kernels import BLOCKS, CUDNN, ONLY_EINSUM, Kernels
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.lora import OFF, LoRA, join

param_shapes = functools.cache(registry.param_shapes)


def trained_shapes(model: ModelConfig, lora: LoRA) -> Any:
    """Return the tree of the weights that are trained, float32 with stacked layers."""
    return lora.trained(registry.abstract_model(model, stacked=True, adapters=lora)[1])


@functools.cache
def saved_bytes(
    model: ModelConfig,
    width: int,
    dtype: Any,
    remat: bool,
    kernels: Kernels = ONLY_EINSUM,
    lora: LoRA = OFF,
) -> int:
    """Return the bytes per row of slots that the forward pass saves for the backward pass of the update.

    These are the residuals of jax.vjp; the difference between two rows and one leaves out the weights among them.
    cuDNN's kernel is counted as blocks, because it cannot be traced without cuDNN.
    """
    kernel = kernels.at(width)
    traceable = Kernels(*[BLOCKS if kernel == CUDNN else kernel] * 2)
    options: dict[str, Any] = {"kernels": traceable, "adapters": lora}
    graphdef, shapes = registry.abstract_model(model, stacked=True, remat=remat, **options)

    def residuals(rows: int) -> int:
        pack = Packer(rows, (width,), shards=1)

        def backward(params: Any, frozen: Any, packed: Any) -> Any:
            def logps(params: Any) -> Any:
                weights = jax.tree.map(lambda p: p.astype(dtype), join(frozen, params))
                options: dict[str, Any] = {
                    "temperature": 1.0,
                    "vocab_size": model.vocab_size,
                    "chunk_tokens": 1,
                    "entropy_gradient": False,
                    "table_gradient": not lora.rank,
                }
                return packed_logps(
                    graphdef, weights, packed, CANDIDATES * pack.pairs_per_shard(width), **options
                ).logps

            return jax.vjp(logps, params)[1]

        saved = jax.eval_shape(backward, lora.trained(shapes), lora.frozen(shapes), pack.shapes(width))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))

    return residuals(2) - residuals(1)


def recomputed_layer(model: ModelConfig, width: int, dtype: Any, kernels: Kernels, lora: LoRA = OFF) -> int:
    """Return the bytes per row that remat recomputes at a time: those of one layer."""
    one, two = (
        saved_bytes(dataclasses.replace(model, num_hidden_layers=n), width, dtype, False, kernels, lora)
        for n in (1, 2)
    )
    return two - one


def mlp_gradients(model: ModelConfig, width: int, itemsize: int) -> int:
    """Return the bytes per row of one MLP's backward pass: four arrays of features, one of hidden states."""
    return width * (4 * model.intermediate_size + model.hidden_size) * itemsize
