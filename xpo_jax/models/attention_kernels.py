"""Which implementation computes attention: the einsum of layers.py, blocks of queries, or a library's kernel.

The einsum holds float32 scores of rows x heads x tokens x tokens, also for the backward pass of every layer that is not
rematerialised. Blocks of queries (attention_blocks.py) hold those of one block, on every backend. cuDNN's kernel stores
none; a mask that is not simply causal takes two bytes for rows x tokens x tokens, once for all heads. The splash kernel
of TPUs (attention_splash.py) stores neither.

Left out on purpose: decoding, whose single query has few scores; a custom kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as PS

from xpo_jax.models.attention_blocks import attend_in_blocks
from xpo_jax.models.attention_splash import BLOCK, attend_by_splash, splash_order, splash_runs
from xpo_jax.models.layers import Array, Causal, Parts, Runs, Segment, attention
from xpo_jax.runtime.sharding import ROWS, device_platform

AUTO, EINSUM, BLOCKS, CUDNN, SPLASH = "auto", "einsum", "blocks", "cudnn", "splash"

# Tokens up to which "auto" takes the einsum. By default a prompt of 1,024 and two responses of 128: its scores are
# small until there, and these runs compute the bits that they computed before there were blocks. On TPUs what is
# shorter than a block of splash: beyond, the compiler keeps more or fewer copies of the scores than a plan can foresee.
EINSUM_TOKENS, EINSUM_TOKENS_TPU = 1280, BLOCK - 1
# What "auto" takes for longer sequences, by the platform of the mesh's devices: the first that they can run.
LONG = {"cpu": (BLOCKS,), "gpu": (CUDNN, BLOCKS), "tpu": (SPLASH, BLOCKS)}
PINNED = ("gpu", "tpu")  # platforms of `Kernels.pin_caches`
FUSED = ("gpu",)  # platforms of `Kernels.fuse_rows`


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementation by sequence length: `short` up to `short_tokens` tokens, `long` beyond.

    `pin_caches` makes a prefill compute the keys and values that it returns with their layer. Otherwise XLA's compilers
    for GPUs and TPUs take them from the layers' projections at the end, and hold all of these until then.
    `fuse_rows` writes what reduces over a row, the einsum's softmax and the norms, in a form of which XLA's compiler
    for GPUs makes one kernel each; the compiler for TPUs needs more cycles for it.
    """

    short: str = EINSUM
    long: str = EINSUM
    short_tokens: int = EINSUM_TOKENS
    pin_caches: bool = False
    fuse_rows: bool = False

    def at(self, tokens: int) -> str:
        """Return the implementation for sequences of this many tokens."""
        return self.short if tokens <= self.short_tokens else self.long


ONLY_EINSUM = Kernels()


def choose(
    name: str, platform: str, *, device: Any = None, dtype: Any = jnp.bfloat16, head_dim: int = 8
) -> Kernels:
    """Return the implementations that a config's `model.attention` names.

    "auto" takes the einsum for sequences of at most EINSUM_TOKENS tokens (on TPUs EINSUM_TOKENS_TPU), and beyond that
    the first of those that LONG names for the platform of the mesh's devices, and that these can run. The length is
    that of a program, a bucket of prompts or a sequence length of the update, so scoring and the update of the same
    rows compute the same bits.

    Args:
      device: one of the mesh; None, as in a plan, for the newest of its platform.
      dtype, head_dim: of the model, see `check`.

    Raises:
      ValueError: "auto" on a platform that LONG lacks.
    """
    options = {"pin_caches": platform in PINNED, "fuse_rows": platform in FUSED}
    if name != AUTO:
        return Kernels(name, name, **options)
    if platform not in LONG:
        raise ValueError(
            f"model.attention 'auto' has no rule for devices of platform {platform!r}; set it to {BLOCKS!r} or"
            f" {EINSUM!r}"
        )
    long = next(kernel for kernel in LONG[platform] if not missing(kernel, device, dtype, head_dim))
    short_tokens = EINSUM_TOKENS_TPU if long == SPLASH else EINSUM_TOKENS
    return Kernels(EINSUM, long, short_tokens, **options)


def choose_for(name: str, device: Any, *, dtype: Any, head_dim: int) -> Kernels:
    """Return the implementations that `choose` selects for a device that is there."""
    return choose(name, device_platform(device), device=device, dtype=dtype, head_dim=head_dim)


def check(kernel: str, device: Any, *, dtype: Any, head_dim: int) -> None:
    """Raise ValueError if a device of the mesh, or a model that computes in `dtype`, cannot use the kernel."""
    if wanted := missing(kernel, device, dtype, head_dim):
        raise ValueError(f"model.attention {kernel!r} needs {wanted}; set it to 'auto' or 'blocks'")


