"""What user code can do to a run besides raising an Exception: exit, change the current directory, close a stream."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from xpo_jax.io import streams
from xpo_jax.runtime.interruption import Stopped


def is_own_error(error: BaseException) -> bool:
    """Return whether an error that user code raised is its own, rather than a signal that the process received."""
    return not isinstance(error, Stopped | KeyboardInterrupt)


def exit_line(error: SystemExit) -> str:
    """Return what happened if user code called sys.exit."""
    return f"code of yours ended the program with sys.exit({'' if error.code is None else repr(error.code)})"


@contextlib.contextmanager
def surroundings_restored() -> Iterator[None]:
    """Return to the present current directory at the end, and reopen standard streams that were closed.

    Relative paths of the run depend on the one; and the file that is opened next would get the number of the other, to
    which subprocesses and C++ libraries print.
    """
    before = _current_directory()
    try:
        yield
    finally:
        streams.reopen_closed()
        if before is not None and _current_directory() != before:
            with contextlib.suppress(OSError):
                os.chdir(before)


def _current_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None
