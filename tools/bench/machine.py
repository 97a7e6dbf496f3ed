"""What this machine can do, measured: the peak of its matmul, and its bandwidth for so many bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def best_of(run: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of several calls; the first, which compiles, does not count."""
    jax.block_until_ready(run())
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - begun)
    return min(found)


def peak_flops(dtype: Any) -> float:
    """FLOP/s of a square matmul, a multiplication and an addition being two."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    matmul = jax.jit(lambda a: a @ a)
    return 2 * n**3 / best_of(lambda: matmul(a), 21)


def bandwidth(size: int) -> float:
    """Bytes/s, read and written, of a copy of `size` bytes onto itself.

    The size matters: on a CPU the weights of a small model stay in its cache, which is faster than memory. Beyond
    256 MiB it does not.
    """
    copy = jax.jit(
        lambda x: x + 1, donate_argnums=0
    )  # no new memory, whose pages would cost more than the copy
    held = [jnp.zeros(min(size, 2**28) // 4, jnp.float32)]

    def copied() -> Any:
        held[0] = copy(held[0])
        return held[0]

    return 2 * held[0].nbytes / best_of(copied, 21)
