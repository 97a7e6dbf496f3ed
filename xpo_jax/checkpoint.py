"""Checkpoints through Orbax, verified: what is restored is bit for bit what was saved, or an error.

    checkpoints/<step>/state/           the TrainState, as Orbax lays it out
    checkpoints/<step>/checkpoint.json  step, dtype and shape of every leaf, what train adds
    checkpoints/<step>/manifest.sha256  written last, SHA-256 of each file above

A checkpoint without a manifest is not one. Orbax alone restores a flipped bit and casts a dtype
without a word, hence the manifest and the leaves. `sha256sum -c manifest.sha256` checks it by hand.

Of many processes each writes and reads what its devices hold, on a disk that all share; process 0 makes
the folder and the files beside state/, and verifies.

Left out on purpose: saving in the background, and retention. Random keys are not stored: they follow
from the seed and the step.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from xpo_jax import distributed
from xpo_jax.distributed import Together
from xpo_jax.files import atomic_write
from xpo_jax.values import TrainState

MANIFEST = "manifest.sha256"
_FORMAT = "xpo_jax checkpoint"
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be saved or restored; one line that says what, where and how to mend it."""


def save(path: str | Path, step: int, state: TrainState, extra: Mapping[str, Any]) -> Path:
    """Save the state as <path>/<step>/ and wait until it is on disk, manifest last. All processes call it.

    Args:
      path: the folder of the checkpoints.
      step: updates done so far.
      state: arrays, on the devices or on the host.
      extra: what JSON holds, exactly; returned by `restore`.

    Returns:
      The folder of the checkpoint.

    Raises:
      CheckpointError: if it cannot be written, or that step is there already and whole. What was
        half-written is removed.
    """
    folder = _folder(path, step)
    state = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), state)
    about = {"format": _FORMAT, "version": 1, "step": step, "leaves": _leaves(state), "extra": extra}
    leads = distributed.leads()
    with Together("starting a checkpoint"):
        if leads:
            _make_room(path, step)
    try:
        with Together("starting a checkpoint"), _told(folder):
            text = json.dumps(about, indent=1, allow_nan=False)
            if leads:
                folder.mkdir(parents=True)
        with _told(
            folder
        ):  # Orbax waits for all processes itself; one that fails here ends, and so the others
            args = ocp.args.PyTreeSave(state)
            _orbax(lambda orbax: orbax.save(folder.absolute() / "state", args=args), _whole_arrays())
        with Together("sealing a checkpoint"), _told(folder):
            if leads:
                atomic_write(folder / "checkpoint.json", text + "\n")
                _flush(folder)
                sums = "".join(f"{_sha256(folder / name)}  {name}\n" for name in _files(folder))
                atomic_write(folder / MANIFEST, sums)
    except BaseException:
        if leads:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _make_room(path: str | Path, step: int) -> None:
    folder = _folder(path, step)
    try:
        verify(path, step)
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left, or what is damaged
    else:
        raise CheckpointError(f"{folder}: is there already; delete it to save that step again")


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: cannot be saved ({reason}); free space or mend the rights"
        ) from error


def restore(path: str | Path, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Verify the checkpoint of a step and restore it into the given shardings. All processes call it.

    Args:
      path: the folder of the checkpoints.
      step: which one; see `latest`.
      like: a TrainState of jax.ShapeDtypeStruct with shardings, or of arrays.

    Returns:
      The state, and the `extra` it was saved with.

    Raises:
      CheckpointError: if a file is missing, damaged or foreign, or a leaf differs in dtype or shape
        from `like`, or is on one side only.
    """
    with Together("verifying a checkpoint"):
        if distributed.leads():
            verify(path, step)
    folder = _folder(path, step)
    about = json.loads((folder / "checkpoint.json").read_bytes())
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
    args = ocp.args.StandardRestore(target)
    try:
        handler = ocp.StandardCheckpointHandler()
        state = _orbax(lambda orbax: orbax.restore(folder.absolute() / "state", args=args), handler)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: cannot be restored ({error}); use an older one") from error
    return state, about["extra"]


def verify(path: str | Path, step: int) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
      CheckpointError: naming the first file that is missing, damaged or not of this checkpoint.
    """
    folder = _folder(path, step)
    mend = "delete that checkpoint to use an older one"
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise CheckpointError(f"{folder / MANIFEST}: {reason}, so nothing vouches for it; {mend}") from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = _files(folder)
    for name in {*sums, "checkpoint.json"}.difference(present):
        raise CheckpointError(f"{folder / name}: is missing; {mend}")
    for name in present:
        if name not in sums:
            raise CheckpointError(f"{folder / name}: is not a file of this checkpoint; remove it or {mend}")
        if _sha256(folder / name) != sums[name]:
            raise CheckpointError(f"{folder / name}: is damaged (its SHA-256 differs); {mend}")


def latest(path: str | Path) -> int | None:
    """The newest step that verifies; damaged ones are passed over, each with a warning in the log."""
    folders = Path(path).glob("*")
    for step in sorted((int(f.name) for f in folders if f.name.isdecimal() and f.is_dir()), reverse=True):
        try:
            verify(path, step)
            return step
        except CheckpointError as error:
            _log.warning("checkpoint %d is passed over: %s", step, error)
    return None


def _folder(path: str | Path, step: int) -> Path:
    return Path(path) / str(int(step))


def _files(folder: Path) -> list[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Force files and folders to disk, so that a manifest that is there means the rest is too."""
    for entry in (folder, *folder.rglob("*")):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves]


def _leaves(tree: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in _named(tree)}


def _whole_arrays() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler, but one device writes what several hold alike.

    By default each of them cuts its part out first, with a program that is compiled per shape and device
    in the middle of the run.
    """
    kinds = ocp.type_handlers
    registry = kinds.create_type_handler_registry(
        (jax.Array, kinds.ArrayHandler(use_replica_parallel=False)), (np.ndarray, kinds.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _orbax(work: Callable[[ocp.Checkpointer], Any], handler: ocp.CheckpointHandler) -> Any:
    """Let Orbax work, and turn what it raises into one line without the tracebacks it also prints.

    Synchronous on purpose: orbax.checkpoint.v1 (0.12.8) leaves threads behind when a folder cannot be
    created, which keep the process from exiting for twenty minutes.
    """
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [log.disabled for log in logs]
    try:
        for log in logs:
            log.disabled = True
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                return work(checkpointer)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        gc.collect()  # other tasks that failed with it complain when they are collected: now, unheard
    finally:
        for log, disabled in zip(logs, before, strict=True):
            log.disabled = disabled
    raise CheckpointError(reason)


class Checkpoints:
    def __init__(self, path, *, keep_last, keep_every=None):
        self.path = path

    def save(self, step, state, extra, *, score=None, hold=False):
        save(self.path, step, state, extra)

    def wait(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
