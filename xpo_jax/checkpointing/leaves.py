"""The leaves of a saved tree: their names, dtypes and shapes, which a checkpoint records and a restore compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from xpo_jax.checkpointing.manifest import CheckpointError


def named(tree: Any) -> list[tuple[str, Any]]:
    """Return each leaf with its path, such as ("params/norm/scale", array)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves]


def describe(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of each leaf by its path, such as "float32[2,8]"."""
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in named(tree)}


def require_equal(folder: epath.Path, saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise CheckpointError, naming the first leaves that differ, unless both descriptions are equal."""
    differing = [name for name in {**saved, **expected} if saved.get(name) != expected.get(name)]
    if differing:
        pairs = [(name, saved.get(name, "absent"), expected.get(name, "absent")) for name in differing[:3]]
        examples = "; ".join(f"{name} is {old} in the checkpoint, {new} here" for name, old, new in pairs)
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{folder}: does not fit this model or optimizer ({examples}{more}); use its config"
        )
