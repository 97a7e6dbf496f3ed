"""How a run ends early: by a signal, or because it is stuck.

A preempted machine sends SIGTERM, a person at a terminal SIGINT, a terminal that closes SIGHUP (which `nohup` lets a
run ignore). In the middle of training the run finishes the current step and saves it; elsewhere there is nothing to
save and it ends at once. A second SIGTERM or SIGINT always ends it at once. SIGHUP is not counted: a terminal and its
shell may both send it, and systemd sends it after SIGTERM.

Left out on purpose: JAX's own preemption notice. It handles SIGTERM only and swallows the second one, and a run of
many processes agrees after every step anyway, see `collectives.run_on_all`.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from xpo_jax.io.streams import write_past_buffers

STUCK = 124  # exit status of a run that its watchdog ends, as for the command `timeout`
_STACKS_SECONDS = 5.0  # for standard error to take the stacks of a stuck run
_GRACE_SECONDS = 30  # after these, faulthandler's C thread ends a run whose Python threads cannot


class Stopped(BaseException):
    """A signal stopped the run.

    Args:
      number: of the signal; the exit status is 128 more.
      message: one line.
      on_all_processes: whether every process of the run stops at this place.
    """

    def __init__(self, number: int, message: str, *, on_all_processes: bool = False):
        super().__init__(message)
        self.status, self.on_all_processes = 128 + number, on_all_processes


# blocks of `interruptible` that are open, by thread
_interruptible: collections.Counter[int] = collections.Counter()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In here the first signal ends the run at once even where it is deferred, for example in a wait for a person.

    Signals are handled in the main thread. In another one, this ends the main thread's wait for it, see
    `Signals.check_wait`.
    """
    thread = threading.get_ident()
    _interruptible[thread] += 1
    try:
        yield
    finally:
        _interruptible[thread] -= 1


def _stopped(number: int) -> Stopped:
    return Stopped(number, f"stopped by {signal.Signals(number).name}; run the same command to resume")


class Signals(contextlib.AbstractContextManager["Signals"]):
    """Handles SIGTERM, SIGINT and SIGHUP while it is open; outside the main thread it does nothing.

    received: the number of the first signal, which `deferred` holds back, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring, self._counted = False, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record the first signal in here; the caller reads `received` and ends."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def check_wait(self, thread: int | None) -> None:
        """Raise `Stopped` if a signal was received and that thread, which the caller waits for, is `interruptible`."""
        if self.received is not None and _interruptible[thread or 0]:
            raise _stopped(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._counted += number != signal.SIGHUP
        if self._counted > 1:
            write_past_buffers(f"xpo_jax: {name} again: exiting at once\n")
            os._exit(128 + number)
        if self.received is not None:
            return
        self.received = number
        if not self._deferring or _interruptible[threading.main_thread().ident or 0]:
            raise _stopped(number)
        again = "" if number == signal.SIGHUP else "; send it again to exit at once"
        doing = "ending the wait" if any(_interruptible.values()) else "finishing the current step"
        write_past_buffers(f"xpo_jax: {name}: {doing}, then saving{again}\n")


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """Ends a stuck process with the stacks of all its threads, so that a supervisor can restart it.

    Nothing else can: a step waits for a device, a file system or a judge that may never answer, in code that no
    exception reaches.

    Args:
      seconds: allowed between two calls of `beat`; None disables the watchdog.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._what, self._until = "", float("inf")
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def beat(self, what: str) -> None:
        """Restart the timeout for `what`, which the error names if the timeout expires."""
        if self._seconds is None:
            return
        with self._changed:
            self._what, self._until = what, time.monotonic() + self._seconds
            self._changed.notify()
        if not faulthandler.is_enabled() and _stderr_is_a_file():  # a pytest run has its own
            faulthandler.dump_traceback_later(self._seconds + _GRACE_SECONDS, exit=True)

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()
            with self._changed:
                self._until = -float("inf")
                self._changed.notify()
            self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while self._until > time.monotonic():
                left = self._until - time.monotonic()
                self._changed.wait(None if left == float("inf") else left)
            if self._until == -float("inf"):
                return
        write_past_buffers(
            f"{_stacks()}xpo_jax: {self._what} has taken more than {self._seconds:g} s (max_step_seconds); the stacks"
            " above show where; run the same command to resume from the last checkpoint\n",
            _STACKS_SECONDS,
        )
        os._exit(STUCK)


def _stderr_is_a_file() -> bool:
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _stacks() -> str:
    """Return the stacks of all threads. Written straight to standard error they could wait for a slow reader."""
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"xpo_jax: the stacks cannot be written ({error.strerror})\n"
