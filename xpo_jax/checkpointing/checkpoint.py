"""Checkpoints through Orbax, verified: what is restored is bit for bit what was saved, or an error.

    checkpoints/<step>/state/           the TrainState, as Orbax lays it out
    checkpoints/<step>/checkpoint.json  step, dtype and shape of every leaf, score, the run's counters
    checkpoints/<step>/manifest.sha256  written last, SHA-256 of each file above; see manifest.py

A folder without a manifest is no checkpoint. Orbax alone restores a flipped bit and casts a dtype
silently, hence the manifest and the list of leaves. `sha256sum -c manifest.sha256` checks one by hand.

With several processes, each writes and reads what its devices hold, on a shared disk or in a bucket (gs://);
process 0 makes the folder and the files beside state/. Files are written in the background, where processes wait
for each other through Orbax only, never in a computation on the devices.

Left out on purpose: continuing when one of several processes cannot write (it raises and ends, and so do the others),
and random keys, which follow from the seed and the step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from etils import epath

from xpo_jax.checkpointing import leaves, manifest, orbax_backend, retention
from xpo_jax.checkpointing.manifest import CheckpointError
from xpo_jax.checkpointing.retention import METADATA
from xpo_jax.io import paths
from xpo_jax.io.files import WriteError
from xpo_jax.io.text import error_line
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import Failed, all_or_none
from xpo_jax.values import TrainState

_FORMAT = "xpo_jax checkpoint"
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run: saved in the background, and removed by rule.

        with Checkpoints(run / "checkpoints", keep_last=2) as checkpoints:
            checkpoints.save(step, state, extra)

    Older checkpoints are removed only when a new one is complete, see `retention.kept_steps`; what a killed process
    left half-written is removed with them.

    Args:
      path: their folder; made by the first `save`.
      keep_last: how many of the newest are kept; None for all.
      keep_every: checkpoints of multiples of this step are kept, too; None for no others.
      background: whether `save` returns before the new checkpoint is complete. criterion: of the scores.
    """

    def __init__(
        self,
        path: str | Path | epath.Path,
        *,
        keep_last: int | None,
        keep_every: int | None = None,
        background: bool = True,
        criterion: str = retention.WIN_RATE,
    ):
        self._path, self._criterion = paths.absolute(path), criterion
        self._keep_last, self._keep_every, self._background = keep_last, keep_every, background
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._written = False

    def save(
        self,
        step: int,
        state: TrainState,
        extra: Mapping[str, Any],
        *,
        score: float | None = None,
        needs: int | None = None,
        hold: bool = False,
    ) -> None:
        """Save the state as <path>/<step>/. All processes call it, at the same step.

        It returns once the arrays have been copied from the devices: their buffers may then be donated.

        Args:
          step: updates done so far.
          state: arrays, on the devices or on the host.
          extra: values that JSON can hold; `restore` returns them.
          score: higher is better, such as the held-out win rate; None if it is not known.
          needs: the step of another checkpoint, which is kept as long as this one is.
          hold: never remove this one by rule.

        Raises:
          CheckpointError: this checkpoint or the one before cannot be written (what was half-written is removed),
            or a complete one of that step exists.
        """
        self.wait()
        folder = self._path / str(step)
        state = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), state)
        metadata = {"format": _FORMAT, "version": 1, "step": step, "hold": hold, "needs": needs}
        metadata |= {"score": None if score is None else float(score), "criterion": self._criterion}
        with all_or_none("starting a checkpoint"), _as_checkpoint_error(folder):
            text = json.dumps(
                {**metadata, "leaves": leaves.describe(state), "extra": extra}, indent=1, allow_nan=False
            )
            if distributed.is_lead_process():
                _remove_incomplete(folder)
                folder.mkdir(parents=True)
        writer = orbax_backend.Writer(f"checkpoint-{step}")
        try:
            with _as_checkpoint_error(folder):
                writer.start(folder / "state", state)
        except BaseException:
            with contextlib.suppress(Exception):
                writer.finish()
            _discard(folder)
            raise
        self._written = False
        self._thread = threading.Thread(target=self._finish, args=(writer, folder, text), name="checkpoint")
        self._thread.start()
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, on every process.

        Raises:
          CheckpointError: it could not be written.
        """
        if not self._join():
            return
        failure, self._failure = self._failure, None
        if failure and not self._written:
            raise failure  # without the others, which may wait in Orbax for this process
        with all_or_none("sealing a checkpoint"):
            if failure:
                raise failure

    def close(self) -> None:
        """Wait, see `wait`; nothing else has to be released."""
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif jax.process_count() == 1 or isinstance(error, Failed):  # else the others may never arrive
            self._join()
            if self._failure:
                _log.warning("%s", self._failure)

    def _join(self) -> bool:
        """Wait for the thread; return whether there was one."""
        if self._thread is None:
            return False
        self._thread.join()
        self._thread = None
        return True

    def _finish(self, writer: orbax_backend.Writer, folder: epath.Path, text: str) -> None:
        """Wait for the files of all processes, then seal them and remove older checkpoints; runs in the thread."""
        try:
            with _as_checkpoint_error(folder):
                writer.finish()
                self._written = True
                if distributed.is_lead_process():
                    paths.write(folder / METADATA, text + "\n")
                    manifest.seal(folder)
        except BaseException as error:
            self._failure = error if isinstance(error, CheckpointError) else CheckpointError(repr(error))
            _discard(folder)
            return
        if distributed.is_lead_process():
            try:
                keep = {"keep_last": self._keep_last, "keep_every": self._keep_every}
                retention.remove_old(self._path, int(folder.name), **keep, criterion=self._criterion)
            except Exception as error:  # tried again after the next one; this one is complete
                _log.warning("%s: older checkpoints cannot be removed (%s)", self._path, error)


def save(path: str | Path | epath.Path, step: int, state: TrainState, extra: Mapping[str, Any]) -> epath.Path:
    """Save one checkpoint, wait until it is complete, and return its folder; none is removed."""
    with Checkpoints(path, keep_last=None, background=False) as checkpoints:
        checkpoints.save(step, state, extra)
    return _folder(path, step)


def restore(
    path: str | Path | epath.Path, step: int, like: TrainState, *, verified: bool = False
) -> tuple[TrainState, dict[str, Any]]:
    """Verify the checkpoint of a step and restore it into the shardings of `like`. All processes call it.

    Args:
      path: the folder of the checkpoints.
      step: which one; see `latest`.
      like: a TrainState of jax.ShapeDtypeStruct with shardings, or of arrays.
      verified: whether `latest` has just read and verified all of its files.

    Returns:
      The state, and the `extra` it was saved with.

    Raises:
      CheckpointError: a file is missing, damaged or foreign, or a leaf has another dtype or shape than in `like`,
        or exists only in one of the two.
    """
    folder = _folder(path, step)
    if not verified:
        with all_or_none("verifying a checkpoint"):  # each process reads every n-th file
            files = slice(jax.process_index(), None, jax.process_count())
            manifest.verify(folder, needed=[METADATA], files=files)
    metadata = json.loads((folder / METADATA).read_text())
    if metadata.get("format") != _FORMAT or metadata.get("version") != 1 or metadata.get("step") != step:
        raise CheckpointError(f"{folder}: is not the checkpoint of step {step}; put back the right folder")
    leaves.require_equal(folder, metadata["leaves"], leaves.describe(like))
    for name, leaf in leaves.named(like):
        if getattr(leaf, "sharding", None) is None:
            raise CheckpointError(f"{folder}: {name} has no sharding; give one for each leaf")
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
    try:
        state = orbax_backend.read(folder / "state", target)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: cannot be restored ({error_line(error)}); use an older one"
        ) from error
    return state, metadata["extra"]


def verify(path: str | Path | epath.Path, step: int) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
      CheckpointError: names the first file that is missing, damaged or not of this checkpoint.
    """
    manifest.verify(_folder(path, step), needed=[METADATA])


