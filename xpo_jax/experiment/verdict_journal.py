"""The logs of an interrupted run, cut back to the restored step, and the verdicts that are cut off.

What is cut off the pairs logs goes to verdicts-journal.jsonl first. The steps are repeated, and where they arrive at
the same pairs, the judge is not queried a second time, because a query may cost money.

Left out on purpose: pairs without a verdict; the judge is queried for them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xpo_jax.data.pairs_log import content_hash, read_pairs
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.judges.scoring import key
from xpo_jax.values import Candidate, Prompts, RecordedVerdict, Verdict

JOURNAL = "verdicts-journal.jsonl"


def cut_metrics(run: Path, step: int) -> None:
    """Remove the lines of later steps from metrics.jsonl, and a torn last one."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    lines = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        lines.append(line)
    atomic_write(path, "".join(lines))


def cut_pairs(run: Path, step: int, offsets: Mapping[str, int]) -> None:
    """Cut the pairs logs back to `offsets`; what they hold beyond goes into the journal first.

    Args:
      run: the run directory.
      step: the restored one; older entries of the journal are dropped.
      offsets: bytes by file name; all of a file without an offset belongs to later steps.
    """
    logs = sorted(run.glob("pairs*.jsonl"))
    records = [record for record in _read(run / JOURNAL, 0) if record["step"] >= step]
    records += [record for path in logs for record in _read(path, offsets.get(path.name, 0))]
    lines = dict.fromkeys(to_json(record) + "\n" for record in records if record["failure"] is None)
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
    """The verdicts that an interrupted run was given for the steps that are now repeated."""

    def __init__(self, run: Path):
        records = _read(run / JOURNAL, 0)
        self._records = {
            (record["step"], record["position"], record["hash"]): record
            for record in records
            if record["shown"] is not None
        }
        self._scored = [record for record in records if "candidates" in record]

    def __len__(self) -> int:
        return len(self._records)

    def recorded_scores(self, step: int) -> dict[str, float]:
        """Return the scores of answers to a step's prompts, by `scoring.key`."""
        return {
            key(Candidate(record["messages"], record["row"], candidate["text"])): candidate["score"]
            for record in self._scored
            if record["step"] == step
            for candidate in record["candidates"]
            if candidate["score"] is not None
        }

    def recorded_verdicts(
        self, step: int, prompts: Prompts, policy: Sequence[str], reference: Sequence[str]
    ) -> dict[int, RecordedVerdict]:
        """Return, by row, the verdicts on a step's pairs: those with the same prompt, row and texts."""
        if not self._records:
            return {}
        verdicts = {}
        for i in map(int, np.flatnonzero(prompts.valid)):
            key = content_hash(prompts.messages[i], prompts.rows[i], policy[i], reference[i])
            record = self._records.get((step, int(prompts.position[i]), key))
            if record is not None:
                verdict = Verdict(record["p_first"], record["reason"], record["scores"])
                verdicts[i] = RecordedVerdict(verdict, tuple(record["shown"]), record["flipped"])
        return verdicts
