"""A checksum that shows whether weights are those that they were."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xpo_jax.values import Array, Params


def fingerprint(weights: Params) -> Array:
    """Return u32[], over all bits of the weights and their positions; independent of their sharding.

    It is a sum of integers modulo 2^32, with an odd factor for each position: it detects accidental changes, not
    forgery.
    """
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(weights)):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32 if leaf.dtype.itemsize == 4 else jnp.uint16)
        position = jnp.uint32(number)
        for axis, size in enumerate(leaf.shape):
            position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        factor = (position * jnp.uint32(2654435761)) | jnp.uint32(1)
        total = total + jnp.sum(bits.astype(jnp.uint32) * factor, dtype=jnp.uint32)
    return total
