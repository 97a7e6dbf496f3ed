"""What model families share: attention over segments of cached keys, rotary positions, linear maps, SwiGLU.

In bfloat16 a compiler may leave a rounding out, where it fuses two operations and keeps the float32 number in between,
and it fuses differently in programs that differ (scoring, and the gradient of the same pass). Policy and reference with
the same weights would then have different log-probabilities. So every result is rounded explicitly, by `narrow`, which
no compiler removes: the numbers follow from the code.

`attention` is plain einsum; the same by kernels of other backends is in attention_kernels.py.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xpo_jax.models.rope import RopeScaling
from xpo_jax.runtime.sharding import ROWS, constrain

Array = jax.Array


class KV(NamedTuple):
    """Keys and values of one layer (or of all, stacked in front): [B K S H], or [B C K S H]."""

    k: Array
    v: Array


# The mesh axes that split keys and values [B K S H]. `tensor` must divide the heads: one that is spread over
# devices would cost a sum over them for every score.
KEY_VALUES = (ROWS, "tensor", None, None)


def cache(k: Array, v: Array) -> KV:
    """Pin the keys and values [B K S H] of a cache to their shards of the mesh."""
    return KV(constrain(k, *KEY_VALUES), constrain(v, *KEY_VALUES))


class Segment(NamedTuple):
    """Keys that queries may attend to.

    k, v: [B K S H], shared by a prompt's C candidates, or [B C K S H], each candidate's own.
    mask: bool[B|1 1 T|1 S], True where a query attends.
    """

    k: Array
    v: Array
    mask: Array


class Parts(NamedTuple):
    """The part of its row that each position belongs to, and that part's prompt: i32[B T] each, see packing.Packed."""

    part: Array
    prompt: Array

    def attends_to(self, keys: Parts) -> Array:
        """Return bool[B Tq Tk], True where a query (self) and a key are of one part, or the key is in its prompt."""
        return (self.part[:, :, None] == keys.part[:, None]) | (self.prompt[:, :, None] == keys.part[:, None])


class Runs(NamedTuple):
    """The first and the last key that each query attends to: i32[B T] each."""

    first: Array
    last: Array


class Causal(NamedTuple):
    """The keys of the queries themselves, in their order, under a causal mask.

    k, v: [B C K T H]. mask: bool[B 1 T T], False at least above the diagonal; or, for implementations that never hold
    such an array, the parts of packed rows, or the runs of rows in another order, see attention_splash.py; None if it
    is False only above the diagonal.
    """

    k: Array
    v: Array
    mask: Array | Parts | Runs | None


BLOCKS = 4  # of queries; scores of later keys are not computed, which saves 3/8 of a causal attention


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of sums and angles: float32, or float64 if the weights are (gradient tests)."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def narrow(x: Array, dtype: jnp.dtype) -> Array:
    """Round an array to a dtype, in a way that compilers keep; float32 and float64 stay what they are."""
    if dtype == jnp.bfloat16:
        x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def add(x: Array, y: Array) -> Array:
    """Return the sum of two arrays of one dtype, rounded to it by `narrow`."""
    return narrow(x.astype(wide(x.dtype)) + y.astype(wide(x.dtype)), x.dtype)