def missing(kernel: str, device: Any, dtype: Any, head_dim: int) -> str:
    """Return what a kernel needs and does not have here, or ""; a device of None has everything."""
    if kernel == SPLASH and device is not None and device.platform != "tpu":
        return f"a TPU, and this backend is {device.platform}"
    if kernel != CUDNN:
        return ""
    if device is not None:
        # the compiler of a topology that is not attached has the device's name for its version
        described = f"{device.client.platform_version} {device.device_kind}".lower()
        if "cuda" not in described and "nvidia" not in described:
            return f"an NVIDIA GPU, and this backend is {device.platform}"
        if tuple(int(part) for part in device.compute_capability.split(".")) < (8, 0):
            return f"a GPU of compute capability 8.0 or more, and this one has {device.compute_capability}"
    if np.dtype(dtype) != jnp.bfloat16:
        return f"model.dtype bfloat16, and it is {np.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"heads of a multiple of 8 and at most 128 numbers, and this model's have {head_dim}"
    return ""


def packed_order(kernel: str, parts: Parts) -> Array | None:
    """Return i32[B T], the order in which an implementation takes the slots of packed rows; None for their order."""
    return splash_order(parts) if kernel == SPLASH else None


def packed_mask(kernel: str, parts: Parts) -> Array | Parts | Runs:
    """Return the mask of packed rows as an implementation takes it: one array for all layers, the parts, or runs.

    Args:
      parts: of the slots in the order of `packed_order`.
    """
    if kernel == BLOCKS:
        return parts
    if kernel == SPLASH:
        return splash_runs(parts)
    tokens = parts.part.shape[1]
    return (parts.attends_to(parts) & jnp.tril(jnp.ones((1, tokens, tokens), bool)))[:, None]


def attend(
    kernel: str, q: Array, segments: tuple[Segment, ...] | Causal, *, fuse_rows: bool = False
) -> Array:
    """Compute `layers.attention`, by the implementation `kernel` where the keys are the queries' own (`Causal`).

    Decoding attends to other keys, and always takes the einsum. On a mesh each device computes its own rows and heads;
    nothing is left to the compiler's partitioner.
    """
    if kernel == EINSUM or not isinstance(segments, Causal):
        return attention(q, segments, fuse_rows=fuse_rows)
    function = {BLOCKS: attend_in_blocks, CUDNN: cudnn, SPLASH: attend_by_splash}[kernel]
    if jax.sharding.get_abstract_mesh().empty:
        return function(q, segments)
    of_kv: Any = PS(ROWS, None, "tensor")
    of_mask: Any = jax.tree.map(lambda _: PS(ROWS), segments.mask)
    specs = (PS(ROWS, None, None, "tensor"), Causal(of_kv, of_kv, of_mask))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(q, segments)


def cudnn(q: Array, keys: Causal, implementation: Literal["cudnn", "xla"] = "cudnn") -> Array:
    """Compute `layers.attention` by cuDNN's kernel.

    Every pass calls the same kernel, the one that stores the sums of its softmax for a gradient, whether or not a
    gradient follows. cuDNN has another one for inference; by it, scoring might round differently from the update.

    Args:
      q, keys: as in `layers.attention`; one device's rows and heads.
      implementation: "xla" computes the same on any backend and dtype; it saves no memory.
    """
    assert not isinstance(keys.mask, Parts | Runs)
    B, C, T, N, H = q.shape
    k, v = (x.reshape(B * C, -1, T, H).swapaxes(1, 2) for x in (keys.k, keys.v))

    def pad(x: Array, *axes: int) -> Array:
        # training requires even lengths, and rows of a mask should start at multiples of 16 bytes
        return jnp.pad(x, [(0, -T % 8 * (i in axes)) for i in range(4)])

    mask = None if keys.mask is None else pad(jnp.repeat(keys.mask, C, axis=0), 2, 3)
    out = _dot_product(implementation, pad(q.reshape(B * C, T, N, H), 1), pad(k, 1), pad(v, 1), mask)
    return out[:, :T].reshape(B, C, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot_product(implementation: Any, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Return causal attention [B T N H] of q [B T N H], k and v [B T K H], with a mask bool[B 1 T T]."""
    return _with_pullback(implementation, q, k, v, mask)[0]


def _with_pullback(
    implementation: Any, q: Array, k: Array, v: Array, mask: Array | None
) -> tuple[Array, Any]:
    function = functools.partial(
        jax.nn.dot_product_attention, mask=mask, is_causal=True, implementation=implementation
    )
    out, pullback = jax.vjp(function, q, k, v)
    return out, pullback


def _pull_back(implementation: Any, pullback: Any, gradient: Array) -> tuple[Any, ...]:
    return (*pullback(gradient), None)


_dot_product.defvjp(_with_pullback, _pull_back)
