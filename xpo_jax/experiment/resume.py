"""Going on where a run was interrupted: what is kept beside the weights, and what is cut back.

A step is a pure function of checkpoint, config, step and verdicts, so a run that restores a checkpoint goes the
same way again. What it needs for that, and is not weights:

    queries, patience and what else is counted: in the checkpoint
    evaluations/: every evaluation whole, so that none is asked for twice
    metrics.jsonl, pairs*.jsonl: cut back to where they were; verdicts in what is cut off are kept (verdict_journal.py)

Left out on purpose: the verdicts of an evaluation that was interrupted, which are asked for again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from xpo_jax.checkpointing import checkpoint
from xpo_jax.checkpointing.checkpoint import CheckpointError, Checkpoints
from xpo_jax.checkpointing.retention import best_step
from xpo_jax.config import settings
from xpo_jax.data.pairs_log import PairsLog, read_pairs
from xpo_jax.evaluation.evaluator import Evaluation
from xpo_jax.evaluation.statistics import Rate
from xpo_jax.experiment.config_changes import MAY_CHANGE
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.verdict_journal import JOURNAL, Journal, cut_metrics, cut_pairs
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.judges.limits import FailureTolerance
from xpo_jax.reporting.metrics import Metrics
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none, run_on_all, run_on_lead
from xpo_jax.runtime.interruption import Signals, Stopped, Watchdog
from xpo_jax.values import Prompts, RecordedVerdict, TrainState


@dataclasses.dataclass
class Counters:
    """What a run counts, alike on every process.

    queries, evaluation_queries: comparisons that the judge was asked in training, and in evaluations.
    skipped_in_a_row: updates until now.
    """

    queries: int = 0
    evaluation_queries: int = 0
    skipped_in_a_row: int = 0


class Ledger:
    """What a run writes down as it goes, so that at every step's end it could go on from there.

    Args:
      run: the run directory.
      keep: how often a checkpoint is made, and which are kept.
      steps: of the whole run.
      reference_step: see `settings.Model`; the checkpoints that a run goes on from need that one.
      evaluations: a fingerprint of what decides what an evaluation finds, besides step and weights.
      devices: how the arrays are split, which decides the last bits of whatever comes after the restored step.
      accept_changes: of config and reference.
      patience, signals, watchdog: those of the run.

    newest: the step of the checkpoint to go on from, or None. counters: as they were there.
    """

    def __init__(
        self,
        run: RunDir,
        keep: settings.Checkpoint,
        *,
        steps: int,
        reference_step: Callable[[int], int],
        evaluations: str,
        devices: str,
        accept_changes: bool,
        failure_tolerance: FailureTolerance,
        signals: Signals,
        watchdog: Watchdog,
    ):
        self.counters = Counters()
        self._run, self._keep, self._steps = run, keep, steps
        self._of, self._devices, self._reference_step = evaluations, devices, reference_step
        self._signals, self._watchdog, self._patience = signals, watchdog, failure_tolerance
        self._accept = accept_changes
        self._about: dict[str, Any] = {"config": run.fixed}
        self._there: dict[str, Any] = {}
        self._done, self._saved = -1, -1
        self._found: dict[str, Any] = {}
        self._settled = True
        self.newest: int | None = run_on_lead("looking for a checkpoint", checkpoint.latest, self._folder)
        if self.newest is not None and self.newest > steps:
            raise CheckpointError(
                f"{self._folder / str(self.newest)}: is beyond the last step, {steps}; raise steps, or give another"
                " --config.run_dir"
            )

    @property
    def _folder(self) -> epath.Path:
        return self._run.checkpoints

    # ---- at the start ----

    def described(self) -> dict[str, str]:
        """For the opening table: where the run is and goes on, and with which changes of its config."""
        where = "" if self.newest is None else f"after step {self.newest}, whose checkpoint is whole"
        rows = {"run": self._run.address, "going on": where, "changed": "; ".join(self._run.changes)}
        return {name: text for name, text in rows.items() if text}

    def beat(self, what: str) -> None:
        """Something begins that may take as long as a step, see `Watchdog.beat`."""
        self._watchdog.beat(what)

    def state_of(self, step: int, like: TrainState) -> TrainState:
        """A checkpoint's state, of which nothing else is taken over; `like` as `checkpoint.restore` wants it."""
        return checkpoint.restore(self._folder, step, like)[0]

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint's state, with the counters."""
        assert self.newest is not None
        state, self._there = checkpoint.restore(self._folder, self.newest, like, verified=True)
        self.counters = Counters(**self._there["counters"])
        self._patience.state = self._there["patience"]
        self._saved = self.newest
        return state

    def vouch(self, reference: int) -> None:
        """Take note of the reference's fingerprint.

        Raises:
          CheckpointError: if the restored run had another reference, or another config; unless that is accepted.
        """
        self._about["reference"] = reference
        for name, what in (("reference", "another reference"), ("config", "another config")):
            if self._there and not self._accept and self._there[name] != self._about[name]:
                raise CheckpointError(
                    f"{self._folder / str(self.newest)}: was trained with {what} (fingerprint"
                    f" {self._there[name]} there, {self._about[name]} here); put back what it was trained with, or add"
                    " --accept-changes"
                )

    @contextlib.contextmanager
    def open(self, metrics: Callable[[int], Metrics]) -> Iterator[None]:
        """Cut the logs back and open them; `metrics` gets the step that is restored."""
        step = -1 if self.newest is None else self.newest
        offsets = self._there.get("offsets", {})
        with all_or_none("cutting the logs back"):
            if distributed.is_lead_process() or not self._run.shared:
                cut_metrics(self._run.path, step)
                cut_pairs(self._run.path, max(step, 0), offsets)
                if not all(line.startswith(MAY_CHANGE) for line in self._run.changes):
                    (self._run.path / JOURNAL).unlink(missing_ok=True)  # verdicts of another judge, perhaps
        with all_or_none("opening the logs"):
            self._journal = Journal(self._run.path)
            self._pairs = PairsLog(self._run.path / distributed.file_name("pairs.jsonl"))
            self._metrics = metrics(max(step, 0))
        self._checkpoints = Checkpoints(
            self._folder, keep_last=self._keep.keep_last, keep_every=self._keep.keep_every
        )
        with self._pairs, self._metrics, self._checkpoints:
            with self._signals.deferred():
                yield
            self._checkpoints.wait()
            if distributed.is_lead_process():
                (self._run.path / JOURNAL).unlink(missing_ok=True)

    def past(self) -> list[dict[str, Any]]:
        """The records of all pairs logs up to here, of every process, texts and rows left out; in no order."""

        def read_logs() -> list[dict[str, Any]]:
            logs = sorted(self._run.path.glob("pairs*.jsonl"))
            readers = distributed.is_lead_process() or not self._run.shared
            return [_numbers(record) for path in logs for record in read_pairs(path)] if readers else []

        values = run_on_all("reading the pairs logs", read_logs)
        # by place: where each process has a copy of its own of the run directory, they may tell the same
        found = {(record["step"], record["position"]): record for records in values for record in records}
        return list(found.values())

    # ---- on the way ----

    def paid(
        self, step: int, prompts: Prompts, texts: tuple[Sequence[str], Sequence[str]]
    ) -> dict[int, RecordedVerdict]:
        """By row, the verdicts that the run was given on these very pairs before it was interrupted."""
        return self._journal.paid(step, prompts, *texts)

    def write_pairs(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Before the update learns from them; see `pairs_log.pair_records`."""
        self._pairs.append(records)

    def arrive(self, done: int, state: TrainState, found: Mapping[str, Any]) -> None:
        """At the end of a step, whose metrics are `found`; `settle` writes them."""
        self._done, self._state, self._found, self._settled = done, state, dict(found), False

    def evaluation(self, step: int, make: Callable[[], Evaluation]) -> Evaluation:
        """The evaluation after `step` updates: the one that was made before the run was interrupted, or a new one.

        Where the run has just arrived its metrics are written with the others of that step.
        """
        path = self._run.path / "evaluations" / f"{step}.json"
        there = run_on_lead("reading an evaluation", _read_json, path)
        known = self.newest is not None and step <= self.newest
        recalled = (
            bool(there) and there.get("of") == self._of and (known or there.get("devices") == self._devices)
        )
        if recalled:
            found = _evaluation(there["evaluation"])
            if self.newest in (None, step):
                self._patience.state = there["patience"]
        else:
            found = make()
            with all_or_none("writing an evaluation"):
                if distributed.is_lead_process():
                    (self._run.path / "evaluations").mkdir(exist_ok=True)
                    about = {"step": step, "of": self._of, "devices": self._devices}
                    about["patience"] = self._patience.state
                    content = to_json({**about, "evaluation": dataclasses.asdict(found)}, indent=1)
                    atomic_write(self._run.path / "evaluations" / f"{step}.json", content + "\n")
        if step == self._done and not (recalled and step == self.newest):
            self._found |= found.metrics()
            self.counters.evaluation_queries += found.queries
        return found

    def settle(
        self,
        *,
        score: float | None = None,
        samples: Sequence[Mapping[str, Any]] = (),
        last: bool = False,
    ) -> None:
        """Write down what is known at this step's end; save it if that is due.

        Args:
          score: the held-out win rate, if it was evaluated.
          samples: of that evaluation, for people to look at.
          last: whether the run ends here.

        Raises:
          Stopped: if any process was told to stop; it is saved.
        """

        def write_metrics() -> list[Any]:
            if self._found and samples:
                self._metrics.samples(self._done, "held_out", samples)
            if self._found:
                self._metrics.log(self._done, self._found)
            return [self._signals.received, self._pairs.path.name, self._pairs.offset]

        values = run_on_all("writing metrics", write_metrics)
        self._about |= {
            "counters": dataclasses.asdict(self.counters),
            "patience": self._patience.state,
            "offsets": {name: offset for _, name, offset in values},
        }
        self._settled, self._score = True, score if score is not None and math.isfinite(score) else None
        stop = next((number for number, _, _ in values if number), None)
        every = self._keep.every_steps
        best = score is not None and self._keep.export == "best"
        renewed = bool(self._done) and self._reference_step(self._done) == self._done
        if last or stop or best or renewed or (every and self._done and self._done % every == 0):
            self._save()
        if stop:
            self._checkpoints.wait()
            name = signal.Signals(stop).name
            said = f"stopped by {name} after step {self._done} of {self._steps}, which is saved"
            raise Stopped(stop, f"{said}; run the same command to go on", together=True)
        self.beat(f"step {self._done + 1}")

    def _save(self) -> None:
        if self._saved != self._done:
            self._run.push()  # first, so that the logs reach at least as far as the newest checkpoint
            needs = self._reference_step(self._done) or None
            self._checkpoints.save(self._done, self._state, self._about, score=self._score, needs=needs)
            self._saved = self._done

    def best(self) -> int | None:
        """The step whose checkpoint has the best held-out win rate; None if the judge never had a verdict."""
        best: int | None = run_on_lead("looking for the best checkpoint", best_step, self._folder)
        return best

    def save(self) -> epath.Path:
        """Save the state of the last step's end now, and wait for it; returns the checkpoint's folder."""
        if not self._settled:
            self.settle()
        self._save()
        self._checkpoints.wait()
        return self._folder / str(self._done)


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """What replay needs of a record of the pairs log."""
    names = ("step", "position", "p_first", "weight", "ref_logps")
    responses = [{"tokens": response["tokens"]} for response in record["responses"]]
    return {**{name: record[name] for name in names if name in record}, "responses": responses}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # not made, or not by us: it is made again
        return None


def _evaluation(found: Mapping[str, Any]) -> Evaluation:
    """What `dataclasses.asdict` and JSON made of it; null is what a number that is not finite became."""

    def numbers(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: numbers(entry) for name, entry in value.items()}
        return math.nan if value is None else value

    def rate(value: Sequence[float | None] | None) -> Rate | None:
        return None if value is None else Rate(*map(numbers, value))

    read = {"samples": lambda value: value, "controlled": rate, "against_answers": rate}
    return Evaluation(**{name: read.get(name, numbers)(value) for name, value in found.items()})
