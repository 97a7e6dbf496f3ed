"""The device mesh, and ordered (pattern -> mesh axes) rules that say how a tree is split over it.

Three axes: `data` splits the batch only, `fsdp` splits the batch and the master weights, `tensor` splits
heads and features. Rules live with each model family, as data; a parameter that no rule covers is an
error. Multi-process start-up is `distributed.py`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

AXES = ("data", "fsdp", "tensor")
BATCH = PS(("data", "fsdp"))

Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh over all devices.

    Args:
      data, fsdp, tensor: sizes of the axes; one of them may be -1 and takes the devices that are left.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, tensor], jax.device_count()
    free = [i for i, size in enumerate(sizes) if size == -1]
    known = int(np.prod([size for size in sizes if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh: sizes are positive and at most one is -1, not {dict(zip(AXES, sizes, strict=True))}"
        )
    if free and devices % known == 0:
        sizes[free[0]] = devices // known
    if int(np.prod(sizes)) != devices:
        raise ValueError(
            f"mesh: {' x '.join(f'{a} {s}' for a, s in zip(AXES, sizes, strict=True))} is not the {devices}"
            " device(s) here; the sizes must multiply to that, and one of them may be -1 to fill up"
        )
    # Auto axes: XLA propagates shardings; jax.make_mesh's default would make every op state its own.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def paths(tree: Any) -> Any:
    """The same tree with each leaf replaced by its dotted path."""
    dotted = lambda path, _: ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)  # noqa: E731
    return jax.tree_util.tree_map_with_path(dotted, tree)


def shardings(mesh: Mesh, tree: Any, rules: Rules, *, leave_out: Sequence[str] = ()) -> Any:
    """A NamedSharding for every leaf of `tree`, from the first rule whose pattern is found in its path.

    Args:
      tree: arrays or ShapeDtypeStructs. A leaf with fewer axes than its rule takes the rule's last ones
        (the same layer, unstacked); scalars are replicated.
      rules: ordered (pattern, mesh axis or None for each array axis).
      leave_out: mesh axes to ignore, for example ("fsdp",) for sampling.

    Raises:
      ValueError: leaves that no rule covers, or axes that their mesh axes do not divide; all are listed.
    """
    problems: list[str] = []

    def one(path: str, leaf: Any) -> NamedSharding:
        ndim = len(leaf.shape)
        spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
        if ndim == 0:
            return NamedSharding(mesh, PS())
        if spec is None:
            problems.append(f"no sharding rule covers {path} {leaf.shape}")
            return NamedSharding(mesh, PS())
        if ndim > len(spec):
            problems.append(f"{path}: its rule has {len(spec)} axes, it has {ndim}")
            return NamedSharding(mesh, PS())
        axes = [None if axis in leave_out else axis for axis in spec[-ndim:]]
        for size, axis in zip(leaf.shape, axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                problems.append(f"{path}: {size} is not divisible by mesh.{axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, PS(*axes))

    result = jax.tree.map(one, paths(tree), tree)
    if problems:
        raise ValueError(
            "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        )
    return result


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree, from shapes alone.

    Args:
      tree: arrays or ShapeDtypeStructs.
      shardings: a sharding for each leaf, as `shardings` returns them.
    """
    of = lambda leaf, split: math.prod(split.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize  # noqa: E731
    return sum(jax.tree.leaves(jax.tree.map(of, tree, shardings)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PS())


def batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of an array whose axis number `axis` is the batch."""
    return NamedSharding(mesh, PS(*([None] * axis), *BATCH))
