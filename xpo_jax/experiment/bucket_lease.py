"""A lease on a run directory in a bucket: an object that says which run may write there."""

from __future__ import annotations

import contextlib
import json
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

LEASE = "lease.json"
LEASE_SECONDS = 120.0


class RemoteError(ValueError):
    """A run directory in a bucket cannot be used; one line that says what, where and how to fix it."""


class Lease:
    """Lets one run at a time write into a folder of a bucket.

    A bucket has no locks, so the lease is an object that its holder renews. It is written and deleted under the
    condition that nobody changed it in between, so only one of two competing runs gets it. A thread renews it; the
    lease of a killed run expires after LEASE_SECONDS. The clocks of the machines must agree within a small fraction of
    that.

    Args:
      remote: the run directory.
      holder: host and pid, for the error message on other machines.
      seconds: without a renewal, after which the holder counts as dead.

    Raises:
      RemoteError: if another run holds it, or the bucket cannot be reached.
    """

    def __init__(
        self, remote: str | Path | epath.Path, holder: Mapping[str, Any], *, seconds: float = LEASE_SECONDS
    ):
        import tensorstore  # comes with Orbax; gcsfs has no conditional writes

        self._folder, self._seconds = paths.absolute(remote), seconds
        self._holder = {**holder, "id": uuid.uuid4().hex}
        url = str(self._folder) if paths.in_bucket(self._folder) else f"file://{self._folder}"
        self._lost: RemoteError | None = None
        self._released = threading.Event()
        try:
            self._store = tensorstore.KvStore.open(url.rstrip("/") + "/").result()
            current = self._store.read(LEASE).result()
            if current.state == "value":
                self._refuse_live(json.loads(current.value))
            self._generation = self._write(current.stamp.generation)
        except RemoteError:
            raise
        except Exception as error:
            raise RemoteError(
                f"{self._folder / LEASE}: cannot be used ({error_line(error)}); fix the permissions or the network"
            ) from error
        if not self._generation:
            raise RemoteError(
                f"{self._folder}: another run was faster to take it; give another --config.run_dir"
            )
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RemoteError if the lease was lost: another run took it, or it could not be renewed in time."""
        if self._lost:
            raise self._lost

    def release(self) -> None:
        """Delete the lease if this run still holds it; if that fails, it expires by itself."""
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

    def _refuse_live(self, lease: Mapping[str, Any]) -> None:
        age = time.time() - lease["time"]
        if age <= self._seconds:
            raise RemoteError(
                f"{self._folder}: is in use by process {lease.get('pid')} on {lease.get('host')}, last heard of"
                f" {max(age, 0):.0f} s ago; stop it, or if it is dead try again in {self._seconds - age:.0f} s"
            )

    def _write(self, generation: bytes) -> bytes:
        """Write the lease and return its new generation; empty if somebody else changed it in between."""
        text = json.dumps({**self._holder, "time": time.time()})
        return self._store.write(LEASE, text.encode(), if_equal=generation).result().generation

    def _ours(self) -> bytes | None:
        """Return the current generation if this run wrote it: the response to its last write may have been lost."""
        current = self._store.read(LEASE).result()
        ours = current.state == "value" and json.loads(current.value).get("id") == self._holder["id"]
        return current.stamp.generation if ours else None

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._released.wait(self._seconds / 8):
            try:
                generation = self._write(self._generation) or self._ours()
            except Exception as error:  # a network error; the next renewal may succeed
                if time.monotonic() - renewed > self._seconds / 2:
                    self._lost = RemoteError(
                        f"{self._folder / LEASE}: cannot be renewed ({error_line(error)}); fix the network"
                    )
                    return
                continue
            if not generation:
                self._lost = RemoteError(f"{self._folder}: was taken over by another run, so this one ends")
                return
            self._generation, renewed = generation, time.monotonic()