def attention(q: Array, segments: tuple[Segment, ...] | Causal, *, fuse_rows: bool = False) -> Array:
    """Compute softmax attention over the concatenation of several segments of keys, in float32.

    Args:
      q: [B C T N H].
      segments: their heads are grouped, N = K * G.
      fuse_rows: mask the scores of all segments as one array, see `_joined_scores`; for GPUs.

    Returns:
      [B C T N H] in q's dtype.
    """
    if isinstance(segments, Causal):
        k, v, mask = segments
        assert not isinstance(mask, Parts | Runs)
        if mask is None:
            below = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))
            return attention(q, (Segment(k, v, below[None, None]),), fuse_rows=fuse_rows)
        ends = [q.shape[2] * block // BLOCKS for block in range(BLOCKS + 1)]
        blocks = [
            (q[:, :, i:j], (Segment(k[..., :j, :], v[..., :j, :], mask[..., i:j, :j]),))
            for i, j in itertools.pairwise(ends)
            if i < j
        ]
        return jnp.concatenate([attention(*block, fuse_rows=fuse_rows) for block in blocks], axis=2)
    B, C, T, N, H = q.shape
    K = segments[0].k.shape[-3]
    q = q.reshape(B, C, T, K, N // K, H)
    scores = (_joined_scores if fuse_rows else _scores)(q, segments)
    probs = narrow(jax.nn.softmax(scores, axis=-1), q.dtype)
    out, start = jnp.zeros((), q.dtype), 0
    for k, v, _ in segments:
        equation = "bckgts,bksh->bctkgh" if v.ndim == 4 else "bckgts,bcksh->bctkgh"
        attended = jnp.einsum(equation, probs[..., start : start + k.shape[-2]], v)
        out = add(out, narrow(attended, q.dtype))
        start += k.shape[-2]
    return out.reshape(B, C, T, N, H)


def _scores(q: Array, segments: tuple[Segment, ...]) -> Array:
    """Return the masked scores f32[B C K G T S] of q [B C T K G H]; S counts the keys of all segments."""
    scores = []
    for k, _, mask in segments:
        equation = "bctkgh,bksh->bckgts" if k.ndim == 4 else "bctkgh,bcksh->bckgts"
        score = jnp.einsum(equation, q, k, preferred_element_type=wide(q.dtype)) * q.shape[-1] ** -0.5
        # not -inf: softmax of a row of padding must stay finite
        scores.append(jnp.where(mask[:, :, None, None], score, jnp.finfo(jnp.float32).min))
    return jnp.concatenate(scores, axis=-1)


def _joined_scores(q: Array, segments: tuple[Segment, ...]) -> Array:
    """Return `_scores`, up to the order of a score's sum, in a form of which XLA's GPU compiler makes fewer kernels.

    It computes the softmax of an array in one kernel, with the mask, if the keys are its last axis in memory and
    nothing stands between the products and their concatenation. An einsum whose result's axes are in the order of its
    operands' writes the keys last.
    """
    scores = []
    for k, _, _ in segments:
        if k.ndim == 4:
            score = jnp.einsum("bctkgh,bksh->bkctgs", q, k, preferred_element_type=wide(q.dtype)).swapaxes(
                1, 2
            )
        else:
            score = jnp.einsum("bctkgh,bcksh->bcktgs", q, k, preferred_element_type=wide(q.dtype))
        scores.append(score.swapaxes(3, 4))
    score = jnp.concatenate(scores, axis=-1) * q.shape[-1] ** -0.5
    B, T = q.shape[0], q.shape[2]
    mask = jnp.concatenate([jnp.broadcast_to(m, (B, 1, T, m.shape[-1])) for _, _, m in segments], axis=-1)
    return jnp.where(mask[:, :, None, None], score, jnp.finfo(jnp.float32).min)


def rope_angles(
    positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """Return cosine and sine of the rotary angles, f32[... 1 H/2] for positions i32[...]; the 1 is for heads.

    Args:
      head_dim: H. theta: the rotary base.
      scaling: see rope.py; its magnitude is a factor of both.
    """
    if scaling is None:
        frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    else:
        exact = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        frequency = jnp.asarray(scaling.apply(exact, theta), jnp.float32)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[(None,) * (positions.ndim + 1)]
    if scaling is None:
        return jnp.cos(angle), jnp.sin(angle)
    return jnp.cos(angle) * scaling.magnitude, jnp.sin(angle) * scaling.magnitude


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Apply rotary positions to [... N H] in Hugging Face's layout: the halves of H are the pairs."""
    cos, sin = angles
    first, second = jnp.split(x.astype(wide(x.dtype)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return narrow(turned, x.dtype)


def before(lengths: Array, slots: int) -> Array:
    """Return bool[B 1 1 slots], True for slots below each row's length."""
    return (jnp.arange(slots)[None] < lengths[:, None])[:, None, None]


class RMSNorm(nnx.RMSNorm):
    """flax's, computed in float32.

    `fuse_rows`, for GPUs, scales a row's elements after they are divided by its root mean square. flax multiplies the
    two factors first, of which XLA makes a kernel for the mean and one for the rest.
    """

    fuse_rows: bool = False

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        if self.fuse_rows:
            y = x.astype(wide(x.dtype))
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
            assert self.scale is not None  # none of the models switches it off
            return narrow(y * self.scale[...].astype(y.dtype)[(None,) * (y.ndim - 1)], x.dtype)
        with jax.numpy_dtype_promotion("standard"):  # flax mixes bfloat16 and float32 on purpose
            return narrow(super().__call__(x.astype(wide(x.dtype))), x.dtype)


class Linear(nnx.Linear):
    """flax's, with the product and the sum rounded one after the other, and an adapter beside it once `adapt` ran."""

    lora_scale: float | None = None

    def adapt(self, rank: int, scale: float) -> None:
        """Add an adapter of zeros: the map becomes x W + b + scale (x A) B, with A [D rank] and B [rank F]."""
        *layers, D, F = self.kernel.shape
        self.lora_a = nnx.Param(jnp.zeros((*layers, D, rank)))
        self.lora_b = nnx.Param(jnp.zeros((*layers, rank, F)))
        self.lora_scale = scale

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        y = narrow(jnp.dot(x, self.kernel[...]), x.dtype)
        y = y if self.bias is None else add(y, self.bias[...][(None,) * (y.ndim - 1)])
        if self.lora_scale is None:
            return y
        low = narrow(jnp.dot(x, self.lora_a[...]), x.dtype)
        delta = jnp.dot(low, self.lora_b[...], preferred_element_type=wide(x.dtype))
        return add(y, narrow(self.lora_scale * delta, x.dtype))


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, D: int, F: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(D, F, use_bias=False, rngs=rngs)
        self.up_proj = Linear(D, F, use_bias=False, rngs=rngs)
        self.down_proj = Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = (y.astype(wide(x.dtype)) for y in (self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(narrow(jax.nn.silu(gate) * up, x.dtype))
