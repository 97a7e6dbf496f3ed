"""Which size of a model fits which devices: the peaks of many plans in one table.

A cell is the peak in GiB per device of the config as it is; with a star where the changes of `fit.remedies` make it
fit (a smaller batch or another layout); and "-" where they do not.
"""

from __future__ import annotations

from typing import Any

from xpo_jax.config import loader as configs
from xpo_jax.reporting.console import progress, text_table

from . import estimate, topology
from .fit import Source, remedies, setup
from .hardware import SIZES, platform

TOPOLOGIES = ("h100x1", "h100x8", "v5e-8", "v6e-1", "v6e-8", "v5p-8")
MODELS = tuple(f"Qwen2.5-{size}" for size in SIZES)
RANK = 16  # of LoRA, unless the config trains an adapter
GIB = 2**30


def run(spec: str, overrides: tuple[str, ...]) -> int:
    """Print the table for a config; return exit status 0."""
    rows: list[list[Any]] = []
    rank = configs.load(spec, overrides).lora.rank or RANK
    kinds = {"all weights": ("lora.rank=0",), "LoRA": (f"lora.rank={rank}",)}
    for model, (kind, more) in progress([(m, k) for m in MODELS for k in kinds.items()], "planning"):
        peaks = [_peak(spec, (*overrides, *more), model, name) for name in TOPOLOGIES]
        rows.append([model, kind, *peaks])
    limits = [f"{topology.parse(name).hardware.memory / GIB:.0f}" for name in TOPOLOGIES]
    print(text_table(["GiB per device", "trained", *TOPOLOGIES], [["available", "", *limits], *rows]))
    print(
        f"\nLoRA is of rank {rank}; * with a smaller batch or another layout, which tools.plan names; - not even so"
    )
    return 0


def _peak(spec: str, overrides: tuple[str, ...], model: str, name: str) -> str:
    """Return a cell of the table."""
    devices = topology.parse(name)
    source = Source(spec, overrides, devices.count, model, platform(devices.device))
    limit = devices.hardware.memory
    try:
        peak = estimate.peak(estimate.memory(setup(source)[0]))[1]
        if peak <= limit:
            return f"{peak / GIB:.1f}"
        changed = remedies(source, limit).peak
    except ValueError:  # sizes that do not divide
        return "-"
    return "-" if changed is None else f"{changed / GIB:.1f} *"
