"""Random queries, keys and values, and rows packed at random, for the tests of attention."""

import jax.numpy as jnp
import numpy as np

from xpo_jax.models.layers import Parts


def arrays(*shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def packed_parts(B, T):
    """Rows of prompts of a random length, each with two responses; the last tenth of a row is empty."""
    rng, rows = np.random.default_rng(1), []
    for _ in range(B):
        part, prompt, number = [], [], 0
        while len(part) < T:
            for candidate, length in enumerate(rng.integers(1, max(2, T // 5), 3)):
                part += [number + candidate] * length
                prompt += [number] * length
            number += 3
        rows.append((part[:T], prompt[:T]))
    part, prompt = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    part[:, T - T // 10 :] = prompt[:, T - T // 10 :] = -1
    return Parts(jnp.asarray(part), jnp.asarray(prompt))


def queries_keys_values(B, C, T, N, K, H, dtype):
    return arrays((B, C, T, N, H), (B, C, K, T, H), (B, C, K, T, H), dtype=dtype)
