"""Attention over blocks of queries: the same function as `layers.attention`, in memory linear in the sequence length.

A scan computes the scores of QUERIES queries at a time, against all keys up to the end of their quarter of the sequence
(later keys are masked, see layers.BLOCKS), and a checkpoint per block recomputes them in the backward pass. So the
scores that exist at a time are rows x heads x QUERIES x tokens, and no mask is larger than a block's.

Left out on purpose: blocks of keys with an online softmax. A block of 64 queries against 32,768 keys takes 8 MiB per
row and head, which smaller micro-batches and `layout.prefill_rows` bound, and another order of the sums would be a
second set of bits.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from xpo_jax.models.layers import BLOCKS, Array, Causal, Parts, Segment, attention, narrow, wide

QUERIES = 64  # per block; on a CPU 128 are slower, because their scores leave the cache


def attend_in_blocks(q: Array, keys: Causal) -> Array:
    """Compute `layers.attention` over blocks of queries.

    Args:
      q, keys: as in `layers.attention`; the mask of packed rows as `Parts`, from which each block computes its own.
    """
    B, C, T, N, H = q.shape
    count = -(-T // QUERIES)
    size = -(-T // count)  # of a block; the last one may be padded
    # the sums of a key's gradient over the blocks are in float32, and rounded once
    k, v = (x.astype(wide(q.dtype)) for x in (keys.k, keys.v))

    def blocks(x: Array, axis: int) -> Array:
        """Move blocks of an axis of T queries to the front."""
        x = jnp.pad(x, [(0, count * size - T if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    positions = jnp.arange(count * size).reshape(count, size)
    of_queries = None if keys.mask is None else jax.tree.map(lambda x: blocks(x, 1), keys.mask)
    inputs = blocks(q, 2), positions, of_queries
    out = []
    for begin, end in itertools.pairwise(count * quarter // BLOCKS for quarter in range(BLOCKS + 1)):
        if begin == end:
            continue
        last = min(end * size, T)
        seen_k, seen_v = k[..., :last, :], v[..., :last, :]
        of_keys = None if keys.mask is None else jax.tree.map(lambda x, last=last: x[:, :last], keys.mask)

        def block(
            carry: tuple[()],
            inputs: tuple[Array, Array, Parts | None],
            k: Array = seen_k,
            v: Array = seen_v,
            of_keys: Parts | None = of_keys,
        ) -> tuple[tuple[()], Array]:
            q, positions, of_queries = inputs
            mask = (positions[:, None] >= jnp.arange(k.shape[-2]))[None, None]
            if of_queries is not None and of_keys is not None:
                mask &= of_queries.attends_to(of_keys)[:, None]
            return carry, attention(q, (Segment(narrow(k, q.dtype), narrow(v, q.dtype), mask),))

        of_quarter = jax.tree.map(lambda x, begin=begin, end=end: x[begin:end], inputs)
        # no need to prevent common subexpressions: the forward and the backward pass are loops of their own
        out.append(jax.lax.scan(jax.checkpoint(block, prevent_cse=False), (), of_quarter)[1])
    return jnp.moveaxis(jnp.concatenate(out), 0, 2).reshape(B, C, count * size, N, H)[:, :, :T]
