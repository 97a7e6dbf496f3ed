"""Resume a run where it was interrupted: what its checkpoints hold beside the weights.

A step is a pure function of checkpoint, config, step and verdicts, so a run that restores a checkpoint repeats the
following steps exactly. In this order:

    find_newest     the step to resume from, if there is one
    restore         its state, and the `Restored` that everything below needs
    check_identity  the same reference and config as before; returns what new checkpoints carry
    open_logs       cut the logs back to the restored step (run_recorder.py)
    CheckpointSession.save
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from etils import epath

from xpo_jax.checkpointing import checkpoint
from xpo_jax.checkpointing.checkpoint import CheckpointError, Checkpoints
from xpo_jax.checkpointing.retention import best_step
from xpo_jax.config import settings
from xpo_jax.evaluation.selection import Selection
from xpo_jax.experiment.early_samples import EarlySamples
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.runtime.collectives import run_on_lead
from xpo_jax.values import TrainState


@dataclasses.dataclass
class Counters:
    """What a run counts, equal on every process.

    queries, evaluation_queries: comparisons that the judge was queried for, in training and in evaluations.
    skipped_in_a_row: updates skipped since the last one that was applied.
    indecisive_in_a_row: steps since the last one with a verdict that preferred a response.
    """

    queries: int = 0
    evaluation_queries: int = 0
    skipped_in_a_row: int = 0
    indecisive_in_a_row: int = 0


@dataclasses.dataclass(frozen=True)
class Status:
    """The state of a run besides its weights at the end of a step, as checkpoints carry it.

    counters: see `Counters`.
    failure_tolerance: the state of `judges.limits.FailureTolerance`; () for a new run.
    offsets: the length in bytes of each process's pairs log, by file name; also of those that earlier starts had and
      the present one has not.
    drawn: samples for the next step, if they were drawn already.
    """

    counters: Mapping[str, int]
    failure_tolerance: Sequence[Any]
    offsets: Mapping[str, int]
    drawn: EarlySamples | None = None

    def as_extra(self) -> dict[str, Any]:
        """Return it as a checkpoint carries it, as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "drawn": {} if self.drawn is None else self.drawn.encoded()}


@dataclasses.dataclass(frozen=True)
class Restored:
    """Where a run starts; `Restored()` is a new run.

    step: the restored checkpoint's, or None.
    status: at the end of that step.
    identity: as `check_identity` returned it to the run that saved the checkpoint.
    """

    step: int | None = None
    status: Status | None = None
    identity: Mapping[str, Any] | None = None

    @property
    def offsets(self) -> Mapping[str, int]:
        """The lengths that the pairs logs had, by file name."""
        return {} if self.status is None else self.status.offsets

    @property
    def drawn(self) -> EarlySamples | None:
        """Samples for the next step, see `Status`."""
        return None if self.status is None else self.status.drawn

    def offsets_after(self, written: Mapping[str, int]) -> dict[str, int]:
        """Return the lengths of all pairs logs, given those that the present processes have written.

        The logs of processes that this start does not have keep the length at which they were restored.
        """
        return {**self.offsets, **written}


def find_newest(run: RunDir, steps: int) -> int | None:
    """Return the newest step whose checkpoint verifies, or None.

    Args:
      steps: of the whole run.

    Raises:
      CheckpointError: it is beyond the run's last step.
    """
    newest: int | None = run_on_lead("looking for a checkpoint", checkpoint.latest, run.checkpoints)
    if newest is not None and newest > steps:
        raise CheckpointError(
            f"{run.checkpoints / str(newest)}: is beyond the last step, {steps}; raise steps, or give another"
            " --config.run_dir"
        )
    return newest


