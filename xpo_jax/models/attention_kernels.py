"""Attention by a library's kernel: the same function as `layers.attention`, in less memory.

The einsum holds float32 scores of rows x heads x tokens x tokens, also for the backward pass of every layer that is not
rematerialised. cuDNN's kernel stores none; a mask that is not simply causal takes two bytes for rows x tokens x tokens,
once for all heads.

Left out on purpose: decoding, whose single query has few scores; the splash kernel for TPUs, which supports causal
masks and segments but not rows in which two responses attend to one prompt and not to each other; a custom kernel.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as PS

from xpo_jax.models.layers import Array, Causal, Segment, attention
from xpo_jax.runtime.sharding import ROWS

EINSUM = "einsum"


def check(kernel: str, device: Any, *, dtype: Any, head_dim: int) -> None:
    """Raise ValueError if a device of the mesh, or a model that computes in `dtype`, cannot use the kernel."""
    if kernel == EINSUM:
        return
    wanted = ""
    if "cuda" not in device.client.platform_version.lower():
        wanted = f"an NVIDIA GPU, and this backend is {device.platform}"
    elif tuple(int(part) for part in device.compute_capability.split(".")) < (8, 0):
        wanted = f"a GPU of compute capability 8.0 or more, and this one has {device.compute_capability}"
    elif np.dtype(dtype) != jnp.bfloat16:
        wanted = f"model.dtype bfloat16, and it is {np.dtype(dtype).name}"
    elif head_dim % 8 or head_dim > 128:
        wanted = f"heads of a multiple of 8 and at most 128 numbers, and this model's have {head_dim}"
    if wanted:
        raise ValueError(f"model.attention 'cudnn' needs {wanted}; set it to 'einsum'")


def attend(kernel: str, q: Array, segments: tuple[Segment, ...] | Causal) -> Array:
    """Compute `layers.attention`, with the kernel that the config names if queries attend to their row's keys.

    On a mesh each device calls the kernel for its own rows and heads; nothing is left to the compiler's partitioner.
    """
    if kernel == EINSUM or not isinstance(segments, Causal):
        return attention(q, segments)
    if jax.sharding.get_abstract_mesh().empty:
        return cudnn(q, segments)
    of_kv: Any = PS(ROWS, None, "tensor")
    of_mask: Any = None if segments.mask is None else PS(ROWS)
    specs = (PS(ROWS, None, None, "tensor"), Causal(of_kv, of_kv, of_mask))
    return jax.shard_map(cudnn, in_specs=specs, out_specs=specs[0], check_vma=False)(q, segments)


def cudnn(q: Array, keys: Causal, implementation: Literal["cudnn", "xla"] = "cudnn") -> Array:
    """Compute `layers.attention` by cuDNN's kernel.

    Args:
      q, keys: as in `layers.attention`; one device's rows and heads.
      implementation: "xla" computes the same on any backend and dtype; it saves no memory.
    """
    B, C, T, N, H = q.shape
    k, v = (x.reshape(B * C, -1, T, H).swapaxes(1, 2) for x in (keys.k, keys.v))

    def pad(x: Array, *axes: int) -> Array:
        # training requires even lengths, and rows of a mask should start at multiples of 16 bytes
        return jnp.pad(x, [(0, -T % 8 * (i in axes)) for i in range(4)])

    out = jax.nn.dot_product_attention(
        pad(q.reshape(B * C, T, N, H), 1),
        pad(k, 1),
        pad(v, 1),
        mask=None if keys.mask is None else pad(jnp.repeat(keys.mask, C, axis=0), 2, 3),
        is_causal=True,
        implementation=implementation,
    )
    return out[:, :T].reshape(B, C, T, N, H)
