"""Run the real command with one fault injected at one point of it. For tools.faults.

    python -m tools.faults.inject '{"at": "program sample", "step": 3, "do": "SIGKILL"}' --config=...

A plan (plans.py) is a point of the run (`at`), the step in which it is struck, the action (`do`), and which call of the
point in that step is struck if it is not the first (`call`). A line on stderr shows every strike. Points:

    compile NAME        before a program is compiled: sample, score, accumulate, apply, ...
    program NAME        before a program runs
    call MODULE:NAME    before a function or method of this project is called
    open REGEX          before a file whose path matches is opened for writing, by any thread
    rename REGEX        before a file or folder is renamed to a path that matches
    remove REGEX        before a file or folder is removed

Actions: the name of a signal that the process sends itself, or two names; "hang"; "raise"; "full N", after which no
file of this process can grow beyond N bytes, as on a full disk; "gone", after which nobody reads the console; "nan N",
which makes output N of the program NaN; "answer X", which replaces all answers of a judge; "edit", which spoils in
place all that a judge was given.

Left out on purpose: any code for this in the package itself. The steps are observed from outside, at the two methods of
the session that a loop calls when a step begins and when the last one has ended.
"""

from __future__ import annotations

import collections
import contextlib
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

from tools.faults.plans import END, START, Plan, Step

SIGNAL_SECONDS = 0.3  # from one signal to the next


def _consoles() -> list[int]:
    """Return the descriptors of the console, and their duplicates, to which streams.py writes."""
    consoles, descriptors = {_file(1), _file(2)}, []
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # that of the listing is closed
            if _file(int(name)) in consoles:
                descriptors.append(int(name))
    return descriptors


def _file(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


class Injector:
    """Counts the calls of a plan's point in each step, and takes the action when it is due.

    Args:
      plan: what to do, and where.

    step: the current one.
    """

    def __init__(self, plan: Plan):
        self.kind, _, self.where = plan.at.partition(" ")
        self.verb, _, self._rest = plan.do.partition(" ")
        self.step: Step = START
        self._plan, self._calls = plan, collections.Counter[Step | None]()

    def due(self) -> bool:
        """Count one call, and return whether the action is due; the first one of a step is shown on stderr."""
        plan, step = self._plan, self.step
        if plan.steps is not None and step not in plan.steps:
            return False
        counted = None if plan.steps is None else step
        self._calls[counted] += 1
        call = self._calls[counted]
        if call == (plan.call or 1):
            os.write(2, f"{plan.line(step)}\n".encode())
        return plan.call in (None, call)

    def act(self) -> None:
        """Take an action that comes before the call; "nan", "answer" and "edit" come after it."""
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
        elif self.verb == "gone":
            reader, writer = os.pipe()
            os.close(reader)
            for descriptor in _consoles():
                os.dup2(writer, descriptor)
            os.close(writer)

    def replace(self, result: Any, arguments: Sequence[Any]) -> Any:
        """Return what the caller gets in place of `result`."""
        if self.verb == "answer":
            return [json.loads(self._rest)] * len(arguments[-1])
        if self.verb == "nan":
            import jax

            number = int(self._rest)
            return tuple(jax.tree.map(lambda x: x * float("nan"), part) if i == number else part
                         for i, part in enumerate(result))  # fmt: skip
        if self.verb == "edit":
            _edit(arguments[-1])
        return result


def _edit(comparisons: list[Any]) -> None:
    """Spoil comparisons in place, down to their messages and rows."""
    for comparison in comparisons:
        if not (comparison.row and comparison.messages):
            raise RuntimeError("a comparison without a row or messages: nothing to edit")
        comparison.messages[0]["content"] = "edited"
        comparison.row.clear()
    comparisons.clear()


def follow_steps(injector: Injector) -> None:
    """Let the injector learn the current step."""
    from xpo_jax.experiment.session import Session

    begin_step, end = Session.begin_step, Session.end

    def begins(session: Session, done: int) -> None:
        injector.step = done + 1
        begin_step(session, done)

    def ends(session: Session, *args: Any) -> dict[str, Any]:
        injector.step = END
        return end(session, *args)

    Session.begin_step, Session.end = begins, ends  # type: ignore[method-assign]


def install(injector: Injector) -> None:
    """Install the plan at its point."""
    follow_steps(injector)
    if injector.kind in ("open", "rename", "remove"):
        sys.addaudithook(functools.partial(_on_event, injector, re.compile(injector.where)))
        return
    owner, name, only = {
        "compile": ("xpo_jax.runtime.compilation:Program", "compile", injector.where),
        "program": ("xpo_jax.runtime.compilation:Program", "__call__", injector.where),
        "call": (*injector.where.rpartition(".")[::2], None),
    }[injector.kind]
    module, _, inner = owner.partition(":")
    if not inner:  # call MODULE:NAME of a function: the last dot is in the module's name
        module, name = injector.where.split(":")
    holder: Any = importlib.import_module(module)
    holder = getattr(holder, inner) if inner else holder
    setattr(holder, name, _wrapped(injector, getattr(holder, name), only))


def _wrapped(injector: Injector, function: Callable[..., Any], only: str | None) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if (only is not None and args[0].name != only) or not injector.due():
            return function(*args, **kwargs)
        injector.act()
        return injector.replace(function(*args, **kwargs), args)

    return wrapped


def _on_event(injector: Injector, pattern: re.Pattern[str], event: str, args: tuple[Any, ...]) -> None:
    path: Any = ""
    if injector.kind == "open" and event == "open":
        path, _, flags = args
        path = path if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) else ""
    elif injector.kind == "rename" and event == "os.rename":
        path = args[1]
    elif injector.kind == "remove" and event in ("os.remove", "shutil.rmtree"):
        path = args[0]
    if isinstance(path, str | os.PathLike) and pattern.search(os.fspath(path)) and injector.due():
        injector.act()


def main(argv: Sequence[str]) -> int:
    """Inject a fault into xpo_jax.main; return its exit status."""
    install(Injector(Plan.from_json(argv[0])))
    from xpo_jax.main import main as command

    return command(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
