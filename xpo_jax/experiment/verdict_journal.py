"""The logs of an interrupted run: cut back to the step that is restored, and the verdicts after it kept.

What is cut off the pairs logs goes to verdicts-journal.jsonl first. The steps are made again, and where they come to
the same pairs the judge, who may cost money, is not asked a second time.

Left out on purpose: pairs without a verdict, about which the judge is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xpo_jax.data.pairs_log import content_hash, read_pairs
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.values import Prompts, RecordedVerdict, Verdict

JOURNAL = "verdicts-journal.jsonl"


def cut_metrics(run: Path, step: int) -> None:
    """Drop from metrics.jsonl the lines of later steps, and a torn last one."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    atomic_write(path, "".join(kept))


def cut_pairs(run: Path, step: int, offsets: Mapping[str, int]) -> None:
    """Cut the pairs logs back to `offsets`, whatever they hold beyond being put into the journal first.

    Args:
      step: that is restored; older entries of the journal are dropped.
      offsets: by name of the file; one without an offset is of a later step.
    """
    logs = sorted(run.glob("pairs*.jsonl"))
    kept = [record for record in _read(run / JOURNAL, 0) if record["step"] >= step]
    kept += [record for path in logs for record in _read(path, offsets.get(path.name, 0))]
    lines = dict.fromkeys(to_json(record) + "\n" for record in kept if record["failure"] is None)
    if lines:
        atomic_write(run / JOURNAL, "".join(lines))
    else:
        (run / JOURNAL).unlink(missing_ok=True)
    for path in logs:
        with open(path, "r+b") as file:
            file.truncate(offsets.get(path.name, 0))


def _read(path: Path, offset: int) -> list[dict[str, Any]]:
    return list(read_pairs(path, offset=offset)) if path.exists() else []


class Journal:
    """The verdicts that an interrupted run was given for the steps that are now made again."""

    def __init__(self, run: Path):
        self._records = {
            (record["step"], record["position"], record["hash"]): record
            for record in _read(run / JOURNAL, 0)
            if record["shown"] is not None
        }

    def __len__(self) -> int:
        return len(self._records)

    def paid(
        self, step: int, prompts: Prompts, policy: Sequence[str], reference: Sequence[str]
    ) -> dict[int, RecordedVerdict]:
        """By row, what is known of the pairs of a step: those with the same prompt, row and texts."""
        if not self._records:
            return {}
        found = {}
        for i in map(int, np.flatnonzero(prompts.valid)):
            key = content_hash(prompts.messages[i], prompts.rows[i], policy[i], reference[i])
            record = self._records.get((step, int(prompts.position[i]), key))
            if record is not None:
                verdict = Verdict(record["p_first"], record["reason"], record["scores"])
                found[i] = RecordedVerdict(verdict, tuple(record["shown"]), record["flipped"])
        return found
