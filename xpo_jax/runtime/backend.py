"""Errors of JAX's backends that a user can fix, in one line: devices that cannot be used, and memory that is used up.

Left out on purpose: other errors of a backend, which are bugs or faults of a device; they keep their traceback. JAX is
not imported at the top, because reading a run directory does not need it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from xpo_jax.io.text import one_line, shorten
from xpo_jax.runtime import cluster_detection

_MESSAGE_CHARACTERS = 240  # of a backend's message; the allocations of a TPU's program follow, page by page
_FEWER_DEVICES_HOLD_IT = "shard over more devices (mesh.fsdp), or use a smaller model"
# What each program's memory depends on; see program_factories.py and device_model.py.
_REMEDIES = {
    "sample": "lower layout.prefill_rows, batch_size, sampling.max_new_tokens or layout.reference_steps, or raise"
    " mesh.tensor",
    "score": "lower layout.micro_batch_rows or layout.chunk_tokens",
    "accumulate": "lower layout.micro_batch_rows or layout.chunk_tokens, or set layout.remat to True",
    "choices": "lower judge.batch_size, or give the judge a smaller model",
    "scores": "lower judge.batch_size, or give the judge a smaller model",
}


class BackendError(ValueError):
    """A backend cannot do what the run needs; one line that states what and how to fix it."""


class NoBackend(BackendError):
    """There are no devices, so there is no exchange with other processes either."""


def start() -> None:
    """Start JAX's backends, if they have not been started.

    Raises:
      NoBackend: JAX_PLATFORMS names one that this machine lacks, or its devices are in use.
    """
    import jax

    try:
        platform = jax.devices()[0].platform
        # Where nothing was chosen, JAX takes the CPU without a word if a TPU cannot be used; asked for, it says why.
        if platform == "cpu" and not os.environ.get("JAX_PLATFORMS") and cluster_detection.has_tpu():
            jax.devices("tpu")
    except (RuntimeError, AssertionError) as error:  # for a plugin that is not installed JAX has no message
        chosen = os.environ.get("JAX_PLATFORMS", "")
        reason = _shown(error) or "no such device or plugin is installed"
        raise NoBackend(
            f"JAX cannot use the devices{f' of JAX_PLATFORMS={chosen}' if chosen else ''} ({reason}); stop the process"
            " that uses them, install JAX for them (xpo-jax[cuda12], [cuda13], [tpu]), or set JAX_PLATFORMS=cpu"
        ) from error


@contextlib.contextmanager
def memory_checked(what: str, program: str) -> Iterator[None]:
    """Turn the error of a device whose memory is used up into a BackendError.

    Args:
      what: is being done, for the message: "compiling", "running".
      program: name of the program.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        line = out_of_memory(error, f"{what} the program {program!r}", program)
        if line is None:
            raise
        raise BackendError(line) from error


def out_of_memory(error: BaseException, what: str, program: str | None = None) -> str | None:
    """Return one line on an error of a device whose memory is used up; None for any other error.

    Args:
      error: of JAX.
      what: was being done.
      program: the one that was running, or the last one before.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    number = re.search(r"(\d{7,}) ?bytes", str(error))
    size = f", {int(number[1]) / 1e9:,.2f} GB" if number else ""
    remedy = _REMEDIES.get(program or "", _FEWER_DEVICES_HOLD_IT)
    return (
        f"out of device memory while {what} ({_shown(error)}{size}); {remedy}; `python -m xpo_jax.tools.plan` shows"
        " what a config needs"
    )


def _shown(error: BaseException) -> str:
    parts = one_line(str(error)).partition("RESOURCE_EXHAUSTED: ")
    text = re.sub(r" (Total hbm usage|.set JAX_PLATFORMS=).*", "", parts[2] or parts[0])
    return shorten(text.rstrip(". "), _MESSAGE_CHARACTERS)
