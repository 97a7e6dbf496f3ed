"""How a run ends before its time: told to by a signal, or stuck.

A preempted machine sends SIGTERM, a person at a terminal SIGINT. In the middle of training the step in hand is
finished and saved; elsewhere there is nothing to save and the run ends at once. A second signal always does.

JAX's own preemption notice is left out on purpose: it knows SIGTERM only, it swallows the second one, and a run of
many processes agrees after every step anyway, see `collectives.run_on_all`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

STUCK = 124  # exit status of a run that its watchdog ends, as of the command `timeout`
_GRACE_SECONDS = 30  # after which the C library's timer ends a run whose Python cannot


class Stopped(BaseException):
    """The run was told to stop.

    Args:
      number: of the signal; the exit status is 128 more.
      said: what to tell, one line.
      together: whether every process of the run stops at this place.
    """

    def __init__(self, number: int, said: str, *, together: bool = False):
        super().__init__(said)
        self.status, self.together = 128 + number, together


class Signals(contextlib.AbstractContextManager["Signals"]):
    """SIGTERM and SIGINT while this is open; in the main thread only, elsewhere it does nothing.

    received: the number of the signal that `deferred` held back, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In here the first signal is only noted; who opens it looks at `received` and ends."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            _write(f"xpo_jax: {name} again: leaving at once\n")
            os._exit(128 + number)
        self.received = number
        if not self._deferring:
            raise Stopped(number, f"stopped by {name}; run the same command to go on")
        _write(f"xpo_jax: {name}: finishing the step in hand, then saving; once more to leave at once\n")


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """Ends a process that is stuck, with the stacks of all its threads, so that something can start it again.

    Nothing else can: a step waits for a device, a file system or a judge that may never answer, in code that no
    exception reaches.

    Args:
      seconds: that may pass between two calls of `beat`; None for any number.
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
        """Something new begins, and has all of the time; `what` is told if it does not end in it."""
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
        if _stderr_is_a_file():
            faulthandler.dump_traceback(all_threads=True)
        _write(
            f"xpo_jax: {self._what} has taken more than {self._seconds:g} s (max_step_seconds); the stacks above show"
            " where it is; run the same command to go on from the last checkpoint\n"
        )
        os._exit(STUCK)


def _stderr_is_a_file() -> bool:
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _write(text: str) -> None:
    """To standard error, past Python's buffers: print may not be called again from a signal handler."""
    os.write(2, text.encode())
