"""The real command, with one fault planted at one point of it. For faults.py; nobody else wants it.

    python -m tools.faults.inject '{"at": "program sample", "call": 3, "do": "SIGKILL"}' --config=...

A plan: at, a point that the run comes to again and again; call, at which time (from 1); do, what happens there;
times, for how many calls in a row it does. Points:

    compile             before a program is compiled
    program NAME        before a program runs: sample, score, accumulate, apply, ...
    call MODULE:NAME    before a function or method of ours is called
    open REGEX          a file whose path matches is about to be opened for writing, by whatever thread
    rename REGEX        a file or folder is about to be given a name that matches
    remove REGEX        a file or folder is about to be removed

What can happen: the name of a signal, that the process sends itself, or two names; "hang"; "raise"; "full N", from
here on no file of this process grows beyond N bytes, as on a full disk; "nan N", the numbers of the program's
output N are not finite; "answer X", a judge gives this answer to everything.

Left out on purpose: any of this inside of the package.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

STRIKE_SECONDS = 0.3  # from one signal to the next


class Plan:
    """Counts how often its point was come to, and does what is to be done there."""

    def __init__(self, *, at: str, call: int, do: str, times: int = 1):
        self.kind, _, self.where = at.partition(" ")
        self._calls, self._first, self._last = 0, call, call + times - 1
        self._at = at
        self.verb, _, self._rest = do.partition(" ")
        self._done = False

    def due(self) -> bool:
        """Take note of one more call, and tell whether it is one of those."""
        self._calls += 1
        if not self._first <= self._calls <= self._last:
            return False
        if not self._done:
            self._done = True
            os.write(2, f"planted: {self.verb} at {self._at}\n".encode())
        return True

    def strike(self) -> None:
        """What happens before the point is passed; "nan" and "answer" happen after it."""
        if self.verb.startswith("SIG"):
            for name in (self.verb, *self._rest.split()):
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(STRIKE_SECONDS)  # the handler runs in the main thread, when it can
        elif self.verb == "hang":
            time.sleep(10**6)
        elif self.verb == "raise":
            raise RuntimeError("a planted fault")
        elif self.verb == "full":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self._rest), hard))

    def spoil(self, found: Any, of: Sequence[Any]) -> Any:
        """What comes out in place of `found`, which came of the arguments `of`."""
        if self.verb == "answer":
            return [json.loads(self._rest)] * len(of[-1])
        if self.verb == "nan":
            import jax

            number = int(self._rest)
            return tuple(jax.tree.map(lambda x: x * float("nan"), part) if i == number else part
                         for i, part in enumerate(found))  # fmt: skip
        return found


def plant(plan: Plan) -> None:
    """From here on the plan waits at its point."""
    if plan.kind in ("open", "rename", "remove"):
        sys.addaudithook(functools.partial(_heard, plan, re.compile(plan.where)))
        return
    owner, name, only = {
        "compile": ("xpo_jax.runtime.compilation:Program", "compile", None),
        "program": ("xpo_jax.runtime.compilation:Program", "__call__", plan.where),
        "call": (*plan.where.rpartition(".")[::2], None),
    }[plan.kind]
    module, _, inner = owner.partition(":")
    if not inner:  # call MODULE:NAME of a function: the dot that was found is the module's
        module, name = plan.where.split(":")
    holder: Any = importlib.import_module(module)
    holder = getattr(holder, inner) if inner else holder
    setattr(holder, name, _planted(plan, getattr(holder, name), only))


def _planted(plan: Plan, function: Callable[..., Any], only: str | None) -> Callable[..., Any]:
    @functools.wraps(function)
    def planted(*args: Any, **kwargs: Any) -> Any:
        if (only is not None and args[0].name != only) or not plan.due():
            return function(*args, **kwargs)
        plan.strike()
        return plan.spoil(function(*args, **kwargs), args)

    return planted


def _heard(plan: Plan, pattern: re.Pattern[str], event: str, args: tuple[Any, ...]) -> None:
    path: Any = ""
    if plan.kind == "open" and event == "open":
        path, _, flags = args
        path = path if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) else ""
    elif plan.kind == "rename" and event == "os.rename":
        path = args[1]
    elif plan.kind == "remove" and event in ("os.remove", "shutil.rmtree"):
        path = args[0]
    if isinstance(path, str | os.PathLike) and pattern.search(os.fspath(path)) and plan.due():
        plan.strike()


def main(argv: Sequence[str]) -> int:
    """Plant a fault, then do as xpo_jax.main."""
    plant(Plan(**json.loads(argv[0])))
    from xpo_jax.main import main as command

    return command(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
