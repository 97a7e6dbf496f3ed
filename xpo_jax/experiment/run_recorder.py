"""The logs of a run that is under way: metrics.jsonl and the pairs logs, cut back to the restored step and then opened.

What is cut off the pairs logs stays in the verdict journal (verdict_journal.py), so that no verdict is bought twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from xpo_jax.data.pairs_log import PairsLog, read_pairs
from xpo_jax.experiment.config_changes import MAY_CHANGE
from xpo_jax.experiment.resume import Restored
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.verdict_journal import JOURNAL, Journal, cut_metrics, cut_pairs
from xpo_jax.reporting.metrics import Metrics
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none, run_on_all
from xpo_jax.values import Prompts, RecordedVerdict


class RunRecorder:
    """Writes the logs of a run; made by `open_logs`."""

    def __init__(self, run: RunDir, journal: Journal, pairs: PairsLog, metrics: Metrics):
        self._run, self._journal, self._pairs, self._metrics = run, journal, pairs, metrics

    def recorded_verdicts(
        self, step: int, prompts: Prompts, texts: tuple[Sequence[str], Sequence[str]]
    ) -> dict[int, RecordedVerdict]:
        """Return, by row, the verdicts on exactly these pairs from before the run was interrupted."""
        return self._journal.recorded_verdicts(step, prompts, *texts)

    def recorded_scores(self, step: int) -> dict[str, float]:
        """Return the scores of answers in that step from before the run was interrupted, see `scoring.key`."""
        return self._journal.recorded_scores(step)

    def write_pairs(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append to the pairs log, before the update learns from it; see `pairs_log.pair_records`."""
        self._pairs.append(records)

    def push(self) -> None:
        """Copy what was written to the run's bucket, if it is in one; all processes call it."""
        self._run.push()

    def past_pairs(self) -> list[dict[str, Any]]:
        """Return the records of the pairs logs of all processes so far, without texts and rows, in no order."""
        by_position = {
            (record["step"], record["position"]): record  # where each process has a copy of all logs, once
            for records in run_on_all("reading the pairs logs", self._read_logs)
            for record in records
        }
        return list(by_position.values())

    def _read_logs(self) -> list[dict[str, Any]]:
        if not distributed.is_lead_process() and self._run.shared:
            return []
        logs = sorted(self._run.path.glob("pairs*.jsonl"))
        return [_without_texts(record) for path in logs for record in read_pairs(path)]

    def write_step(self, step: int, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Write a step's metrics, and held-out samples for people to read; nothing if there are no metrics."""
        if metrics and samples:
            self._metrics.samples(step, "held_out", samples)
        if metrics:
            self._metrics.log(step, metrics)

    def pairs_offset(self) -> tuple[str, int]:
        """Return the name of this process's pairs log, and its length in bytes."""
        return self._pairs.path.name, self._pairs.offset


@contextlib.contextmanager
def open_logs(run: RunDir, restored: Restored, metrics: Callable[[int], Metrics]) -> Iterator[RunRecorder]:
    """Cut the logs back to the restored step and open them until the loop has ended.

    Args:
      restored: of this run.
      metrics: opens the metrics files of a run that resumes after this many steps.
    """
    step = -1 if restored.step is None else restored.step
    with all_or_none("cutting the logs back"):
        if distributed.is_lead_process() or not run.shared:
            cut_metrics(run.path, step)
            cut_pairs(run.path, max(step, 0), restored.offsets)
            if not all(line.startswith(MAY_CHANGE) for line in run.changes):
                (run.path / JOURNAL).unlink(missing_ok=True)  # its verdicts may be another judge's
    with all_or_none("opening the logs"):
        journal = Journal(run.path)
        pairs_log = PairsLog(run.path / distributed.file_name("pairs.jsonl"))
        metrics_log = metrics(max(step, 0))
    with pairs_log, metrics_log:
        yield RunRecorder(run, journal, pairs_log, metrics_log)
        if distributed.is_lead_process():
            (run.path / JOURNAL).unlink(missing_ok=True)


def _without_texts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a pairs log's record that replay needs."""
    names = ("step", "position", "prompt_tokens", "p_first", "weight", "ref_logps")
    responses = [{"tokens": response["tokens"]} for response in record["responses"]]
    return {**{name: record[name] for name in names if name in record}, "responses": responses}
