"""The run directory: created, recognised, locked, and the small files that describe a run.

    <run>/xpo_jax_run.json  marks the folder as a run; locked while a process writes into it
    <run>/config.json       the config as given; `--config=<run>/config.json` runs it again
    <run>/environment.json  versions, devices, git state, command line, data fingerprint
    <run>/samples/*.md      tables to look at; *.jsonl the same for programs
    <run>/result.json       written last: a run that has it is finished

A folder is a run if it holds the marker file with our format string; any other that is not empty is left alone.

Of many processes, process 0 opens the directory and writes the files above; the others join it, on a
disk that all share. A run that was interrupted is opened again with the same config, but for what
config_changes.py allows; where in it to go on is not known here, see resume.py. A run
directory in a bucket (gs://) is worked on in a folder of each process, and copied there, see bucket_mirror.py.
metrics.jsonl, tensorboard/, pairs.jsonl, evaluations/, checkpoints/, export/ and report.html are made by the modules
that write them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from xpo_jax.experiment import config_changes
from xpo_jax.experiment.bucket_mirror import BucketWorkdir
from xpo_jax.io import paths
from xpo_jax.io.files import atomic_write, read_json, to_json
from xpo_jax.io.text import markdown_table
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none, run_and_gather

MARKER = "xpo_jax_run.json"
FORMAT = "xpo_jax run directory"
VERSION = 1
# A folder with nothing but these holds no work: a run that stopped here starts again in place.
_BOOKKEEPING = {MARKER, "config.json", "environment.json"}
_ELSEWHERE = "give another --config.run_dir"
_VISIBLE_SECONDS = 60.0  # until a shared disk shows all processes what one has made; NFS remembers absence


class RunDir:
    """A run directory, made by `RunDir.open` or `RunDir.join`; it writes where this process holds the lock.

    path: the absolute path; of one in a bucket, the folder in which this process works on it.
    address: what people call it: the same, or the gs:// path.
    checkpoints: their folder, which every process writes into.
    result: what `finish` wrote, if this run is finished already, else None.
    fixed: a fingerprint of what may not change in the config.
    changes: fields that differ from the config the run was left with, a line each.
    """

    def __init__(
        self,
        path: Path,
        lock: int | None,
        result: dict[str, Any] | None,
        *,
        fixed: str,
        changes: Sequence[str] = (),
    ):
        self.path, self.fixed, self.changes = path, fixed, tuple(changes)
        self._workplace: BucketWorkdir | None = None
        self.address, self.checkpoints = str(path), paths.absolute(path) / "checkpoints"
        self._lock, self._writes = lock, lock is not None
        self.result = result

    @classmethod
    def open(cls, path: str | Path, config_json: str, *, accept_changes: bool = False) -> RunDir:
        """Create the directory, parents too, or recognise a run of the same config.

        The lock is released by `close`, or by the system however the process ends. Of the config, `run_dir` and
        the group `distributed` are not compared: a run may be moved, and started in another way.

        Args:
          path: a local path; `~` is expanded.
          config_json: the config, a JSON object.
          accept_changes: go on with an unfinished run even if fields differ that may not.

        Raises:
          ValueError: if the path is a file, cannot be written, is not empty and not such a run, is
            in use, or belongs to another config. Nothing is left behind.
        """
        config = json.loads(config_json)
        fixed = config_changes.fingerprint(config)
        where = _local_path(path)
        folders = _make_folders(where)
        files: list[Path] = []  # what to take back if opening fails
        lock: int | None = None
        try:
            _refuse_foreign(where)
            lock = _take_lock(where)
            if os.fstat(lock).st_size == 0:
                files = [where / MARKER]
                note = "marks this folder as a run, and is locked while a process writes into it"
                marker = to_json({"format": FORMAT, "version": VERSION, "note": note}) + "\n"
                os.write(lock, marker.encode())
                os.fsync(lock)
            if {name for name in os.listdir(where) if not name.endswith(".tmp")} <= _BOOKKEEPING:
                files += [] if (where / "config.json").exists() else [where / "config.json"]
                atomic_write(where / "config.json", config_json.rstrip() + "\n")
                return cls(where, lock, None, fixed=fixed)
            changes = config_changes.compare(_read(where / "config.json"), config)
            result = _read(where / "result.json") if (where / "result.json").exists() else None
            refused = config_changes.refused(changes, finished=result is not None, accept=accept_changes)
            if refused:
                raise ValueError(
                    f"{where}: is a run of another config ({refused[0]}); {_ELSEWHERE}{refused[1]}"
                )
            if (
                result is not None and changes
            ):  # more steps were asked for; there is no result until they are done
                (where / "result.json").unlink()
                result = None
            if changes:
                atomic_write(where / "config.json", config_json.rstrip() + "\n")
            return cls(where, lock, result, fixed=fixed, changes=list(changes.values()))
        except BaseException as error:
            for file in files:
                file.unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)  # after the unlink: whoever waits for it must find the file gone
            _remove_folders(folders)
            if isinstance(error, OSError):
                raise ValueError(f"{where}: cannot be used ({error.strerror}); {_ELSEWHERE}") from error
            raise

    @classmethod
    def join(cls, path: str | Path, config_json: str, *, accept_changes: bool = False) -> RunDir:
        """`open` on process 0; the others find the same folder, but do not write these files into it.

        Raises: what `open` raises; on all processes, also if one of them does not see the folder.
        """
        if paths.in_bucket(path):
            return cls._join_in_bucket(str(path).rstrip("/"), config_json, accept_changes)

        def open_on_lead() -> tuple[RunDir | None, list[Any] | None]:
            if not distributed.is_lead_process():
                return None, None
            run = cls.open(path, config_json, accept_changes=accept_changes)
            made = int(os.stat(run.path / MARKER).st_mtime)
            return run, [str(run.path), run.result, run.fixed, run.changes, made]

        run, values = run_and_gather("opening the run directory", open_on_lead)
        where, result, fixed, changes, made = values[0]
        with all_or_none("finding the run directory"):
            return run or cls(_found(Path(where), made), None, result, fixed=fixed, changes=changes)

    @classmethod
    def _join_in_bucket(cls, address: str, config_json: str, accept_changes: bool) -> RunDir:
        if not address.startswith("gs://"):
            raise ValueError(f"{address}: a run directory is a folder or a gs:// path; {_ELSEWHERE}")
        workplace = BucketWorkdir(address)
        try:
            with all_or_none("opening the run directory"):
                run = cls.open(workplace.local, config_json, accept_changes=accept_changes)
        except BaseException:
            workplace.close()
            raise
        run._writes = distributed.is_lead_process()
        run._workplace, run.address, run.checkpoints = (
            workplace,
            address,
            paths.absolute(address) / "checkpoints",
        )
        return run

    @property
    def shared(self) -> bool:
        """Whether all processes see the same folder."""
        return self._workplace is None

    def push(self) -> None:
        """Where the directory is in a bucket, copy there what has changed; all processes call it."""
        if self._workplace:
            self._workplace.push()

    def write_environment(self, extra: Mapping[str, Any]) -> None:
        """Write environment.json: what this run runs with, `extra`, and as "earlier" what it was started with before.

        Starts JAX's backends, so distributed start-up comes before.
        """
        if self._writes:
            from xpo_jax.experiment.environment import environment  # here: recognising needs no JAX

            path = self.path / "environment.json"
            before = _read(path) if path.exists() else {}
            earlier = before.pop("earlier", [])
            found = {**environment(), **extra, "earlier": [*earlier, before] if before else earlier}
            atomic_write(path, to_json(found, indent=2) + "\n")

    def add_to_environment(self, extra: Mapping[str, Any]) -> None:
        """What is known later only."""
        if self._writes:
            there = _read(self.path / "environment.json")
            atomic_write(self.path / "environment.json", to_json({**there, **extra}, indent=2) + "\n")

    def write_samples(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write samples/<name>.md, a table with one line per row and one column per key but those of mappings.

        All of it, for programs, is in samples/<name>.jsonl.
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
        if self._workplace:
            self._workplace.close()
            self._workplace = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _local_path(path: str | Path) -> Path:
    if not str(path).strip():
        raise ValueError("run_dir: is empty; give a folder with --config.run_dir")
    return Path(os.path.abspath(os.path.expanduser(path)))


def _found(where: Path, made: int) -> Path:
    """The folder that process 0 opened, once this process sees it, by the second in which its marker was made."""
    until = time.monotonic() + _VISIBLE_SECONDS
    while not (where / MARKER).exists() or int(os.stat(where / MARKER).st_mtime) != made:
        if time.monotonic() > until:
            raise ValueError(
                f"{where}: is not the folder of process 0; {_ELSEWHERE}, on a disk that all share"
            )
        time.sleep(0.2)
    return where


def _make_folders(where: Path) -> list[Path]:
    """Create the folder and its missing parents; returns those made here, outermost first."""
    missing = [folder for folder in (where, *where.parents) if not os.path.lexists(folder)][::-1]
    made: list[Path] = []
    for folder in missing:
        try:
            folder.mkdir()
            made.append(folder)
        except FileExistsError:
            pass  # another process was faster; the lock decides
        except OSError as error:
            _remove_folders(made)
            raise ValueError(f"{where}: cannot be created ({error.strerror}); {_ELSEWHERE}") from error
    if not where.is_dir():
        _remove_folders(made)
        raise ValueError(f"{where}: is not a folder; {_ELSEWHERE}")
    return made


def _remove_folders(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return  # someone else wrote into it


def _refuse_foreign(where: Path) -> None:
    names = sorted(os.listdir(where))
    if not names:
        return
    marker = where / MARKER
    if marker.is_file():
        if names == [MARKER] and marker.stat().st_size == 0:
            return  # killed between creating the marker and writing it
        try:
            content = json.loads(marker.read_bytes())
        except ValueError:
            content = None
        if isinstance(content, dict) and content.get("format") == FORMAT:
            if content.get("version") != VERSION:
                raise ValueError(f"{where}: was written by another version of xpo_jax; {_ELSEWHERE}")
            return
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise ValueError(f"{where}: is not empty and not a run of xpo_jax (it holds {shown}); {_ELSEWHERE}")


def _take_lock(where: Path) -> int:
    lock = os.open(where / MARKER, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == os.stat(where / MARKER).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(lock)
        raise ValueError(f"{where}: cannot be locked ({error.strerror}); {_ELSEWHERE}") from error
    os.close(lock)
    raise ValueError(f"{where}: is in use by another process{_holder(where)}; stop it or {_ELSEWHERE}")


def _holder(where: Path) -> str:
    try:
        there = json.loads((where / "environment.json").read_bytes())
        return f" (number {there['pid']} on {there['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, remedy=f"delete {path.parent} or {_ELSEWHERE}")
