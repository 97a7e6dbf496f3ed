"""Open the folder of a run: create or recognise it, lock it, and compare its config and inputs with the present ones.

A folder is a run if it holds the marker file with our format string; any other that is not empty is left alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from xpo_jax.experiment import config_changes
from xpo_jax.io.files import atomic_write, read_json, to_json
from xpo_jax.io.user_paths import expand

MARKER = "xpo_jax_run.json"
FORMAT = "xpo_jax run directory"
VERSION = 1
ELSEWHERE = "give another --config.run_dir"
# A folder that holds only these holds no results: a run that stopped there starts from the beginning.
_BOOKKEEPING = {MARKER, "config.json", "inputs.json", "environment.json"}
_VISIBLE_SECONDS = 60.0  # until a shared disk shows a new folder to all processes; NFS caches its absence


class OpenFolder(NamedTuple):
    """The folder of a run on this machine.

    path: absolute.
    lock: the file descriptor that holds the lock; None where another process holds it.
    result: of the run, if it is finished, else None.
    fixed: hash of the config fields and inputs that may not change.
    changes: a line on each field or input that differs from the run's last start.
    """

    path: Path
    lock: int | None
    result: dict[str, Any] | None
    fixed: str
    changes: tuple[str, ...] = ()


def open_folder(
    path: str | Path,
    config_json: str,
    inputs: Mapping[str, str] = MappingProxyType({}),
    *,
    accept_changes: bool = False,
) -> OpenFolder:
    """Create the folder and its parents, or recognise a run of the same config and inputs; lock it.

    The lock is released when its descriptor is closed, or by the system however the process ends. The fields `run_dir`
    and `distributed` are not compared: a run may be moved, and started in another way.

    Args:
      path: a local path, see `user_paths.expand`.
      config_json: the config, a JSON object.
      inputs: fingerprints of what the config names, by field, see inputs.py.
      accept_changes: resume an unfinished run even if fields or inputs differ that may not.

    Raises:
      ValueError: the path is a file, cannot be written, is not empty and no such run, is in use, or belongs to
        another config. Nothing is left behind.
    """
    folder = _local_path(path)
    made = _make_folders(folder)
    lock: int | None = None
    written: list[Path] = []  # removed again if opening fails
    try:
        _refuse_foreign(folder)
        lock = _take_lock(folder)
        if os.fstat(lock).st_size == 0:
            written.append(folder / MARKER)
            _write_marker(lock)
        return _open_locked(folder, lock, config_json, inputs, accept_changes, written)
    except BaseException as error:
        for file in written:
            file.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)  # after the unlink: the next process to get the lock must find the file gone
        _remove_folders(made)
        if isinstance(error, OSError):
            raise ValueError(f"{folder}: cannot be used ({error.strerror}); {ELSEWHERE}") from error
        raise


def _open_locked(
    folder: Path,
    lock: int,
    config_json: str,
    inputs: Mapping[str, str],
    accept_changes: bool,
    written: list[Path],
) -> OpenFolder:
    """Start a run, or recognise one, in a folder whose lock is held; add new files to `written`."""
    config = json.loads(config_json)
    fixed = config_changes.fingerprint(config, inputs)
    config_file, inputs_file, result_file = (
        folder / name for name in ("config.json", "inputs.json", "result.json")
    )

    def write_files() -> None:
        atomic_write(config_file, config_json.rstrip() + "\n")
        atomic_write(inputs_file, to_json(inputs, indent=2) + "\n")

    if {name for name in os.listdir(folder) if not name.endswith(".tmp")} <= _BOOKKEEPING:
        written += [file for file in (config_file, inputs_file) if not file.exists()]
        write_files()
        return OpenFolder(folder, lock, None, fixed)
    changes = config_changes.compare(read_run_file(config_file), config)
    if inputs_file.exists():  # older versions did not write it
        changes |= config_changes.compare_inputs(read_run_file(inputs_file), inputs, changes)
    result = read_run_file(result_file) if result_file.exists() else None
    refused = config_changes.refused(changes, finished=result is not None, accept=accept_changes)
    if refused:
        raise ValueError(f"{folder}: is a run of {refused[0]}; {ELSEWHERE}{refused[1]}")
    if result is not None and changes:  # with more steps it is no longer finished
        result_file.unlink()
        result = None
    if changes:
        write_files()
    return OpenFolder(folder, lock, result, fixed, tuple(changes.values()))


def marker_time(folder: Path) -> int:
    """Return the second in which the folder's marker was written, by which other processes recognise it."""
    return int(os.stat(folder / MARKER).st_mtime)


def wait_for_folder(folder: Path, marker_second: int) -> Path:
    """Return the folder that process 0 opened, once this process sees it on the shared disk.

    Args:
      folder: its path.
      marker_second: as `marker_time` returned it on process 0.

    Raises:
      ValueError: it does not appear.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not (folder / MARKER).exists() or marker_time(folder) != marker_second:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder}: is not the folder of process 0; {ELSEWHERE}, on a disk that all processes share"
            )
        time.sleep(0.2)
    return folder


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run directory.

    Raises:
      ValueError: it is missing or damaged.
    """
    return read_json(path, remedy=f"delete {path.parent} or {ELSEWHERE}")


def _local_path(path: str | Path) -> Path:
    if not str(path).strip():
        raise ValueError("run_dir: is empty; give a folder with --config.run_dir")
    return Path(os.path.abspath(expand(str(path))))


def _make_folders(folder: Path) -> list[Path]:
    """Create the folder and its missing parents, and return those that were created, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)][::-1]
    made: list[Path] = []
    for path in missing:
        try:
            path.mkdir()
            made.append(path)
        except FileExistsError:
            pass  # another process was faster; the lock decides
        except OSError as error:
            _remove_folders(made)
            raise ValueError(f"{folder}: cannot be created ({error.strerror}); {ELSEWHERE}") from error
    if not folder.is_dir():
        _remove_folders(made)
        raise ValueError(f"{folder}: is not a folder; {ELSEWHERE}")
    return made


def _remove_folders(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return  # another process wrote into it


def _refuse_foreign(folder: Path) -> None:
    names = sorted(os.listdir(folder))
    if not names:
        return
    marker = folder / MARKER
    if marker.is_file():
        if names == [MARKER] and marker.stat().st_size == 0:
            return  # killed between creating the marker and writing it
        try:
            content = json.loads(marker.read_bytes())
        except ValueError:
            content = None
        if isinstance(content, dict) and content.get("format") == FORMAT:
            if content.get("version") != VERSION:
                raise ValueError(f"{folder}: was written by another version of xpo_jax; {ELSEWHERE}")
            return
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise ValueError(f"{folder}: is not empty and not a run of xpo_jax (it holds {shown}); {ELSEWHERE}")


def _write_marker(lock: int) -> None:
    note = "marks this folder as a run, and is locked while a process writes into it"
    marker = to_json({"format": FORMAT, "version": VERSION, "note": note}) + "\n"
    os.write(lock, marker.encode())
    os.fsync(lock)


def _take_lock(folder: Path) -> int:
    lock = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == os.stat(folder / MARKER).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(lock)
        raise ValueError(f"{folder}: cannot be locked ({error.strerror}); {ELSEWHERE}") from error
    os.close(lock)
    raise ValueError(f"{folder}: is in use by another process{_holder(folder)}; stop it or {ELSEWHERE}")


def _holder(folder: Path) -> str:
    try:
        environment = json.loads((folder / "environment.json").read_bytes())
        return f" (number {environment['pid']} on {environment['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
