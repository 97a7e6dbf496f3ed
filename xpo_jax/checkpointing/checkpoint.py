"""Checkpoints through Orbax, verified: what is restored is bit for bit what was saved, or an error.

    checkpoints/<step>/state/           the TrainState, as Orbax lays it out
    checkpoints/<step>/checkpoint.json  step, dtype and shape of every leaf, score, what train adds
    checkpoints/<step>/manifest.sha256  written last, SHA-256 of each file above; see manifest.py

A checkpoint without a manifest is not one. Orbax alone restores a flipped bit and casts a dtype
without a word, hence the manifest and the leaves. `sha256sum -c manifest.sha256` checks it by hand.

Of many processes each writes and reads what its devices hold, on a disk that all share or in a bucket (gs://);
process 0 makes the folder and the files beside state/. Saving goes on in the background, where processes wait for
each other through Orbax alone, never in a computation of the devices.

Left out on purpose: going on where one of many processes cannot write. It raises and ends, and so the others do.
Random keys are not stored: they follow from the seed and the step.
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

from xpo_jax.checkpointing import manifest, orbax_backend, retention
from xpo_jax.checkpointing.manifest import CheckpointError
from xpo_jax.checkpointing.retention import ABOUT
from xpo_jax.io import paths
from xpo_jax.io.files import WriteError
from xpo_jax.io.text import error_line
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import Failed, all_or_none
from xpo_jax.values import TrainState

_FORMAT = "xpo_jax checkpoint"
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run: saved in the background, verified, kept by rule.

        with Checkpoints(run / "checkpoints", keep_last=2) as checkpoints:
            checkpoints.save(step, state, extra)

    Only when a new one is whole are older ones removed: all but the newest, those of certain steps, those that are
    held, and the one of the highest score. What a killed process left half-written goes with them.

    Args:
      path: their folder; made by the first `save`.
      keep_last: how many of the newest stay; None for all.
      keep_every: those whose step it divides stay, too.
      background: `save` returns before the new one is whole.
    """

    def __init__(
        self,
        path: str | Path | epath.Path,
        *,
        keep_last: int | None,
        keep_every: int | None = None,
        background: bool = True,
    ):
        self._path = paths.find(path)
        self._keep_last, self._keep_every, self._background = keep_last, keep_every, background
        self._thread: threading.Thread | None = None
        self._problem: CheckpointError | None = None
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

        Returns once the arrays have been copied from the devices: their buffers may be donated, and `extra` changed.

        Args:
          step: updates done so far.
          state: arrays, on the devices or on the host.
          extra: what JSON holds, exactly; returned by `restore`.
          score: the higher the better, such as the held-out win rate; None for not known.
          needs: the step of another one that stays as long as this one does.
          hold: never remove this one by rule.

        Raises:
          CheckpointError: of this one or the one before, which could not be written; what was half-written is
            removed. Also if that step is there already and whole.
        """
        self.wait()
        folder = self._path / str(step)
        state = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), state)
        about = {"format": _FORMAT, "version": 1, "step": step, "hold": hold, "needs": needs}
        about["score"] = None if score is None else float(score)
        with all_or_none("starting a checkpoint"), _told(folder):
            text = json.dumps({**about, "leaves": _leaves(state), "extra": extra}, indent=1, allow_nan=False)
            if distributed.is_lead_process():
                _make_room(folder)
                folder.mkdir(parents=True)
        writer = orbax_backend.Writer(f"checkpoint-{step}")
        try:
            with _told(folder):
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
        """Wait until the one under way is whole, on every process.

        Raises:
          CheckpointError: if it could not be written.
        """
        if not self._joined():
            return
        problem, self._problem = self._problem, None
        if problem and not self._written:
            raise problem  # not together: the others may wait in Orbax for this process
        with all_or_none("sealing a checkpoint"):
            if problem:
                raise problem

    def close(self) -> None:
        """The same as `wait`: there is nothing else to let go of."""
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif jax.process_count() == 1 or isinstance(error, Failed):  # else others may never come
            self._joined()
            if self._problem:
                _log.warning("%s", self._problem)

    def _joined(self) -> bool:
        """Waits for the thread, if there is one."""
        if self._thread is None:
            return False
        self._thread.join()
        self._thread = None
        return True

    def _finish(self, writer: orbax_backend.Writer, folder: epath.Path, text: str) -> None:
        """In the background: wait for the files of all processes, then seal them and remove older checkpoints."""
        try:
            with _told(folder):
                writer.finish()
                self._written = True
                if distributed.is_lead_process():
                    paths.write(folder / ABOUT, text + "\n")
                    manifest.seal(folder)
        except BaseException as error:
            self._problem = error if isinstance(error, CheckpointError) else CheckpointError(repr(error))
            _discard(folder)
            return
        if distributed.is_lead_process():
            try:
                retention.remove_old(
                    self._path, int(folder.name), keep_last=self._keep_last, keep_every=self._keep_every
                )
            except Exception as error:  # tried again after the next one; this one is whole
                _log.warning("%s: older checkpoints cannot be removed (%s)", self._path, error)


def save(path: str | Path | epath.Path, step: int, state: TrainState, extra: Mapping[str, Any]) -> epath.Path:
    """Save one checkpoint and wait until it is whole; nothing is removed. See `Checkpoints.save`.

    Returns:
      Its folder.
    """
    with Checkpoints(path, keep_last=None, background=False) as checkpoints:
        checkpoints.save(step, state, extra)
    return _folder(path, step)


def restore(
    path: str | Path | epath.Path, step: int, like: TrainState, *, verified: bool = False
) -> tuple[TrainState, dict[str, Any]]:
    """Verify the checkpoint of a step and restore it into the given shardings. All processes call it.

    Args:
      path: the folder of the checkpoints.
      step: which one; see `latest`.
      like: a TrainState of jax.ShapeDtypeStruct with shardings, or of arrays.
      verified: `latest` has just read every file of it, which need not be done twice.

    Returns:
      The state, and the `extra` it was saved with.

    Raises:
      CheckpointError: if a file is missing, damaged or foreign, or a leaf differs in dtype or shape
        from `like`, or is on one side only.
    """
    folder = _folder(path, step)
    if not verified:
        with all_or_none("verifying a checkpoint"):  # each process its share of the files
            share = slice(jax.process_index(), None, jax.process_count())
            manifest.verify(folder, needed=[ABOUT], share=share)
    about = json.loads((folder / ABOUT).read_text())
    if about.get("format") != _FORMAT or about.get("version") != 1 or about.get("step") != step:
        raise CheckpointError(f"{folder}: is not the checkpoint of step {step}; put back the right folder")
    there, here = about["leaves"], _leaves(like)
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        shown = [
            f"{n} is {there.get(n, 'absent')} there, {here.get(n, 'absent')} here" for n in differing[:3]
        ]
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{folder}: does not fit this model or optimizer ({'; '.join(shown)}{more}); use its config"
        )
    for name, leaf in _named(like):
        if getattr(leaf, "sharding", None) is None:
            raise CheckpointError(f"{folder}: no sharding is given for {name}; give one for each leaf")
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
    try:
        state = orbax_backend.read(folder / "state", target)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: cannot be restored ({error_line(error)}); use an older one"
        ) from error
    return state, about["extra"]


def verify(path: str | Path | epath.Path, step: int) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
      CheckpointError: naming the first file that is missing, damaged or not of this checkpoint.
    """
    manifest.verify(_folder(path, step), needed=[ABOUT])


