"""Which checkpoints are kept: the newest, those of certain steps, the best, what these need, and what is held.

A checkpoint's checkpoint.json holds its score and by which criterion, the step that it needs, and whether it is held,
so that the rule is the same after a restart.

Left out on purpose: Orbax's CheckpointManager with its preservation policies (LatestN, EveryNSteps, BestN). It counts
a checkpoint as complete, and removes older ones, as soon as its files are committed. Here that moment is when the
manifest is on disk: before it no older checkpoint may go, or a kill could leave none that verifies. Nor has it a
policy for "kept as long as another one that needs it" or for a single checkpoint that is held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from xpo_jax.checkpointing import manifest

METADATA = "checkpoint.json"
WIN_RATE = "win rate"  # what a score is, unless checkpoint.json names another criterion


def kept_steps(
    scores: Mapping[int, float | None], *, keep_last: int | None, keep_every: int | None
) -> set[int]:
    """Return the steps whose checkpoint is kept, of those that have one.

    Args:
      scores: by step; None where it is not known. Of equal scores the later step's is the best.
      keep_last: how many of the newest are kept; None for all.
      keep_every: multiples of it are kept as well; None for no others.
    """
    steps = set(sorted(scores)[-keep_last:] if keep_last else scores)
    steps |= {step for step in scores if keep_every and step % keep_every == 0}
    best = _best(scores)
    return steps if best is None else steps | {best}


def best_step(root: epath.Path, criterion: str = WIN_RATE) -> int | None:
    """Return the step of the sealed checkpoint with the highest score by this criterion; None if none has one."""
    return _best({step: _score(_metadata(root / str(step)), criterion) for step in steps_in(root)})


def _best(scores: Mapping[int, float | None]) -> int | None:
    known = [(score, step) for step, score in scores.items() if score is not None]
    return max(known)[1] if known else None


def remove_old(
    root: epath.Path, newest: int, *, keep_last: int | None, keep_every: int | None, criterion: str = WIN_RATE
) -> None:
    """Remove checkpoints that are not kept, and what a killed process left half-written, up to a step.

    Later ones are left alone: they were passed over when the run resumed, and will be written again.

    Args:
      root: the folder of the checkpoints.
      newest: a step whose checkpoint is complete.
      keep_last, keep_every: see `kept_steps`.
      criterion: of the best; scores by another one count as unknown.

    Raises:
      OSError: a file cannot be read or removed.
    """
    steps = [step for step in steps_in(root) if step <= newest]
    metadata = {step: _metadata(root / str(step)) for step in steps}
    scores = {step: _score(entries, criterion) for step, entries in metadata.items() if entries}
    to_keep = kept_steps(scores, keep_last=keep_last, keep_every=keep_every)
    needed = {metadata[step].get("needs") for step in to_keep}
    for step in steps:
        if step not in to_keep | needed and not metadata[step].get("hold"):
            manifest.remove(root / str(step))


def steps_in(root: epath.Path) -> list[int]:
    """Return the steps that have a folder, complete or not, ascending."""
    if not root.is_dir():
        return []
    names = [f.name for f in root.iterdir() if re.fullmatch("0|[1-9][0-9]*", f.name) and f.is_dir()]
    return sorted(map(int, names))


def _score(metadata: Mapping[str, Any], criterion: str) -> float | None:
    """Return a checkpoint's score, None if it has none or one by another criterion."""
    return metadata.get("score") if metadata.get("criterion", WIN_RATE) == criterion else None


def _metadata(folder: epath.Path) -> dict[str, Any]:
    """Return what checkpoint.json holds; nothing if it is damaged or the folder is not sealed."""
    if not manifest.is_sealed(folder):
        return {}
    try:
        metadata = json.loads((folder / METADATA).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
