"""The run directory: created, recognised, locked, and the small files that describe a run.

    <run>/xpo_jax_run.json  marks the folder as a run; locked while a process writes into it
    <run>/config.json       the config as given; `--config=<run>/config.json` runs it again
    <run>/environment.json  versions, devices, git state, command line, data fingerprint
    <run>/samples/*.md      tables to look at
    <run>/result.json       written last: a run that has it is finished

A folder is one of ours if it holds the marker file with our format string. config.json alone would
not do: every Hugging Face folder has one. Any other folder that is not empty is never written into.

Left out on purpose: resuming an unfinished run (it is refused with the remedy), gs:// paths, and
more than one process: process 0 opens the directory, the others are told its path. metrics.jsonl,
tensorboard/, pairs.jsonl, checkpoints/ and export/ are made by the modules that write them.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from xpo_jax.files import atomic_write, markdown_table, to_json

MARKER = "xpo_jax_run.json"
FORMAT = "xpo_jax run directory"
VERSION = 1
# Environment variables that change what is computed. No others are ever written: they hold keys.
RECORDED_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")
# A folder with nothing but these holds no work: a run that stopped here starts again in place.
_BOOKKEEPING = {MARKER, "config.json", "environment.json"}
_ELSEWHERE = "give another --config.run_dir"


class RunDirError(ValueError):
    """A run directory cannot be used; one line that says what, where and how to mend it."""


# ---- the directory ------------------------------------------------------------------------------


class RunDir:
    """A run directory that this process holds. Made by `RunDir.open`.

    path: the absolute path.
    result: what `finish` wrote, if this run is finished already, else None.
    """

    def __init__(self, path: Path, lock: int, result: dict[str, Any] | None):
        self.path = path
        self._lock: int | None = lock
        self._result = result

    @classmethod
    def open(cls, path: str | Path, config_json: str) -> RunDir:
        """Create the directory, parents too, or recognise a finished run of the same config.

        The lock is released by `close`, or by the system however the process ends. A field
        `run_dir` at the top of the config is not compared: a run may be moved.

        Args:
          path: a local path; `~` is expanded.
          config_json: the config, a JSON object.

        Raises:
          RunDirError: if the path is a file, cannot be written, is not empty and not such a run, is
            in use, belongs to another config or holds an unfinished run. Nothing is left behind.
        """
        config = json.loads(config_json)
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
                return cls(where, lock, None)
            _refuse_other_config(where, config)
            if not (where / "result.json").exists():
                raise RunDirError(
                    f"{where}: holds an unfinished run, which cannot be resumed yet; "
                    f"delete that folder or {_ELSEWHERE}"
                )
            return cls(where, lock, _read_object(where / "result.json"))
        except BaseException as error:
            for file in files:
                file.unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)  # after the unlink: whoever waits for it must find the file gone
            _remove_folders(folders)
            if isinstance(error, OSError):
                raise RunDirError(f"{where}: cannot be used ({error.strerror}); {_ELSEWHERE}") from error
            raise

    @property
    def result(self) -> dict[str, Any] | None:
        return self._result

    def write_environment(self, extra: Mapping[str, Any]) -> None:
        """Write environment.json: what this run ran with, and `extra`, such as the data fingerprint.

        Starts JAX's backends, so distributed start-up comes before.
        """
        atomic_write(self.path / "environment.json", to_json({**environment(), **extra}, indent=2) + "\n")

    def write_samples(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write samples/<name>.md, a table with one line per row and one column per key."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r}: a name for samples has letters, digits, '_', '-' and '.' only")
        (self.path / "samples").mkdir(exist_ok=True)
        path = self.path / "samples" / f"{name}.md"
        atomic_write(path, markdown_table(rows))
        return path

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, the last thing a run does: from here on the run is finished."""
        text = to_json(result, indent=2)
        atomic_write(self.path / "result.json", text + "\n")
        self._result = json.loads(text)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _local_path(path: str | Path) -> Path:
    if not str(path).strip():
        raise RunDirError("run_dir: is empty; give a folder with --config.run_dir")
    if re.match(r"\w+://", str(path)):
        raise RunDirError(f"{path}: run directories are local folders for now; {_ELSEWHERE}")
    return Path(os.path.abspath(os.path.expanduser(path)))


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
            raise RunDirError(f"{where}: cannot be created ({error.strerror}); {_ELSEWHERE}") from error
    if not where.is_dir():
        _remove_folders(made)
        raise RunDirError(f"{where}: is not a folder; {_ELSEWHERE}")
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
                raise RunDirError(f"{where}: was written by another version of xpo_jax; {_ELSEWHERE}")
            return
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise RunDirError(f"{where}: is not empty and not a run of xpo_jax (it holds {shown}); {_ELSEWHERE}")


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
        raise RunDirError(f"{where}: cannot be locked ({error.strerror}); {_ELSEWHERE}") from error
    os.close(lock)
    raise RunDirError(f"{where}: is in use by another process{_holder(where)}; stop it or {_ELSEWHERE}")


def _holder(where: Path) -> str:
    try:
        there = json.loads((where / "environment.json").read_bytes())
        return f" (number {there['pid']} on {there['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise RunDirError(f"{path}: is missing or damaged; delete {path.parent} or {_ELSEWHERE}")
    return content


def _refuse_other_config(where: Path, config: Mapping[str, Any]) -> None:
    there, here = _flat(_read_object(where / "config.json")), _flat(config)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name) and name != "run_dir"]
    if names:
        shown = [f"{n}: {there.get(n, 'absent')} there, {here.get(n, 'absent')} here" for n in names[:3]]
        more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
        raise RunDirError(f"{where}: is a run of another config ({'; '.join(shown)}{more}); {_ELSEWHERE}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value, ensure_ascii=False)
    return flat


# ---- the environment ----------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a run depends on besides config and data. Names chosen one by one: never a key."""
    import jax  # here, so that recognising a directory needs no JAX

    devices = [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
    distributions = importlib.metadata.distributions()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [redact(argument) for argument in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cpus": os.cpu_count(),
        "devices": {kind: devices.count(kind) for kind in dict.fromkeys(devices)},
        "processes": jax.process_count(),
        "variables": {name: os.environ[name] for name in RECORDED_VARIABLES if name in os.environ},
        "git": _git_state(Path(__file__).resolve().parent),
        "packages": dict(sorted({d.metadata["Name"]: d.version for d in distributions}.items())),
    }


def redact(argument: str) -> str:
    """A command line argument without the credentials that may stand in it."""
    argument = re.sub(r"(\w://)[^/@\s]*@", r"\1***@", argument)
    argument = re.sub(r"(\w://[^?\s]*\?).+", r"\1***", argument)
    secret = r"(?:api_?key|secret|password|passwd|credential|auth_?token|access_?token|bearer)"
    return re.sub(rf"^(--?[\w.]*{secret}[\w.]*=).+", r"\1***", argument, flags=re.IGNORECASE)


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and changes of the checkout that the code runs from; None if it runs from elsewhere."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> bytes:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, env=variables, capture_output=True, timeout=30, check=True).stdout

    try:
        # An ignored .venv inside some checkout is not code of that checkout.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD").decode().strip()
        dirty = bool(git("status", "--porcelain").strip())
        diff = hashlib.sha256(git("diff", "HEAD", "--binary")).hexdigest() if dirty else None
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty, "diff_sha256": diff}