def latest(path: str | Path | epath.Path) -> int | None:
    """The newest step that verifies; damaged ones are passed over, each with a warning in the log."""
    for step in reversed(retention.steps_in(paths.find(path))):
        try:
            verify(path, step)
            return step
        except CheckpointError as error:
            _log.warning("checkpoint %d is passed over: %s", step, error)
    return None


def _folder(path: str | Path | epath.Path, step: int) -> epath.Path:
    return paths.find(path) / str(int(step))


def _make_room(folder: epath.Path) -> None:
    try:
        manifest.verify(folder, needed=[ABOUT])
    except CheckpointError:
        manifest.remove(folder)  # what a killed process left, or what is damaged
    else:
        raise CheckpointError(f"{folder}: is there already; delete it to save that step again")


def _discard(folder: epath.Path) -> None:
    if distributed.is_lead_process():
        with contextlib.suppress(
            OSError
        ):  # there is an error to tell, and without a manifest it does no harm
            manifest.remove(folder)


@contextlib.contextmanager
def _told(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except WriteError as error:  # tells where and how to mend it itself
        raise CheckpointError(str(error)) from error
    except Exception as error:
        raise CheckpointError(
            f"{folder}: cannot be saved ({error_line(error)}); free space or fix the permissions"
        ) from error


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves]


def _leaves(tree: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in _named(tree)}
