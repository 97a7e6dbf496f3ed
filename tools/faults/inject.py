"""Run the real command with one fault injected at one point of it. For tools.faults.

    python -m tools.faults.inject '{"at": "program sample", "call": 3, "do": "SIGKILL"}' --config=...

A plan is a point of the run (`at`), which of the calls of this point is hit (`call`, from 1), the action (`do`), and
for how many calls in a row it is taken (`times`). Points:

    compile             before a program is compiled
    program NAME        before a program runs: sample, score, accumulate, apply, ...
    call MODULE:NAME    before a function or method of this project is called
    open REGEX          before a file whose path matches is opened for writing, by any thread
    rename REGEX        before a file or folder is renamed to a path that matches
    remove REGEX        before a file or folder is removed

Actions: the name of a signal that the process sends itself, or two names; "hang"; "raise"; "full N", after which no
file of this process can grow beyond N bytes, as on a full disk; "nan N", which makes output N of the program NaN;
"answer X", which replaces all answers of a judge.

Left out on purpose: any code for this in the package itself.
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

SIGNAL_SECONDS = 0.3  # from one signal to the next


class Plan:
    """Counts the calls of its point, and takes the action when it is due."""

    def __init__(self, *, at: str, call: int, do: str, times: int = 1):
        self.kind, _, self.where = at.partition(" ")
        self._calls, self._first, self._last = 0, call, call + times - 1
        self._at = at
        self.verb, _, self._rest = do.partition(" ")
        self._done = False

    def due(self) -> bool:
        """Count one call, and return whether the action is due."""
        self._calls += 1
        if not self._first <= self._calls <= self._last:
            return False
        if not self._done:
            self._done = True
            os.write(2, f"injected: {self.verb} at {self._at}\n".encode())
        return True

    def act(self) -> None:
        """Take an action that comes before the call; "nan" and "answer" come after it."""
        if self.verb.startswith("SIG"):
            for name in (self.verb, *self._rest.split()):
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(SIGNAL_SECONDS)  # the handler runs in the main thread, when it can
        elif self.verb == "hang":
            time.sleep(10**6)
        elif self.verb == "raise":
            raise RuntimeError("an injected fault")
        elif self.verb == "full":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self._rest), hard))

    def replace(self, result: Any, arguments: Sequence[Any]) -> Any:
        """Return what the caller gets in place of `result`."""
        if self.verb == "answer":
            return [json.loads(self._rest)] * len(arguments[-1])
        if self.verb == "nan":
            import jax

            number = int(self._rest)
            return tuple(jax.tree.map(lambda x: x * float("nan"), part) if i == number else part
                         for i, part in enumerate(result))  # fmt: skip
        return result


def install(plan: Plan) -> None:
    """Install the plan at its point."""
    if plan.kind in ("open", "rename", "remove"):
        sys.addaudithook(functools.partial(_on_event, plan, re.compile(plan.where)))
        return
    owner, name, only = {
        "compile": ("xpo_jax.runtime.compilation:Program", "compile", None),
        "program": ("xpo_jax.runtime.compilation:Program", "__call__", plan.where),
        "call": (*plan.where.rpartition(".")[::2], None),
    }[plan.kind]
    module, _, inner = owner.partition(":")
    if not inner:  # call MODULE:NAME of a function: the last dot is in the module's name
        module, name = plan.where.split(":")
    holder: Any = importlib.import_module(module)
    holder = getattr(holder, inner) if inner else holder
    setattr(holder, name, _wrapped(plan, getattr(holder, name), only))


def _wrapped(plan: Plan, function: Callable[..., Any], only: str | None) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if (only is not None and args[0].name != only) or not plan.due():
            return function(*args, **kwargs)
        plan.act()
        return plan.replace(function(*args, **kwargs), args)

    return wrapped


def _on_event(plan: Plan, pattern: re.Pattern[str], event: str, args: tuple[Any, ...]) -> None:
    path: Any = ""
    if plan.kind == "open" and event == "open":
        path, _, flags = args
        path = path if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) else ""
    elif plan.kind == "rename" and event == "os.rename":
        path = args[1]
    elif plan.kind == "remove" and event in ("os.remove", "shutil.rmtree"):
        path = args[0]
    if isinstance(path, str | os.PathLike) and pattern.search(os.fspath(path)) and plan.due():
        plan.act()


def main(argv: Sequence[str]) -> int:
    """Inject a fault into xpo_jax.main; return its exit status."""
    install(Plan(**json.loads(argv[0])))
    from xpo_jax.main import main as command

    return command(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
