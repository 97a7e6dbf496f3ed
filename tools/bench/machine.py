"""The limits of this machine, measured: its matmul peak, and its memory bandwidth for a given number of bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def best_of(run: Callable[[], Any], times: int) -> float:
    """Return the seconds of the fastest of several calls, not counting the first, which compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def peak_flops(dtype: Any) -> float:
    """Return the FLOP/s of a square matmul, a multiplication and an addition being two."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    matmul = jax.jit(lambda a: a @ a)
    return 2 * n**3 / best_of(lambda: matmul(a), 21)


def bandwidth(size: int) -> float:
    """Return the bytes/s, read and written, of copying `size` bytes onto themselves.

    The size matters: on a CPU the weights of a small model stay in the cache, which is faster than memory. Beyond
    256 MiB it does not.
    """
    # donated: page faults on a new allocation would take longer than the copy
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jnp.zeros(min(size, 2**28) // 4, jnp.float32)

    def copied() -> Any:
        nonlocal array
        array = copy(array)
        return array

    return 2 * array.nbytes / best_of(copied, 21)