def restore(run: RunDir, step: int, like: TrainState) -> tuple[TrainState, Restored]:
    """Return the state of the checkpoint that `find_newest` found, and where the run stood.

    Args:
      like: see `checkpoint.restore`.

    Raises:
      CheckpointError: it does not fit this run, or was saved by another version.
    """
    state, extra = checkpoint.restore(run.checkpoints, step, like, verified=True)
    fields = "counters", "failure_tolerance", "offsets"
    if not {*fields, "config", "reference"} <= extra.keys():
        raise CheckpointError(
            f"{run.checkpoints / str(step)}: was saved by another version of xpo_jax; finish the run with that"
            " version, or give another --config.run_dir"
        )
    identity = {name: extra[name] for name in ("config", "reference")}
    drawn = EarlySamples.decoded(extra.get("drawn", {}))
    status = Status(extra["counters"], extra["failure_tolerance"], extra["offsets"], drawn)
    return state, Restored(step, status, identity)


def restore_state(run: RunDir, step: int, like: TrainState) -> TrainState:
    """Return the state of any checkpoint of the run, and nothing else of it."""
    return checkpoint.restore(run.checkpoints, step, like)[0]


def check_identity(
    run: RunDir, restored: Restored, reference: int, *, accept_changes: bool
) -> dict[str, Any]:
    """Return what must not change in a run, as its checkpoints carry it.

    Args:
      reference: checksum of the reference's weights.
      accept_changes: of config and reference.

    Raises:
      CheckpointError: the restored run had another reference or config, unless that is accepted.
    """
    identity = {"config": run.fixed, "reference": reference}
    for name, what in (("reference", "another reference"), ("config", "another config")):
        before = identity[name] if restored.identity is None else restored.identity[name]
        if before != identity[name] and not accept_changes:
            raise CheckpointError(
                f"{run.checkpoints / str(restored.step)}: was trained with {what} (fingerprint {before} there,"
                f" {identity[name]} here); restore what it was trained with, or add --accept-changes"
            )
    return identity


class CheckpointSession:
    """Saves the checkpoints of a run; a context that waits at its end until the last one is complete.

    Args:
      run: the run directory.
      schedule: when checkpoints are saved, and which stay. selection: which is the best.
      reference_step: see `settings.Model`; a checkpoint keeps that of the step in which its reference was the policy.
      identity: as `check_identity` returns it.
      restored_step: the step that the run resumes from, which is saved already; None for a new run.
    """

    def __init__(
        self,
        run: RunDir,
        schedule: settings.Checkpoint,
        selection: Selection,
        *,
        reference_step: Callable[[int], int],
        identity: Mapping[str, Any],
        restored_step: int | None,
    ):
        self._run, self._schedule, self._reference_step = run, schedule, reference_step
        self._selection = selection
        self._identity, self._saved = identity, restored_step
        self._checkpoints = Checkpoints(
            run.checkpoints,
            keep_last=schedule.keep_last,
            keep_every=schedule.keep_every,
            criterion=selection.criterion,
        )

    def is_due(self, step: int, *, evaluated: bool) -> bool:
        """Return whether the state after `step` steps is saved even if the run continues."""
        best = evaluated and self._selection.chooses
        becomes_reference = step > 0 and self._reference_step(step) == step
        every = self._schedule.every_steps
        return best or becomes_reference or bool(every and step and step % every == 0)

    def save(self, step: int, state: TrainState, status: Status, *, score: float | None) -> None:
        """Begin to save the state after `step` steps, unless it is saved; see `Checkpoints.save`.

        Args:
          status: at the end of that step.
          score: see `Selection.score`; None if it was not evaluated.
        """
        if self._saved == step:
            return
        self._run.push()  # first, so that the logs reach at least as far as the newest checkpoint
        extra = {**self._identity, **status.as_extra()}
        self._checkpoints.save(step, state, extra, score=score, needs=self._reference_step(step) or None)
        self._saved = step

    def wait(self) -> None:
        """Wait until the checkpoint under way is complete."""
        self._checkpoints.wait()

    def folder(self, step: int) -> epath.Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self._run.checkpoints / str(step)

    def best(self) -> int | None:
        """Return the step with the best score among the checkpoints; None if the judge had no verdict."""
        root, criterion = self._run.checkpoints, self._selection.criterion
        best: int | None = run_on_lead("looking for the best checkpoint", best_step, root, criterion)
        return best

    def __enter__(self) -> Self:
        self._checkpoints.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpoints.__exit__(kind, error, trace)
