"""A run directory in a bucket: its small files are kept on this machine and copied there, and one run holds it.

Checkpoints do not pass through it: Orbax writes <run_dir>/checkpoints from every process. A push comes before the
save of the same step, so that the logs reach at least as far as the newest checkpoint; a restore cuts them back
to it. What was logged after the last push is lost with the machine.

Left out on purpose: removing anything in the bucket, so that an emptied working folder costs nothing there.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from etils import epath

from xpo_jax.io import paths
from xpo_jax.io.text import error_line
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none

LEASE = "lease.json"
LEASE_SECONDS = 120.0  # without a sign of life, after which a run is taken for dead
_FIRST, _LAST = "xpo_jax_run.json", "result.json"  # what marks a folder as a run, and a run as finished


class RemoteError(ValueError):
    """A run directory in a bucket cannot be used; one line that says what, where and how to mend it."""


class Mirror:
    """The files of a run directory here and in its bucket, but for those in checkpoints/.

    Args:
      remote: the run directory, gs://.
      local: where this process works on its files; a folder that nobody else uses.
    """

    def __init__(self, remote: str | Path | epath.Path, local: str | Path):
        self._remote, self._local = paths.absolute(remote), Path(local)
        self._known: dict[
            str, tuple[int, int]
        ] = {}  # size and time of change of what is the same on both sides

    def pull(self) -> None:
        """Fetch every file.

        Raises:
          RemoteError: if one cannot be read, or has a name that leads out of the folder; and of a folder that holds
            something, but is no run, before any is.
        """
        try:
            if not (self._remote / _FIRST).exists():
                others = [f.name for f in self._remote.iterdir()] if self._remote.is_dir() else []
                if others := sorted(name for name in others if name != LEASE)[:3]:
                    raise RemoteError(
                        f"{self._remote}: is not empty and not a run of xpo_jax (it holds {', '.join(others)}); give"
                        " another --config.run_dir"
                    )
        except OSError as error:
            raise RemoteError(
                f"{self._remote}: cannot be read ({error_line(error)}); fix the permissions"
            ) from error
        for name in self._names_there():
            target = self._local / name
            if not target.resolve().is_relative_to(self._local.resolve()):
                raise RemoteError(f"{self._remote / name}: leads out of its folder; remove that object")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                (self._remote / name).copy(target, overwrite=True)
            except Exception as error:
                raise RemoteError(
                    f"{self._remote / name}: cannot be read ({error_line(error)}); fix the permissions"
                ) from error
            self._known[name] = _signature(target)

    def push(self, only: str | None = None) -> list[str]:
        """Copy the files that have changed here since; each object is replaced whole.

        Args:
          only: the one file that may be copied; None for any.

        Returns:
          Their names, in the order in which they were copied: the marker of a run first, its result last.

        Raises:
          RemoteError: if one cannot be written. What was copied before it stays.
        """
        files = (file for file in self._local.rglob("*") if file.is_file() and file.suffix != ".tmp")
        names = (file.relative_to(self._local).as_posix() for file in files)
        pushed = []
        for name in sorted(names, key=lambda n: (n != _FIRST, n == _LAST, n)):
            signature = _signature(
                self._local / name
            )  # before: what is appended meanwhile goes with the next
            if (
                name.startswith("checkpoints/")
                or self._known.get(name) == signature
                or only not in (None, name)
            ):
                continue
            try:
                epath.Path(self._local / name).copy(self._remote / name, overwrite=True)
            except Exception as error:
                raise RemoteError(
                    f"{self._remote / name}: cannot be written ({error_line(error)});"
                    " fix the permissions or the network"
                ) from error
            self._known[name] = signature
            pushed.append(name)
        return pushed

    def _names_there(self) -> list[str]:
        top = str(self._remote).rpartition("://")[2]
        found = []
        for root, folders, names in self._remote.walk():
            inside = posixpath.relpath(str(root).rpartition("://")[2], top)
            if inside == ".":
                folders[:] = [name for name in folders if name != "checkpoints"]  # not walked into
            found += [posixpath.normpath(f"{inside}/{name}") for name in names]
        return sorted(name for name in found if name != LEASE)


class Lease:
    """That one run at a time writes into a folder of a bucket, where there are no locks: an object, renewed.

    Taken, renewed and given back under the condition that nobody changed it meanwhile, so that of two runs one gets
    it. A thread renews it; a run that is killed holds it until LEASE_SECONDS have passed. The clocks of the machines
    are taken to agree within a small part of that.

    Args:
      remote: the run directory.
      who: of the holder, for the message to others: host, pid.
      seconds: without a sign of life, after which a holder is taken for dead.

    Raises:
      RemoteError: if another run holds it, or the bucket cannot be reached.
    """

    def __init__(
        self, remote: str | Path | epath.Path, who: Mapping[str, Any], *, seconds: float = LEASE_SECONDS
    ):
        import tensorstore  # of Orbax; gcsfs knows no such conditions

        self._where, self._seconds = paths.absolute(remote), seconds
        self._who = {**who, "id": uuid.uuid4().hex}
        url = str(self._where) if paths.in_bucket(self._where) else f"file://{self._where}"
        self._lost: RemoteError | None = None
        self._released = threading.Event()
        try:
            self._store = tensorstore.KvStore.open(url.rstrip("/") + "/").result()
            there = self._store.read(LEASE).result()
            if there.state == "value":
                self._refuse_live(json.loads(there.value))
            self._generation = self._write(there.stamp.generation)
        except RemoteError:
            raise
        except Exception as error:
            raise RemoteError(
                f"{self._where / LEASE}: cannot be used ({error_line(error)}); fix the permissions or the network"
            ) from error
        if not self._generation:
            raise RemoteError(
                f"{self._where}: another run was faster to take it; give another --config.run_dir"
            )
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RemoteError if it was lost: another run took it, or it could not be renewed in time."""
        if self._lost:
            raise self._lost

    def release(self) -> None:
        """Give it back, if it is still ours; where that fails it runs out by itself."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            self._store.write(LEASE, None, if_equal=self._generation).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _refuse_live(self, there: Mapping[str, Any]) -> None:
        age = time.time() - there["time"]
        if age <= self._seconds:
            raise RemoteError(
                f"{self._where}: is in use by process {there.get('pid')} on {there.get('host')}, last heard of"
                f" {max(age, 0):.0f} s ago; stop it, or if it is dead try again {self._seconds - age:.0f} s from now"
            )

    def _write(self, generation: bytes) -> bytes:
        """The new generation; nothing if the condition did not hold."""
        text = json.dumps({**self._who, "time": time.time()})
        return self._store.write(LEASE, text.encode(), if_equal=generation).result().generation

    def _ours(self) -> bytes | None:
        """The generation that is there, if we wrote it: the answer to our last write was lost on its way."""
        there = self._store.read(LEASE).result()
        ours = there.state == "value" and json.loads(there.value).get("id") == self._who["id"]
        return there.stamp.generation if ours else None

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._released.wait(self._seconds / 8):
            try:
                generation = self._write(self._generation) or self._ours()
            except Exception as error:  # of the network; perhaps the next time
                if time.monotonic() - renewed > self._seconds / 2:
                    self._lost = RemoteError(
                        f"{self._where / LEASE}: cannot be renewed ({error_line(error)}); mend the network"
                    )
                    return
                continue
            if not generation:
                self._lost = RemoteError(f"{self._where}: was taken over by another run, so this one ends")
                return
            self._generation, renewed = generation, time.monotonic()


class BucketWorkdir:
    """Where a process works on a run directory that is in a bucket; every process of the run makes one.

    local: its folder on this machine, with the files of the run but for its checkpoints.

    Raises:
      RemoteError: if another run holds it, or it cannot be read; on all processes.
    """

    def __init__(self, remote: str):
        self._lease: Lease | None = None
        self.local = Path(tempfile.mkdtemp(prefix="xpo_jax-"))
        try:
            with all_or_none("taking the run directory"):
                if distributed.is_lead_process():
                    self._lease = Lease(remote, {"host": socket.gethostname(), "pid": os.getpid()})
            self._mirror = Mirror(remote, self.local)
            with all_or_none("fetching the run directory"):
                self._mirror.pull()
        except BaseException:
            self.close()
            raise

    def push(self) -> None:
        """Copy what has changed; all processes call it. Process 0 answers for all but the others' pairs logs."""
        with all_or_none("copying the run directory to its bucket"):
            if self._lease:
                self._lease.check()
            self._mirror.push(None if distributed.is_lead_process() else distributed.file_name("pairs.jsonl"))

    def close(self) -> None:
        """Give the run directory back, and remove the folder here."""
        if self._lease:
            self._lease.release()
        shutil.rmtree(self.local, ignore_errors=True)


def _signature(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
