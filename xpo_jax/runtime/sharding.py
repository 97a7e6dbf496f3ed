"""The device mesh, and ordered (pattern -> mesh axes) rules for sharding a tree over it.

Three axes: `data` splits only the batch, `fsdp` splits the batch and the master weights, `tensor` splits heads,
features and the vocabulary. Each model family has its rules as data. A leaf that no rule covers is an error, and so is
a size that an axis does not divide: nothing is padded or replicated silently. `distributed.py` starts the processes.
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

from xpo_jax.runtime import backend

AXES = ("data", "fsdp", "tensor")
Axes = tuple[str | tuple[str, ...] | None, ...]
Rules = Sequence[tuple[str, Axes]]

ROWS = ("data", "fsdp")  # the batch is split over both


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """Make the mesh over all devices.

    Args:
      data, fsdp, tensor: sizes of the axes; one of them may be -1 and takes the remaining devices.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or devices that cannot be used.
    """
    backend.start()
    return mesh_over(jax.devices(), data=data, fsdp=fsdp, tensor=tensor)


def mesh_over(devices: Sequence[Any], *, data: int, fsdp: int, tensor: int) -> Mesh:
    """Make a mesh over these devices, which may be those of a topology that is not attached.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    sizes, count = [data, fsdp, tensor], len(devices)
    free = [i for i, size in enumerate(sizes) if size == -1]
    known = int(np.prod([size for size in sizes if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh: sizes are positive and at most one is -1, not {dict(zip(AXES, sizes, strict=True))}"
        )
    if free and count % known == 0:
        sizes[free[0]] = count // known
    if int(np.prod(sizes)) != count:
        raise ValueError(
            f"mesh: {' x '.join(f'{a} {s}' for a, s in zip(AXES, sizes, strict=True))} is not the {count}"
            " device(s) here; the sizes must multiply to that, and one of them may be -1 to fill up"
        )
    # Auto axes: XLA propagates shardings; jax.make_mesh's default would make every op state its own.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def platform(mesh: Mesh) -> str:
    """Return the platform that programs on this mesh are compiled for: "cpu", "tpu" or "gpu".

    `jax.default_backend()` is another one where the mesh is of a topology that is not attached to this machine.
    """
    return device_platform(mesh.devices.flat[0])


def device_platform(device: Any) -> str:
    """Return the platform of a device: "cpu", "tpu" or "gpu"."""
    name: str = device.platform
    return "gpu" if name in ("cuda", "rocm") else name  # as a compiler without a device may call it


def paths(tree: Any) -> Any:
    """Replace each leaf of a tree by its dotted path."""

    def key(k: Any) -> str:
        return str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))))

    return jax.tree_util.tree_map_with_path(lambda path, _: ".".join(map(key, path)), tree)


def shardings(mesh: Mesh, tree: Any, rules: Rules, *, leave_out: Sequence[str] = ()) -> Any:
    """Make a NamedSharding for every leaf of `tree`, from the first rule whose pattern matches in its path.

    Args:
      tree: arrays or ShapeDtypeStructs. A leaf with fewer axes than its rule takes the rule's last ones
        (the same layer, unstacked); scalars are replicated.
      rules: ordered (pattern, for each array axis a mesh axis, several of them, or None).
      leave_out: mesh axes to ignore, for example ("fsdp",) for sampling.

    Raises:
      ValueError: leaves that no rule covers, or axes that their mesh axes do not divide; all are listed, with
        the sizes of those mesh axes that would work for the whole tree.
    """
    problems: list[str] = []
    split: dict[str, int] = {}  # by mesh axes: the greatest number that divides all that they split
    failed: set[str] = set()

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
            if axis is not None:
                name, by = _size(mesh, axis)
                split[name] = math.gcd(split.get(name, 0), size)
                if size % by:
                    failed.add(name)
                    problems.append(f"{path}: {size} is not divisible by {name}={by}")
        return NamedSharding(mesh, PS(*axes))

    result = jax.tree.map(one, paths(tree), tree)
    if problems:
        text = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        working = [f"{name} {sizes_that_divide(mesh, split[name])}" for name in sorted(failed)]
        remedy = f"; sizes that would work on {mesh.size} devices: {', '.join(working)}"
        raise ValueError(text + (remedy if working else ""))
    return result


