"""A number that tells whether weights are those that they were."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xpo_jax.values import Array, Params


def fingerprint(weights: Params) -> Array:
    """u32[], over all bits of the weights and their places; the same however they are split over devices.

    A sum of integers modulo 2^32, with an odd factor for each place: it finds what was changed by accident, not what
    somebody forged.
    """
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(weights)):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32 if leaf.dtype.itemsize == 4 else jnp.uint16)
        place = jnp.uint32(number)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        factor = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
        total = total + jnp.sum(bits.astype(jnp.uint32) * factor, dtype=jnp.uint32)
    return total
