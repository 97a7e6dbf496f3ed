"""The limits of this machine, measured: its matmul peak, and its memory bandwidth for a given number of bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
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


def others(seconds: float = 1.0) -> float | None:
    """Return how many threads of other programs were running on average, during a second; None except on Linux.

    Not the load average, which still counts a benchmark minutes after its end.
    """
    counts, file = [], Path("/proc/loadavg")
    if not file.exists():
        return None
    for _ in range(20):
        time.sleep(seconds / 20)
        counts.append(int(file.read_text().split()[3].split("/")[0]) - 1)  # this thread is one
    return sum(counts) / len(counts)


def doubts(other: float | None, peaks: tuple[float, float], spread: float) -> list[str]:
    """Return why a measurement should not be believed, in a few words each.

    Args:
      other: what `others` returned before it. peaks: FLOP/s before and after it.
      spread: the slowest of its rounds over the fastest.
    """
    reasons = []
    if other is not None and other >= 0.5:
        reasons.append(f"{other:.1f} other threads were running")
    change = peaks[1] / peaks[0] - 1
    if abs(change) >= 0.1:
        reasons.append(f"the peak changed by {change:+.0%}")
    if spread >= 1.3:
        reasons.append(f"the slowest round took {spread:.1f} times the fastest")
    return reasons
