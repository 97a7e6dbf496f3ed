"""A run directory in a bucket: its small files are written on this machine and copied there.

Checkpoints do not pass through it: Orbax writes <run_dir>/checkpoints from every process. A push comes before the
save of the same step, so that the logs reach at least as far as the newest checkpoint; a restore cuts them back
to it. What was logged after the last push is lost with the machine.

No library replaces it: gcsfs and etils.epath copy single files, and fsspec's rsync neither orders the marker first and
the result last, nor verifies names, nor has a lease; and the logs are appended to, which objects in a bucket cannot be.

Left out on purpose: deleting anything in the bucket, so that an emptied local folder loses nothing there.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import socket
import tempfile
from pathlib import Path

from etils import epath

from xpo_jax.experiment.bucket_lease import LEASE, Lease, RemoteError
from xpo_jax.io import paths
from xpo_jax.io.text import error_line
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none

_FIRST, _LAST = "xpo_jax_run.json", "result.json"  # they mark a folder as a run, and a run as finished


class Mirror:
    """Copies the files of a run directory between its bucket and this machine, except for those in checkpoints/.

    Args:
      remote: the run directory, gs://.
      local: the folder in which this process works on its files; nothing else uses it.
    """

    def __init__(self, remote: str | Path | epath.Path, local: str | Path):
        self._remote, self._local = paths.absolute(remote), Path(local)
        self._synced: dict[
            str, tuple[int, int]
        ] = {}  # size and modification time of files equal on both sides

    def pull(self) -> None:
        """Fetch every file.

        Raises:
          RemoteError: a file cannot be read, or its name leads out of the folder; before any is fetched, a folder
            that is not empty and not a run.
        """
        try:
            if not (self._remote / _FIRST).exists():
                others = [f.name for f in self._remote.iterdir()] if self._remote.is_dir() else []
                if others := sorted(name for name in others if name != LEASE)[:3]:
                    raise RemoteError(
                        f"{self._remote}: is not empty and not a run of xpo_jax (it holds {', '.join(others)}); give"
                        " another --config.run_dir"
                    )
        except RemoteError:
            raise
        except Exception as error:  # those of a missing login or network share no class
            reason = error_line(error, with_class=True)
            raise RemoteError(
                f"{self._remote}: cannot be read ({reason}); fix the login (GOOGLE_APPLICATION_CREDENTIALS), the"
                " permissions or the network"
            ) from error
        for name in self._remote_names():
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
            self._synced[name] = _signature(target)

    def push(self, only: str | None = None) -> list[str]:
        """Copy the files that have changed here since the last copy; each object is replaced completely.

        Args:
          only: the one file that may be copied; None for any.

        Returns:
          Their names, in the order in which they were copied: the marker of a run first, its result last.

        Raises:
          RemoteError: a file cannot be written. Those copied before it stay.
        """
        files = (file for file in self._local.rglob("*") if file.is_file() and file.suffix != ".tmp")
        names = (file.relative_to(self._local).as_posix() for file in files)
        pushed = []
        for name in sorted(names, key=lambda n: (n != _FIRST, n == _LAST, n)):
            # taken before the copy, so that what is appended during it goes with the next push
            signature = _signature(self._local / name)
            if (
                name.startswith("checkpoints/")
                or self._synced.get(name) == signature
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
            self._synced[name] = signature
            pushed.append(name)
        return pushed

    def _remote_names(self) -> list[str]:
        top = str(self._remote).rpartition("://")[2]
        remote_names = []
        for root, folders, names in self._remote.walk():
            inside = posixpath.relpath(str(root).rpartition("://")[2], top)
            if inside == ".":
                folders[:] = [name for name in folders if name != "checkpoints"]  # large, and not copied
            remote_names += [posixpath.normpath(f"{inside}/{name}") for name in names]
        return sorted(name for name in remote_names if name != LEASE)


class BucketWorkdir:
    """The local folder in which a process works on a run directory in a bucket; every process of the run makes one.

    address: the run directory, gs://.
    local: the folder, with the files of the run except for its checkpoints.

    Raises:
      RemoteError: another run holds it, or it cannot be read; on all processes.
    """

    def __init__(self, remote: str):
        self.address = remote
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
        """Copy what has changed; all processes call it. Process 0 copies everything but the others' pairs logs."""
        with all_or_none("copying the run directory to its bucket"):
            if self._lease:
                self._lease.check()
            self._mirror.push(None if distributed.is_lead_process() else distributed.file_name("pairs.jsonl"))

    def close(self) -> None:
        """Release the run directory and remove the local folder."""
        if self._lease:
            self._lease.release()
        shutil.rmtree(self.local, ignore_errors=True)


def _signature(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
