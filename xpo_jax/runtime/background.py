"""A call that runs in a thread of its own, beside the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.2  # between two looks at what may end a wait


class BackgroundCall(Generic[T]):
    """A call in a daemon thread. A process that ends does not wait for it, but may for threads that it has started.

    Args:
      function: what is called.
      after: a call that must have ended before, so that no two of them run at once.
    """

    def __init__(self, function: Callable[[], T], *, after: BackgroundCall[T] | None = None):
        self._function, self._after = function, after
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return not self._thread.is_alive()

    def wait(self, check: Callable[[int | None], None]) -> T:
        """Wait as `join` does; return what the call returned, or raise what it raised."""
        self.join(check)
        if self._error is not None:
            raise self._error
        return self._value

    def join(self, check: Callable[[int | None], None]) -> None:
        """Wait until the call has ended, in an error or not.

        Args:
          check: called now and then with the identity of the thread, and of those that must have ended before; what it
            raises ends the wait and not the call.
        """
        while True:
            self._thread.join(_POLL_SECONDS)
            if self.ended:
                break
            for thread in self._threads():
                check(thread)

    def _threads(self) -> list[int | None]:
        after = self._after  # which the thread sets to None
        return [self._thread.ident, *([] if after is None else after._threads())]

    def _run(self) -> None:
        if self._after is not None:
            self._after._thread.join()
            self._after = None  # or the results of all earlier calls would stay alive
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error
