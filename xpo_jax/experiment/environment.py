"""What a run depends on besides its config and data: versions, devices, git state, command line.

Each recorded name is listed explicitly, so that no secret is ever written.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

DIFF_BYTES = 100_000  # of uncommitted changes; of a longer diff only the hash is recorded
# Environment variables that change what is computed. No others are ever written, because they hold secrets.
RECORDED_VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
)


def environment() -> dict[str, Any]:
    """Return what a run depends on besides config and data."""
    devices = [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
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
        "packages": _packages(),
    }


@functools.cache  # a tenth of a second
def _packages() -> dict[str, str]:
    """Return the version of each installed package, sorted by name."""
    distributions = importlib.metadata.distributions()
    return dict(sorted({d.metadata["Name"]: d.version for d in distributions}.items()))


def redact(argument: str) -> str:
    """Return a command line argument without the credentials it may contain."""
    argument = re.sub(r"(\w://)[^/@\s]*@", r"\1***@", argument)
    argument = re.sub(r"(\w://[^?\s]*\?).+", r"\1***", argument)
    secret = r"(?:api_?key|secret|password|passwd|credential|auth_?token|access_?token|bearer)"
    return re.sub(rf"^(--?[\w.]*{secret}[\w.]*=).+", r"\1***", argument, flags=re.IGNORECASE)


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and changes of the checkout that the code runs from; None if it runs from no checkout."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> bytes:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, env=variables, capture_output=True, timeout=30, check=True).stdout

    try:
        # A package in an ignored .venv is not code of the checkout around it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD").decode().strip()
        dirty = bool(git("status", "--porcelain").strip())
        diff = git("diff", "HEAD", "--binary") if dirty else None
    except (OSError, subprocess.SubprocessError):
        return None
    if diff is None:
        return {"commit": commit, "dirty": dirty, "diff_sha256": None, "diff": None}
    text = diff.decode(errors="replace") if len(diff) <= DIFF_BYTES else None
    return {"commit": commit, "dirty": dirty, "diff_sha256": hashlib.sha256(diff).hexdigest(), "diff": text}
