"""RoPE scaling, which extends a model to a longer context, as config.json's rope_parameters (or rope_scaling) say.

The formulas are those of Llama 3.1 ("llama3") and of YaRN, arXiv 2309.00071, in the form in which transformers computes
them. "default" leaves the frequencies as they are.

Left out on purpose: kinds whose frequencies depend on the length of the input ("dynamic", "longrope"), because a
response's tokens would change the positions of its prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class RopeScaling(Protocol):
    """A change of the rotary frequencies."""

    @property
    def magnitude(self) -> float:
        """The factor of cosine and sine."""
        ...

    @property
    def tokens(self) -> int | None:
        """The length that it allows, where config.json's max_position_embeddings does not count it; None if it does."""
        ...

    def apply(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """Return the changed frequencies f64[H/2], radians per token, of a base `theta`."""
        ...


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Low frequencies are divided by `factor`, high ones stay, and those in between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    magnitude = 1.0
    tokens = None

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.factor < 1:
            raise ValueError("rope: needs 0 < low_freq_factor < high_freq_factor, and a factor of at least 1")

    def apply(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """See `RopeScaling`."""
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)  # in the original context
        unchanged = np.clip(
            (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0
        )
        return unchanged * frequency + (1 - unchanged) * frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Dimensions that turn less than `beta_slow` times in the original context are divided by `factor`.

    Those that turn more than `beta_fast` times stay. `attention_factor` is the magnitude; None follows the paper.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if (
            not 0 < self.beta_slow < self.beta_fast
            or self.factor < 1
            or self.original_max_position_embeddings < 1
        ):
            raise ValueError(
                "rope: needs 0 < beta_slow < beta_fast, a factor and an original length of at least 1"
            )

    @property
    def magnitude(self) -> float:
        """See `RopeScaling`."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    @property
    def tokens(self) -> int:
        """Qwen's instructions add the scaling to a config.json and leave its max_position_embeddings as it was."""
        return int(self.factor * self.original_max_position_embeddings)

    def apply(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """See `RopeScaling`."""
        size = len(frequency)

        def dimension(turns: float) -> float:
            """Return the dimension that turns so often in the original context."""
            return (
                size
                * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi))
                / math.log(theta)
            )

        first = max(math.floor(dimension(self.beta_fast)), 0)
        last = min(math.ceil(dimension(self.beta_slow)), 2 * size - 1)
        divided = np.clip((np.arange(size) - first) / max(last - first, 0.001), 0.0, 1.0)
        return (1 - divided) * frequency + divided * frequency / self.factor


KINDS: dict[str, type[Llama3] | type[Yarn]] = {"llama3": Llama3, "yarn": Yarn}
_IGNORED = {"rope_type", "rope_theta", "partial_rotary_factor"}  # the last one is checked elsewhere


def rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json states in its rope_parameters (transformers 5) or its rope_scaling (transformers 4).

    Where both are there, transformers takes rope_scaling whole, in both versions. "rope_type", whose older name is
    "type", is always in the result.

    Raises:
      ValueError: one of them is no mapping, or they contradict each other.
    """
    new, old = (_stated(hf, name) for name in ("rope_parameters", "rope_scaling"))
    thetas = [fields["rope_theta"] for fields in (new, old, hf) if fields.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        raise ValueError(f"rope_theta is stated as {' and as '.join(map(repr, thetas))}")
    both = [{name: value for name, value in fields.items() if name != "rope_theta"} for fields in (new, old)]
    if old and new.get("rope_type", "default") != "default" and both[0] != both[1]:
        raise ValueError("rope_parameters and rope_scaling contradict each other; remove one of them")
    return {"rope_type": "default", **(old or new), **({"rope_theta": thetas[0]} if thetas else {})}


def _stated(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of one spelling, without those that are null, and with one name for the kind."""
    fields = hf.get(name)
    if not isinstance(fields, Mapping | None):
        raise ValueError(f"{name} is {fields!r}, not a mapping")
    stated = {key: value for key, value in (fields or {}).items() if value is not None}
    kind = stated.pop("type", None)
    if kind is not None and stated.setdefault("rope_type", kind) != kind:
        raise ValueError(f"{name} has type {kind!r} and rope_type {stated['rope_type']!r}")
    if stated and not isinstance(stated.setdefault("rope_type", "default"), str):
        raise ValueError(f"{name} has rope_type {stated['rope_type']!r}, not a name")
    return stated


def read_rope_scaling(rope: Mapping[str, Any], max_position_embeddings: Any) -> Llama3 | Yarn | None:
    """Return the RoPE scaling that a config.json states, None for the default.

    Args:
      rope: its `rope_parameters`.
      max_position_embeddings: of config.json; the original length where `rope` does not give it.

    Raises:
      ValueError: a kind that is not computed, or a field that is missing, unknown or of the wrong type.
    """
    kind = rope["rope_type"]
    given = {name: value for name, value in rope.items() if name not in _IGNORED}
    if kind == "default":
        if given:
            raise ValueError(f"rope type is 'default', which has no {', '.join(sorted(map(str, given)))}")
        return None
    if kind not in KINDS:
        raise ValueError(f"rope type is {kind!r}, not one of {', '.join(['default', *KINDS])}")
    fields = {f.name: f for f in dataclasses.fields(KINDS[kind])}
    given.setdefault("original_max_position_embeddings", max_position_embeddings)
    required = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
    if missing := [name for name in required if given.get(name) is None]:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)}")
    if unknown := sorted(given.keys() - fields.keys()):
        raise ValueError(f"rope type {kind!r} has {', '.join(unknown)}, which is not computed")
    wrong = [
        f"{name} is {value!r}"
        for name, value in given.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf
    ]
    if wrong:
        raise ValueError(f"rope type {kind!r} has values that are no positive numbers: {', '.join(wrong)}")
    return KINDS[kind](**given)
