"""Standard output and standard error that never end, change or delay a run.

A console can be closed (`>&-`), gone (`| head -3`, a terminal that hung up), full (a log on a full disk), slow (a
reader that pauses, Ctrl-S) or unable to show a character (PYTHONIOENCODING=ascii). What a console does not take at
once is held back and follows with what comes next; beyond a limit it is dropped, with a count. What it cannot show is
escaped.

Left out on purpose: streams that Python code put in the place of the console's, such as those of tests and notebooks;
and what C++ libraries print past Python.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from xpo_jax.io.files import to_json

HELD_BYTES = 2**20  # of output that a slow or full console has not taken yet
_PAUSE_SECONDS = 0.25  # that a writer waits for a console, unless that was in vain the last time
_END_SECONDS = 10.0  # that a run waits at its end for a console that takes nothing
_FIRST_DUPLICATE = 64  # no number that a program expects its own files to have
_GONE = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET}
_BROKEN = "xpo_jax: standard output is gone (%s); the run continues, and result.json will hold its result\n"


class Output(io.TextIOBase):
    """A text stream to a file descriptor, which may be of anything; no method raises OSError or waits for long.

    Args:
      descriptor: is written to through a duplicate, because user code may close it, and the next file that is opened
        would get its number. Once nothing can be written any more, it refers to /dev/null.
      encoding: of the console.
      on_gone: takes the reason, once, when nothing can be written any more.
    """

    errors = "backslashreplace"

    def __init__(self, descriptor: int, encoding: str, on_gone: Callable[[str], object] = len):
        self._descriptor, self._encoding, self._on_gone = descriptor, encoding, on_gone
        self._duplicate = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_DUPLICATE)
        self._held, self._dropped = bytearray(), 0
        self._stalled = False
        self._lock = threading.RLock()  # a progress bar has a thread of its own
        self.buffer = _Bytes(self)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The console's encoding."""
        return self._encoding

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the console is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, text: str) -> int:
        """Write text, as far as the console takes it."""
        self.write_bytes(text.encode(self._encoding, self.errors))
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        """Write encoded text, as far as the console takes it."""
        with self._lock:
            if self._dropped or len(self._held) + len(data) > HELD_BYTES:
                self._dropped += len(data)
            else:
                self._held += data
            if b"\n" in data or b"\r" in data:
                self._drain(_PAUSE_SECONDS)

    def flush(self) -> None:
        """Write what is held back, as far as the console takes it."""
        with self._lock:
            self._drain(_PAUSE_SECONDS)

    def finish(self, seconds: float | None) -> None:
        """Write what is held back, and release the duplicate.

        Args:
          seconds: give up after this time in which the console takes nothing; None never does.
        """
        with self._lock:
            self._stalled = False
            self._drain(seconds)
            self._held.clear()
            if self._duplicate != self._descriptor:
                os.close(self._duplicate)
                self._duplicate = self._descriptor  # for a logger that has kept this stream

    def reopen(self) -> None:
        """Open the descriptor again if user code closed it."""
        if not _is_open(self._descriptor):
            os.dup2(self._duplicate, self._descriptor)

    def _drain(self, seconds: float | None) -> None:
        while self._held or self._dropped:
            if not self._held:
                self._held += f"xpo_jax: {self._dropped} bytes of output are missing here\n".encode()
                self._dropped = 0
            if not takes(self._duplicate, 0.0 if self._stalled else seconds):
                self._stalled = True
                return
            try:
                count = os.write(self._duplicate, self._held[: select.PIPE_BUF])
            except OSError as error:
                self._stalled = True  # a disk that is full: what is held back follows once there is space
                if error.errno in _GONE:
                    self._give_up(error.strerror or "")
                return
            self._stalled = False
            del self._held[:count]

    def _give_up(self, reason: str) -> None:
        self._held.clear()
        self._dropped = 0
        if _same_file(self._descriptor, self._duplicate):
            redirect_to_null(self._descriptor)
        redirect_to_null(self._duplicate)
        self._on_gone(reason)


class _Bytes(io.RawIOBase):
    """The bytes below an `Output`, for code that writes to `sys.stdout.buffer`."""

    def __init__(self, output: Output):
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._output.write_bytes(bytes(data))
        return len(data)

    def flush(self) -> None:
        self._output.flush()


@contextlib.contextmanager
def protected(end_seconds: float | None = _END_SECONDS) -> Iterator[None]:
    """Let standard output and standard error be `Output`s in here.

    Args:
      end_seconds: see `Output.finish`, at the end of the block.
    """
    _occupy_closed_descriptors()
    before = sys.stdout, sys.stderr
    stderr = _protect(sys.stderr)
    stdout = _protect(sys.stdout, lambda reason: sys.stderr.write(_BROKEN % reason))
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield
    finally:
        for output in (stdout, stderr):
            if isinstance(output, Output):
                output.finish(end_seconds)
        sys.stdout, sys.stderr = before


def reopen_closed() -> None:
    """Open the standard streams again that user code closed: to the console where they are protected."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Output):
            stream.reopen()
    _occupy_closed_descriptors()


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, which a program may read: escaped as JSON does where it must be."""
    text = to_json(value)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text))
    print(text, flush=True)


def takes(descriptor: int, seconds: float | None) -> bool:
    """Return whether a descriptor takes at least a few bytes, or reports an error, at once.

    Args:
      descriptor: of a file, pipe or terminal.
      seconds: how long to wait for that; None waits indefinitely.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def write_past_buffers(text: str, seconds: float = 0.0) -> None:
    """Write to standard error from a signal handler, or from a thread that may wait for no lock.

    Args:
      text: is lost where standard error does not take it.
      seconds: how long to wait for that.
    """
    data, end = text.encode(errors="backslashreplace"), time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while data and takes(2, max(0.0, end - time.monotonic())):
            data = data[os.write(2, data[: select.PIPE_BUF]) :]


def redirect_to_null(descriptor: int) -> None:
    """Let a descriptor refer to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)


def _same_file(one: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(one, other)
    except OSError:  # closed
        return False


def _protect(stream: Any, on_gone: Callable[[str], object] = len) -> Any:
    """Return an `Output` to the same console; a stream that is not Python's own for a descriptor as it is."""
    if stream is None:  # closed when Python started; another file may have its number by now
        return Output(os.open(os.devnull, os.O_WRONLY), "utf-8")
    if type(stream) is not io.TextIOWrapper:
        return stream
    try:
        stream.flush()
        return Output(stream.fileno(), stream.encoding, on_gone)
    except (OSError, ValueError):
        return stream


def _occupy_closed_descriptors() -> None:
    """Open /dev/null as those of the descriptors 0 to 2 that are closed, or a log of the run would get that number.

    What C++ libraries print goes to descriptor 2.
    """
    for descriptor in range(3):
        if not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