def latest(path: str | Path | epath.Path) -> int | None:
    """Return the newest step whose checkpoint verifies, and the one that it needs as well.

    Others are passed over, each with a warning in the log.
    """
    for step in reversed(retention.steps_in(paths.absolute(path))):
        try:
            verify(path, step)
            needed = json.loads((_folder(path, step) / METADATA).read_text()).get("needs")
            if needed not in (None, step):
                verify(path, needed)
            return step
        except CheckpointError as error:
            _log.warning("checkpoint %d is passed over: %s", step, error)
    return None


def _folder(path: str | Path | epath.Path, step: int) -> epath.Path:
    return paths.absolute(path) / str(int(step))


def _remove_incomplete(folder: epath.Path) -> None:
    try:
        manifest.verify(folder, needed=[METADATA])
    except CheckpointError:
        manifest.remove(folder)  # what a killed process left, or what is damaged
    else:
        raise CheckpointError(f"{folder}: already exists; delete it to save that step again")


def _discard(folder: epath.Path) -> None:
    if distributed.is_lead_process():
        # An error is being reported already, and without a manifest the folder does no harm.
        with contextlib.suppress(OSError):
            manifest.remove(folder)


@contextlib.contextmanager
def _as_checkpoint_error(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except WriteError as error:  # it states where and how to fix it
        raise CheckpointError(str(error)) from error
    except Exception as error:
        raise CheckpointError(
            f"{folder}: cannot be saved ({error_line(error)}); free space or fix the permissions"
        ) from error
