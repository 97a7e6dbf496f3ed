"""What tools.bench.device_check measures: the device itself, attention kernels, and training steps, long prompts too.

Each part runs in its own process, so that its peak of memory is its own, and so that a crash ends only that part.

Left out on purpose: limits on speed. A part fails for wrong numbers, a recompilation, or memory beyond the plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tools.bench import machine
from tools.bench.device_scale import FULL, Record, Scale, kernels, memory
from tools.bench.device_training import train, train_long
from tools.bench.workload import SEED
from tools.planner.hardware import by_kind
from xpo_jax.algorithm.model_spec import compute_dtype
from xpo_jax.models import attention_kernels
from xpo_jax.models.layers import Causal, Parts

ERROR_OF_EINSUM = 1.5  # times the einsum's own rounding error, which a kernel may have
ROUNDING = {"float32": 1e-5, "bfloat16": 2**-9}  # errors below this are rounding


# ---- the device -----------------------------------------------------------------------------------


def measure_machine(scale: Scale, record: Record) -> None:
    """Record what the device is, and its measured peak and bandwidth beside the data sheet's."""
    device, versions = jax.devices()[0], {}
    for name in ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "nvidia-cudnn-cu12"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    record.add(
        platform=device.platform,
        device_kind=device.device_kind,
        devices=jax.device_count(),
        runtime=device.client.platform_version.splitlines()[0],
        versions=versions,
        memory_limit=memory("bytes_limit"),
    )
    dtype = compute_dtype("auto", device.platform)
    size = 2**30 if scale is FULL else 2**20
    peak, bandwidth = machine.peak_flops(dtype), machine.bandwidth(size)
    record.add(dtype=np.dtype(dtype).name, matmul_flops=peak, copy_bandwidth=bandwidth)
    if sheet := by_kind(device.device_kind):
        record.add(data_sheet_flops=sheet.peak_flops, data_sheet_bandwidth=sheet.bandwidth)
        record.add(
            matmul_of_data_sheet=peak / sheet.peak_flops, copy_of_data_sheet=bandwidth / sheet.bandwidth
        )


# ---- attention --------------------------------------------------------------------------------------


def compare_attention(scale: Scale, record: Record) -> None:
    """Compare every kernel, forward and backward, with the einsum in float32; for prompts and for packed rows."""
    dtype = compute_dtype("auto", jax.devices()[0].platform)
    for model, config in scale.models.items():
        N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        names, refused = kernels(H)
        record.add(**{f"{model} refused": refused})
        B, T, rng = scale.attention_rows, scale.long_tokens, np.random.default_rng(SEED)
        shapes = ((B, 1, T, N, H), *[(B, 1, K, T, H)] * 2, (B, 1, T, N, H))
        *given, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
        for rows, parts in {"prompts": None, "packed rows": packed_parts(B, T)}.items():
            with jax.default_matmul_precision("highest"):
                wide = [x.astype(jnp.float32) for x in given]
                exact = _gradients(attention_kernels.EINSUM, parts, weights)(*wide)
            errors = {}
            for name in names:
                function = _gradients(name, parts, weights)
                errors[name] = [_error(x, y) for x, y in zip(function(*given), exact, strict=True)]
                seconds = machine.best_of(functools.partial(function, *given), 5)
                label = f"{model} {rows} {name}"
                record.add(
                    **{label: {"ms": 1e3 * seconds, "errors": dict(zip("oqkv", errors[name], strict=True))}}
                )
                for array, error, usual in zip(
                    "oqkv", errors[name], errors[attention_kernels.EINSUM], strict=True
                ):
                    limit = max(ERROR_OF_EINSUM * usual, ROUNDING[np.dtype(dtype).name])
                    record.check(
                        f"error of {label}, {'output' if array == 'o' else f'd{array}'}", error, limit
                    )


def packed_parts(B: int, T: int) -> Parts:
    """Return the parts of rows with a prompt of half of the slots and two responses, then empty slots."""
    ends = T // 2, T // 2 + T // 5, T - T // 10
    part = np.searchsorted(ends, np.arange(T), side="right")
    part, prompt = np.where(part == 3, -1, part), np.where(part == 3, -1, 0)
    return Parts(*(jnp.asarray(np.tile(x, (B, 1)), jnp.int32) for x in (part, prompt)))


def _gradients(name: str, parts: Parts | None, weights: Any) -> Callable[..., Any]:
    """Return the compiled function of q, k and v whose results are attention and three gradients of a weighted sum."""
    order = None if parts is None else attention_kernels.packed_order(name, parts)

    def ordered(x: Any, axis: int, slots: Any = order) -> Any:
        """Take the slots on an axis in an implementation's order."""
        return x if slots is None else jnp.take_along_axis(x, _along(slots, x.ndim, axis), axis)

    mask = None
    if parts is not None:
        mask = attention_kernels.packed_mask(name, jax.tree.map(lambda x: ordered(x, 1), parts))
    valid = 1.0 if parts is None else (parts.part >= 0)[:, None, :, None, None]

    def weighted(q: Any, k: Any, v: Any) -> Any:
        out = attention_kernels.attend(name, ordered(q, 2), Causal(ordered(k, 3), ordered(v, 3), mask))
        out = out if order is None else ordered(out, 2, jnp.argsort(order, axis=1))
        out = jnp.where(valid, out.astype(jnp.float32), 0.0)  # nothing reads what stands in empty slots
        return jnp.sum(out * weights.astype(jnp.float32)), out

    gradients = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))

    def run(q: Any, k: Any, v: Any) -> list[Any]:
        (dq, dk, dv), out = gradients(q, k, v)
        return [out, dq, dk, dv]

    return run


def _along(slots: Any, dimensions: int, axis: int) -> Any:
    """Return i32[B T] with axes of 1, for `take_along_axis` on an axis of an array whose first axis is B."""
    return slots.reshape(
        [slots.shape[{0: 0, axis: 1}[i]] if i in (0, axis) else 1 for i in range(dimensions)]
    )


def _error(measured: Any, exact: Any) -> float:
    """Return the relative error in the Euclidean norm."""
    measured, exact = (np.asarray(x, np.float64) for x in (measured, exact))
    return float(np.linalg.norm(measured - exact) / np.linalg.norm(exact))


PARTS: dict[str, Callable[[Scale, Record], None]] = {
    "machine": measure_machine,
    "attention": compare_attention,
    "0.5B": functools.partial(train, "0.5B"),
    "1.5B": functools.partial(train, "1.5B"),
    "long prompts": train_long,
}
