"""Which checkpoints stay: the newest few, those of certain steps, the best one, what these need, and what is held.

What a checkpoint says of itself (its score, what it needs, whether it is held) stands in its checkpoint.json, so that
the rule holds across restarts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from xpo_jax.checkpointing import manifest

ABOUT = "checkpoint.json"


def kept_steps(
    scores: Mapping[int, float | None], *, keep_last: int | None, keep_every: int | None
) -> set[int]:
    """Of the steps that have a checkpoint, those whose checkpoint stays.

    Args:
      scores: by step; None where not known. Of equal ones the later is the best.
      keep_last: the newest so many; None for all.
      keep_every: the multiples of it; None for no others.
    """
    kept = set(sorted(scores)[-keep_last:] if keep_last else scores)
    kept |= {step for step in scores if keep_every and step % keep_every == 0}
    best = _best(scores)
    return kept if best is None else kept | {best}


def best_step(root: epath.Path) -> int | None:
    """The step whose checkpoint has the highest score of those that a manifest vouches for; None if none has one."""
    return _best({step: _about(root / str(step)).get("score") for step in steps_in(root)})


def _best(scores: Mapping[int, float | None]) -> int | None:
    known = [(score, step) for step, score in scores.items() if score is not None]
    return max(known)[1] if known else None


def remove_old(root: epath.Path, newest: int, *, keep_last: int | None, keep_every: int | None) -> None:
    """Remove the checkpoints up to the newest that need not stay, and what a killed process left half-written.

    Later ones are left alone: they were passed over when the run was started again, and will be written anew.

    Args:
      root: the folder of the checkpoints.
      newest: a step whose checkpoint is whole.

    Raises:
      OSError: if something cannot be read or removed.
    """
    steps = [step for step in steps_in(root) if step <= newest]
    about = {step: _about(root / str(step)) for step in steps}
    scores = {step: each.get("score") for step, each in about.items() if each}
    kept = kept_steps(scores, keep_last=keep_last, keep_every=keep_every)
    needed = {about[step].get("needs") for step in kept}
    for step in steps:
        if step not in kept | needed and not about[step].get("hold"):
            manifest.remove(root / str(step))


def steps_in(root: epath.Path) -> list[int]:
    """The steps that folders there are named after, ascending."""
    if not root.is_dir():
        return []
    names = [f.name for f in root.iterdir() if re.fullmatch("0|[1-9][0-9]*", f.name) and f.is_dir()]
    return sorted(map(int, names))


def _about(folder: epath.Path) -> dict[str, Any]:
    """What checkpoint.json says; nothing where it is damaged or no manifest vouches for it."""
    if not manifest.sealed(folder):
        return {}
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
