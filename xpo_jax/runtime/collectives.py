"""Host steps that succeed on all processes of a run, or on none.

A host step that can fail runs through one of these functions: in one exchange every process learns whether the step
failed anywhere, and why. With a single process there is no exchange, and errors pass unchanged.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from xpo_jax.io.files import to_json
from xpo_jax.io.text import error_line
from xpo_jax.runtime.backend import NoBackend

_BLOCK_BYTES = 8192  # per exchange: holds a status and the verdicts of a batch; longer values take several

T = TypeVar("T")


class Failed(ValueError):
    """A step failed on at least one process; every process raises this, with the same line, at the same place."""


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Run a host step that every process completes, or none.

        with all_or_none("opening the logs"):
            ...

    The step must not wait for other processes. Use `run_on_all` if the others need its result.

    Args:
      what: the step, for the error message.

    Raises:
      Failed: on every process, if the step failed on any. With a single process, the error itself.
    """
    try:
        yield
    except BaseException as error:
        _exchange(what, error, None)
        raise
    _exchange(what, None, None)


def run_on_all(what: str, step: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `step(*args)`, a host step, on every process, and return the results of all, by process.

    Args:
      what: the step, for the error message.
      step: must not wait for other processes. With several processes its result passes through JSON, see `all_gather`.

    Raises:
      Failed: see `all_or_none`.
    """
    return run_and_gather(what, lambda: (None, step(*args)))[1]


def run_on_lead(what: str, step: Callable[..., Any], *args: Any) -> Any:
    """Run `step(*args)` on process 0 alone, and return its result on every process; see `run_on_all`."""
    import jax

    return run_on_all(what, lambda: step(*args) if jax.process_index() == 0 else None)[0]


def run_and_gather(what: str, step: Callable[..., tuple[T, Any]], *args: Any) -> tuple[T, list[Any]]:
    """Run `step(*args)`, a host step, on every process, and gather a part of its result.

    Args:
      what: the step, for the error message.
      step: returns its local result, and the value that goes to all processes; see `run_on_all`.

    Returns:
      The local result, and the values of all processes, by process.

    Raises:
      Failed: see `all_or_none`.
    """
    try:
        result, value = step(*args)
    except BaseException as error:
        _exchange(what, error, None)
        raise
    return result, _exchange(what, None, value)


def all_gather(value: Any) -> list[Any]:
    """Return the value of every process, by process; all processes call this at the same point.

    Args:
      value: what `files.to_json` accepts: numbers that are not finite come back as None, arrays as lists. A
        float32 comes back as the Python float that is the same float32.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    text = to_json(value).encode()
    data = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    blocks: list[np.ndarray] = []
    lengths: list[int] = []
    longest = 1
    while len(blocks) * _BLOCK_BYTES < longest:
        block = np.zeros(_BLOCK_BYTES, np.uint8)
        piece = data[len(blocks) * _BLOCK_BYTES :][:_BLOCK_BYTES]
        block[: len(piece)] = piece
        blocks.append(multihost_utils.process_allgather(block))  # u8[processes, _BLOCK_BYTES]
        if not lengths:
            lengths = [int.from_bytes(row[:8].tobytes(), "little") for row in blocks[0]]
            longest = 8 + max(lengths)
    received = np.concatenate(blocks, axis=1)
    return [json.loads(row[8 : 8 + n].tobytes()) for row, n in zip(received, lengths, strict=True)]


def require_equal(values: Sequence[Mapping[str, Any]]) -> None:
    """Raise `Failed`, naming the first difference, unless all processes gave equal values."""
    for number, value in enumerate(values):
        for name, entry in value.items():
            if entry != values[0].get(name):
                raise Failed(
                    f"process {number} has another {name} than process 0; start all processes with the same config,"
                    " code and files"
                )


def _exchange(what: str, error: BaseException | None, value: Any) -> list[Any]:
    """Return the value of every process, or raise `Failed` on all if any of them has an error.

    Returns [] without an exchange for an error that no exchange may wait on: the caller re-raises it.
    """
    import jax

    if isinstance(error, NoBackend):
        return []
    if jax.process_count() == 1:
        return [value]
    if isinstance(error, Failed) or not (error is None or isinstance(error, Exception)):
        return []  # every process has it already, or the user interrupts this one
    if error is None:
        text = None
    elif isinstance(error, ValueError | OSError | FloatingPointError):
        text = error_line(error)
    else:  # a bug: its traceback is needed to debug it
        traceback.print_exception(error)
        text = error_line(error, with_class=True)
    statuses = all_gather({"failure": text, "value": value})
    failures = {i: status["failure"] for i, status in enumerate(statuses) if status["failure"] is not None}
    if not failures:
        return [status["value"] for status in statuses]
    first, text = next(iter(failures.items()))
    if len(failures) == len(statuses) and len(set(failures.values())) == 1:
        raise Failed(
            text
        ) from error  # the same on every process, so the same line as in a run of one process
    raise Failed(f"process {first} of {len(statuses)}, {what}: {text}") from error
