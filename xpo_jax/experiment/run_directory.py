"""The run directory: the small files that describe a run, and who writes them.

    <run>/xpo_jax_run.json  marks the folder as a run; locked while a process writes into it
    <run>/config.json       the config; `--config=<run>/config.json` runs it again
    <run>/inputs.json       fingerprints of the files and code that the config names, see inputs.py
    <run>/environment.json  versions, devices, git state, command line, data fingerprint
    <run>/samples/*.md      tables to look at; *.jsonl the same for programs
    <run>/result.json       written last: a run that has it is finished

Of many processes, process 0 opens the directory and writes the files above; the others join it, on a disk that all
share. An interrupted run is opened again with the same config, except for what config_changes.py allows; resume.py
determines the step to resume from. A run directory in a bucket (gs://) is worked on in a local folder of each process,
and copied there, see bucket_mirror.py. metrics.jsonl, tensorboard/, pairs.jsonl, evaluations/, checkpoints/, export/,
adapter/ and report.html are made by the modules that write them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from xpo_jax.experiment.bucket_mirror import BucketWorkdir
from xpo_jax.experiment.run_folder import (
    ELSEWHERE,
    OpenFolder,
    marker_time,
    open_folder,
    read_run_file,
    wait_for_folder,
)
from xpo_jax.io import paths
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.io.text import markdown_table
from xpo_jax.io.user_paths import expand
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none, run_and_gather


class RunDir:
    """A run directory, made by `RunDir.open` or `RunDir.join`.

    path: the absolute path; of one in a bucket, the local folder in which this process works on it.
    address: what people call it: the same, or the gs:// path.
    checkpoints: their folder, which every process writes into.
    result: what `finish` wrote, if this run is finished already, else None.
    fixed: hash of the config fields and inputs that may not change.
    changes: a line on each field or input that differs from the run's last start.

    Args:
      folder: on this machine.
      workdir: where the run directory is in a bucket.
      writes: whether this process writes the files that the run has once.
    """

    def __init__(self, folder: OpenFolder, *, workdir: BucketWorkdir | None, writes: bool):
        self.path, self.result = folder.path, folder.result
        self.fixed, self.changes = folder.fixed, folder.changes
        self.address = str(folder.path) if workdir is None else workdir.address
        self.checkpoints = paths.absolute(self.address) / "checkpoints"
        self._lock, self._workdir, self._writes = folder.lock, workdir, writes

    @classmethod
    def open(
        cls,
        path: str | Path,
        config_json: str,
        inputs: Mapping[str, str] = MappingProxyType({}),
        *,
        accept_changes: bool = False,
    ) -> RunDir:
        """Open a local run directory that this process alone writes into; see `run_folder.open_folder`."""
        folder = open_folder(path, config_json, inputs, accept_changes=accept_changes)
        return cls(folder, workdir=None, writes=True)

    @classmethod
    def join(
        cls, path: str | Path, config_json: str, inputs: Mapping[str, str], *, accept_changes: bool = False
    ) -> RunDir:
        """Open the run directory on process 0, and find the same one on the others.

        Raises: what `run_folder.open_folder` raises; on all processes, also if one of them does not see the folder.
        """
        path = expand(str(path))
        if paths.in_bucket(path):
            return cls._join_in_bucket(str(path).rstrip("/"), config_json, inputs, accept_changes)

        def open_on_lead() -> tuple[OpenFolder | None, list[Any] | None]:
            if not distributed.is_lead_process():
                return None, None
            folder = open_folder(path, config_json, inputs, accept_changes=accept_changes)
            shown = [str(folder.path), marker_time(folder.path), folder.result, folder.fixed, folder.changes]
            return folder, shown

        folder, values = run_and_gather("opening the run directory", open_on_lead)
        with all_or_none("finding the run directory"):
            if folder is None:
                lead_path, marker_second, result, fixed, changes = values[0]
                local_path = wait_for_folder(Path(lead_path), marker_second)
                folder = OpenFolder(local_path, None, result, fixed, tuple(changes))
        return cls(folder, workdir=None, writes=folder.lock is not None)

    @classmethod
    def _join_in_bucket(
        cls, address: str, config_json: str, inputs: Mapping[str, str], accept_changes: bool
    ) -> RunDir:
        if not address.startswith("gs://"):
            raise ValueError(f"{address}: a run directory is a folder or a gs:// path; {ELSEWHERE}")
        # without a network, Google's library tries for a quarter of an hour
        if distributed.is_lead_process():
            print(f"opening {address} ...", flush=True)
        workdir = BucketWorkdir(address)
        try:
            with all_or_none("opening the run directory"):
                folder = open_folder(workdir.local, config_json, inputs, accept_changes=accept_changes)
        except BaseException:
            workdir.close()
            raise
        return cls(folder, workdir=workdir, writes=distributed.is_lead_process())

    @property
    def shared(self) -> bool:
        """Whether all processes see the same folder."""
        return self._workdir is None

    def push(self) -> None:
        """Copy what has changed to the bucket, if the directory is in one; all processes call it."""
        if self._workdir:
            self._workdir.push()

    def write_environment(self, extra: Mapping[str, Any]) -> None:
        """Write environment.json: what this run runs with, `extra`, and as "earlier" the same of its earlier starts.

        Starts JAX's backends, so `distributed.start` comes before.
        """
        if self._writes:
            from xpo_jax.experiment.environment import environment  # here: recognising a run needs no JAX

            path = self.path / "environment.json"
            before = read_run_file(path) if path.exists() else {}
            earlier = before.pop("earlier", [])
            now = {**environment(), **extra, "earlier": [*earlier, before] if before else earlier}
            atomic_write(path, to_json(now, indent=2) + "\n")

    def add_to_environment(self, extra: Mapping[str, Any]) -> None:
        """Add entries to environment.json that are known only later."""
        if self._writes:
            path = self.path / "environment.json"
            atomic_write(path, to_json({**read_run_file(path), **extra}, indent=2) + "\n")

    def write_samples(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write samples/<name>.md, a table with a line per row and a column per key; mappings are left out.

        samples/<name>.jsonl holds everything, for programs.
        """
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r}: a name for samples has letters, digits, '_', '-' and '.' only")
        path = self.path / "samples" / f"{name}.md"
        if self._writes:
            path.parent.mkdir(exist_ok=True)
            tables = [{k: v for k, v in row.items() if not isinstance(v, Mapping)} for row in rows]
            atomic_write(path, markdown_table(tables))
            atomic_write(path.with_suffix(".jsonl"), "".join(to_json(row) + "\n" for row in rows))
        return path

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, the last thing a run does: from here on the run is finished."""
        text = to_json(result, indent=2)
        if self._writes:
            atomic_write(self.path / "result.json", text + "\n")
        self.result = json.loads(text)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._workdir:
            self._workdir.close()
            self._workdir = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
