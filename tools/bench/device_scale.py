"""What the parts of tools.bench.device_check share: their sizes, where they record, and what these devices have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax

from tools.build.random_model import CONFIG_05B
from tools.planner.hardware import SIZES
from xpo_jax.algorithm.model_spec import compute_dtype
from xpo_jax.config.settings import Model
from xpo_jax.models import attention_kernels


class DoesNotFit(ValueError):
    """A model whose plan exceeds the memory of these devices: nothing is wrong, and nothing can be measured."""


class Record:
    """Figures and checks of a part, written after every addition: what a part measured before it ended is kept."""

    def __init__(self, path: Path):
        self._path = path
        self.figures: dict[str, Any] = {}
        self.checks: list[dict[str, Any]] = []

    def add(self, **figures: Any) -> None:
        """Add figures."""
        self.figures |= figures
        self._write()

    def check(self, what: str, measured: float, limit: float) -> None:
        """Add a check, which passes if `measured` is at most `limit`, and not nan."""
        passed = bool(measured <= limit)
        self.checks.append({"check": what, "measured": measured, "limit": limit, "passed": passed})
        self._write()

    def _write(self) -> None:
        self._path.write_text(json.dumps({"figures": self.figures, "checks": self.checks}))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes of all parts.

    Args:
      models: {name: config.json} of the models that train.
      prompts, prompt_tokens, new_tokens, steps: of their training.
      rounds: in which the parts of a step are timed.
      long_tokens: of the long prompts, beyond those that "auto" gives to the einsum.
      attention_rows: of the kernels' comparison, at that length.
    """

    models: Mapping[str, Mapping[str, Any]]
    prompts: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    rounds: int
    long_tokens: int
    attention_rows: int


def _of_size(name: str) -> dict[str, Any]:
    return CONFIG_05B | dataclasses.asdict(SIZES[name])


_NAMES = ("0.5B", "1.5B")
FULL = Scale(
    models={name: _of_size(name) for name in _NAMES},
    prompts=64,
    prompt_tokens=256,
    new_tokens=128,
    steps=20,
    rounds=3,
    long_tokens=2048,
    attention_rows=2,
)
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TINY = Scale(
    models=dict.fromkeys(_NAMES, CONFIG_05B | _SMALL),
    prompts=8,
    prompt_tokens=8,
    new_tokens=4,
    steps=3,
    rounds=1,
    long_tokens=96,
    attention_rows=2,
)


# ---- these devices ----------------------------------------------------------------------------------


def memory(name: str) -> int | None:
    """Return a figure of the allocator of the fullest device; None where it has none, as on CPU."""
    values = [(device.memory_stats() or {}).get(name) for device in jax.local_devices()]
    return max((value for value in values if value is not None), default=None)


def kernels(head_dim: int) -> tuple[list[str], dict[str, str]]:
    """Return the implementations of attention that these devices have, and {name: reason} of the others."""
    device, here, refused = jax.devices()[0], [], {}
    dtype = compute_dtype("auto", device.platform)
    for name in get_args(get_type_hints(Model)["attention"]):
        try:
            attention_kernels.check(name, device, dtype=dtype, head_dim=head_dim)
        except ValueError as error:
            refused[name] = str(error)
        else:
            here += [name] if name != attention_kernels.AUTO else []
    return here, refused