def _size(mesh: Mesh, axis: str | tuple[str, ...]) -> tuple[str, int]:
    """Return the name and size of one mesh axis, or of several that split one array axis."""
    names = (axis,) if isinstance(axis, str) else axis
    return " x ".join(f"mesh.{name}" for name in names), math.prod(mesh.shape[name] for name in names)


def sizes_that_divide(mesh: Mesh, *sizes: int) -> str:
    """List, for messages, the sizes of a mesh axis (or a product of axes) that divide all of `sizes`."""
    common = math.gcd(mesh.size, *sizes)
    return " or ".join(str(size) for size in range(1, common + 1) if common % size == 0)


def check_rows(mesh: Mesh, **batches: int) -> None:
    """Raise ValueError if a batch does not split evenly over data x fsdp; `batches` are keyed by their fields."""
    name, by = _size(mesh, ROWS)
    for field, size in batches.items():
        if size % by:
            raise ValueError(
                f"{field} {size} is not divisible by {name} = {by}; take a multiple of {by} for it,"
                f" or a mesh with {name} = {sizes_that_divide(mesh, *batches.values())}"
            )


def optimizer_shardings(mesh: Mesh, opt_state: Any, params: Any, split: Any) -> Any:
    """Shard an optimizer's state: each leaf like the parameter whose path is the end of the leaf's path.

    Args:
      opt_state: of optax, arrays or ShapeDtypeStructs.
      params: the parameters. split: their NamedShardings.

    Returns:
      For a leaf of its parameter's shape, that parameter's sharding; for a mean over one of its axes (Adafactor's rows
      and columns), the sharding of the remaining axes; scalars and optax's placeholders of one number are replicated.

    Raises:
      ValueError: leaves that are none of these; all are listed.
    """
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(split), strict=True)
    known = dict(zip(jax.tree.leaves(paths(params)), leaves, strict=True))
    problems: list[str] = []

    def one(path: str, leaf: Any) -> NamedSharding:
        if leaf.shape in ((), (1,)):
            return replicated(mesh)
        parts = path.split(".")
        names = (".".join(parts[start:]) for start in range(len(parts)))  # the longest that is a parameter's
        owner = next((known[name] for name in names if name in known), None)
        if owner is not None:
            shape, spec = owner[0].shape, owner[1].spec
            if leaf.shape == shape:
                return owner[1]
            without = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == leaf.shape]
            if without:
                # of axes of one size optax's v_row is the mean over the last, its v_col over the first
                axis = without[-1 if "v_row" in parts else 0]
                return NamedSharding(mesh, PS(*spec[:axis], *spec[axis + 1 :]))
        problems.append(f"{path} {leaf.shape}")
        return replicated(mesh)

    result = jax.tree.map(one, paths(opt_state), opt_state)
    if problems:
        raise ValueError(f"optimizer state that is like no parameter: {'; '.join(problems[:8])}")
    return result


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Count the bytes of a tree on one device, from shapes alone.

    Args:
      tree: arrays or ShapeDtypeStructs.
      shardings: a sharding for each leaf, as `shardings` returns them.
    """

    def shard_bytes(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(shard_bytes, tree, shardings)))


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Pin an array's sharding inside a function compiled under `jax.set_mesh`; without a mesh, return x itself.

    Without this, XLA splits the features of activations over fsdp, as it does those of the weights; every device then
    computes the attention of every row and sums the logits of every token with the others.
    """
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PS(*axes))


def row_shards() -> int:
    """Return the number of shards of a batch's rows, inside a function compiled under `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is complete on every device."""
    return NamedSharding(mesh, PS())


def batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array whose axis number `axis` is the batch."""
    return NamedSharding(mesh, PS(*([None] * axis), ROWS))
