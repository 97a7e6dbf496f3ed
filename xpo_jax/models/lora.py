"""Low-rank adapters (LoRA, arXiv 2106.09685): which linear maps have one, and which weights a run trains.

The map x W of a layer becomes x W + scale (x A) B, with A [D rank] and B [rank F]. W is frozen; only A and B have
master weights, gradients and optimizer state. B is 0 at first, so the policy begins as the model without adapters, bit
for bit. Sampling, scoring and the update all apply an adapter beside its map. Added to a bfloat16 W it would vanish:
until a change exceeds half a unit in the last place of W, rounding returns W.

Every tree of weights is divided by one predicate, `LoRA.trains`; with rank 0 it holds for all weights.

Left out on purpose: dropout, DoRA, adapters of the embeddings, and adapters in some layers only.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx, traverse_util

from xpo_jax.models.layers import Linear
from xpo_jax.runtime.sharding import Rules
from xpo_jax.values import Params

A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """The adapters of a run.

    Args:
      rank: of every adapter; 0 trains all weights of the model instead.
      alpha: the scale of the adapters is alpha / rank.
      targets: regular expressions; a linear map has an adapter if one of them matches its name in a layer, such as
        "self_attn.q_proj", or the end of it after a dot.
      rslora: the scale is alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
      start: a folder of a PEFT adapter to begin with, of the same rank, alpha and targets; None for a new adapter.
    """

    rank: int
    alpha: float
    targets: Sequence[str]
    rslora: bool
    start: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # so that equal settings have one hash
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}, must be 0 (train all weights) or more")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}, must be positive")
        if self.rank and not self.targets:
            raise ValueError(
                "targets is empty; name at least one linear map, such as 'q_proj', or set rank to 0"
            )
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"targets: {pattern!r} is not a regular expression ({error})") from error
        if self.start is not None and not self.rank:
            raise ValueError(
                "start is set, but rank is 0, which has no adapter; set the rank of that adapter"
            )

    @property
    def scale(self) -> float:
        """The factor of (x A) B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def summary(self) -> str:
        """Return a line for people; empty where all weights are trained."""
        begins = "" if self.start is None else f", which begins as {self.start}"
        targets = ", ".join(self.targets)
        text = f"LoRA of rank {self.rank} and scale {self.scale:g} on {targets}{begins}" if self.rank else ""
        return text

    def trains(self, path: str) -> bool:
        """Return whether the weight at a dotted path is trained: the predicate that divides every tree of weights."""
        return not self.rank or path.rpartition(".")[2] in (A, B)

    def trained(self, tree: Params) -> Params:
        """Return the part of a tree of weights (or of what belongs to each) that is trained."""
        return _select(tree, self.trains)

    def frozen(self, tree: Params) -> Params:
        """Return the other part, {} where all weights are trained."""
        return _select(tree, lambda path: not self.trains(path))


OFF = LoRA(rank=0, alpha=1.0, targets=(), rslora=False, start=None)


def _select(tree: Params, holds: Callable[[str], bool]) -> Params:
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(
        {path: leaf for path, leaf in flat.items() if holds(".".join(map(str, path)))}
    )


def join(frozen: Params, trained: Params) -> Params:
    """Return one tree of the leaves of two, which share none; arrays are not copied."""
    return traverse_util.unflatten_dict(
        traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trained)
    )


def attach(model: nnx.Module, lora: LoRA) -> None:
    """Give each linear map of the layers that the targets name an adapter of zeros.

    Raises:
      ValueError: a target that names none, with those that there are; or a rank that no map can have.
    """
    if not lora.rank:
        return
    unused, names, widest = set(lora.targets), set(), 0
    for path, module in nnx.iter_graph(model):
        if not isinstance(module, Linear) or path[0] != "layers":
            continue
        name = ".".join(str(part) for part in path[1:] if not isinstance(part, int))
        names.add(name)
        matching = {pattern for pattern in lora.targets if re.fullmatch(rf"(.*\.)?(?:{pattern})", name)}
        unused -= matching
        if matching:
            widest = max(widest, min(module.kernel.shape[-2:]))
            module.adapt(lora.rank, lora.scale)
    if unused:
        listed = ", ".join(map(repr, sorted(unused)))
        raise ValueError(
            f"lora.targets: {listed} names no linear map of this model; its layers have {', '.join(sorted(names))}"
        )
    if lora.rank > widest:
        raise ValueError(
            f"lora.rank is {lora.rank}, but no map that lora.targets name has a rank above {widest}; lower it, or set"
            " it to 0 to train all weights"
        )


def rules(of_model: Rules) -> Rules:
    """Return the sharding rules of adapters: A is split like the rows of its kernel, B like the columns."""
    adapters = []
    for pattern, axes in of_model:
        if "kernel" in pattern:
            adapters.append((pattern.replace("kernel", A), (*axes[:-1], None)))
            adapters.append((pattern.replace("kernel", B), (*axes[:-2], None, axes[-1])))
    return (*adapters, *of_model)


def initial(shapes: Params, seed: int) -> Params:
    """Return adapters that change nothing: A uniform in +-1/sqrt(D), as in PEFT, and B zero; float32, on the host.

    Args:
      shapes: of the adapters, with stacked layers.
      seed: of the run.
    """
    flat = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        if path[-1] == B:
            flat[path] = np.zeros(leaf.shape, np.float32)
            continue
        random = np.random.default_rng([seed, zlib.crc32(".".join(path).encode())])
        bound = 1 / math.sqrt(leaf.shape[-2])
        flat[path] = random.uniform(-bound, bound, leaf.shape).astype(np.float32)
    return traverse_util.unflatten_dict(flat)


def switched_off(adapters: Params) -> Params:
    """Return adapters on the host whose B is zero."""
    flat = traverse_util.flatten_dict(adapters)
    return traverse_util.unflatten_dict(
        {path: np.zeros_like(leaf) if path[-1] == B else leaf for path, leaf in flat.items()}
    )
