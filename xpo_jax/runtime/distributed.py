"""The processes of one run: start-up, each one's share of the work, and that all go on or none does.

Every process holds all prompts and runs the same program over the same global batches; nothing that is learned
depends on how many there are. They differ in three things. Their devices hold slices of the arrays (`put`). Each
judges its share of the rows (`share`), after which all know all verdicts. Process 0 (`leads`) writes what there
is once. With a single process all of this is the identity.

Each host step that can fail stands in a `Together`: in one exchange every process learns whether it failed
anywhere, and why. A process that dies without a word ends the others too: by its broken connection where a
collective is under way, at the latest when its heartbeat stays out for HEARTBEAT_SECONDS.

Left out on purpose: going on with fewer processes, and JAX's preemption notice, which swallows SIGTERM: a run
that is told to end ends. No jax at the top: who only reads a run directory does not need it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from xpo_jax.io.files import to_json
from xpo_jax.io.text import error_line
from xpo_jax.runtime import cluster_detection
from xpo_jax.values import Array, Prompts

HEARTBEAT_SECONDS = 30  # without one a process is taken for dead
SHUTDOWN_SECONDS = 30  # that the first process to end waits for the last
_BLOCK_BYTES = 8192  # of one exchange: a status and the verdicts of a batch fit; more goes in several
_WHOLE_BYTES = 2**28  # of an array that is gathered at a time


class Failed(ValueError):
    """A step failed on one process or more; each process raises this, with the same line, at the same place."""


# ---- start and end ------------------------------------------------------------------------------


def start(
    *,
    mode: Literal["auto", "on", "off"],
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: int,
) -> None:
    """Join the other processes of the run, if there are any; to be called before anything else of JAX.

    Args:
      mode: "off" is a single process. "on" fails where no others are found. "auto" joins others where
        `cluster_detection.seen` sees them or a coordinator is given, and is "off" elsewhere.
      coordinator: "host:port" of process 0, or None: JAX finds it out from the cluster's scheduler.
      num_processes, process_id: with a coordinator; None leaves them to the scheduler, too.
      timeout_seconds: how long to wait for all processes to appear; then JAX aborts this one.

    Raises:
      ValueError: settings that do not go together, or of which JAX can make no start.
    """
    if timeout_seconds < 1:
        raise ValueError(f"timeout_seconds is {timeout_seconds}, must be at least 1")
    if coordinator is None and (num_processes is not None or process_id is not None):
        raise ValueError("coordinator is None, but num_processes or process_id is set; set all three or none")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator is {coordinator!r}, must be host:port of process 0")
    where = None if coordinator is not None else cluster_detection.seen(os.environ)
    if mode == "off" or (mode == "auto" and coordinator is None and where is None):
        return
    if coordinator is None and where is None:
        raise ValueError(
            "mode is 'on', but no TPU pod, Slurm step, Open MPI job or indexed Kubernetes job is seen here; set"
            " coordinator, num_processes and process_id, or mode='off'"
        )
    import jax

    # JAX ends a process that waits in vain without raising, so what it waits for is told before.
    number = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    print(
        f"{number} joins the others ({where or coordinator}), for which it waits up to {timeout_seconds} s",
        file=sys.stderr,
        flush=True,
    )
    explicit = None not in (coordinator, num_processes, process_id)
    try:
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except Exception as error:  # of the scheduler's interface as well, of any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the processes cannot find each other ({reason}); give coordinator, num_processes and process_id, or"
            " set mode='off'"
        ) from error
    if mode == "on" and jax.process_count() == 1:
        raise ValueError(f"mode is 'on', but this is the only process ({where or coordinator})")
    if not leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for good: process 0 tells what there is to tell
    from jax.experimental import multihost_utils

    gather(None)  # compiles the exchange, so that no step has to
    multihost_utils.sync_global_devices("start")  # the same for Orbax


def running() -> bool:
    """Whether this process has joined others."""
    import jax

    return jax.distributed.is_initialized()


def leave(status: int) -> int:
    """The exit status; but where other processes may wait for this one, which failed alone, it ends here.

    An ordinary exit would first wait for the others, who wait for this one.
    """
    if running():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


# ---- who does what ------------------------------------------------------------------------------


def leads() -> bool:
    """Whether this process writes what there is once: metrics, samples, environment, export, the console."""
    import jax

    return jax.process_index() == 0


def share(size: int) -> slice:
    """Of `size` rows those that this process judges, logs and answers for; in order, and all of them once."""
    import jax

    number, count = jax.process_index(), jax.process_count()
    return slice(size * number // count, size * (number + 1) // count)


def mine(prompts: Prompts) -> Prompts:
    """The same batch, in which only the rows of this process's share are real."""
    own = np.zeros(len(prompts.valid), bool)
    own[share(len(own))] = True
    return prompts._replace(valid=prompts.valid & own)


def file_name(name: str) -> str:
    """A file that each process writes for itself: "pairs.jsonl" of process 0 is "pairs-1.jsonl" of process 1."""
    import jax

    path, number = Path(name), jax.process_index()
    return name if number == 0 else f"{path.stem}-{number}{path.suffix}"


# ---- between host and devices --------------------------------------------------------------------


def put(args: Any, shardings: Any) -> Any:
    """Host arrays as global arrays; each process gives its devices the slices that they hold.

    Args:
      args: a tree; NumPy arrays in it are whole and the same on every process, jax.Arrays pass.
      shardings: a tree of jax.sharding.Sharding, or a prefix of one.
    """
    import jax

    def one(leaf: Any, sharding: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(
        lambda sharding, tree: jax.tree.map(lambda leaf: one(leaf, sharding), tree), shardings, args
    )


def whole(array: Array) -> Any:
    """All of an array on the host of process 0, a bounded part at a time; None elsewhere.

    All processes call it at the same point. See `wholes` for several arrays.
    """
    import jax
    from jax.experimental import multihost_utils

    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if array.is_fully_addressable:
        # A jax.Array keeps what it once brought to the host; a second one of the same buffers can be dropped.
        shards = [shard.data for shard in array.addressable_shards]
        return jax.device_get(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
    if array.ndim == 0 or array.nbytes <= _WHOLE_BYTES:
        found = multihost_utils.process_allgather(array, tiled=True)
        return found if leads() else None
    rows = max(1, _WHOLE_BYTES * array.shape[0] // array.nbytes)
    out = np.empty(array.shape, array.dtype) if leads() else None
    for first in range(0, array.shape[0], rows):
        part = multihost_utils.process_allgather(array[first : first + rows], tiled=True)
        if out is not None:
            out[first : first + rows] = part
    return out


@contextlib.contextmanager
def wholes(arrays: Sequence[Array]) -> Iterator[Iterator[Any]]:
    """An iterator over `whole` of each array, in order: what an export reads.

    What its reader leaves, because its disk is full or because it is not process 0, is gathered all the same
    at the end, for the other processes take part in it.
    """
    rest = iter(arrays)
    try:
        yield (whole(array) for array in rest)
    finally:
        for array in rest:
            whole(array)


# ---- agreement ----------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """What each process gave, by process; all call it at the same point.

    Args:
      value: as `files.to_json` takes it: numbers that are not finite come back as None, arrays as lists. A
        float32 comes back as the Python number that is the same float32.
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


class Together(contextlib.AbstractContextManager["Together"]):
    """A host step that all processes leave together: all go on, or all raise `Failed` with the same line.

        with Together("judging") as together:
            together.value = ...  # what this process found, if the others need it
        together.values  # what each process found, see `gather`

    What is done in it must not wait for other processes. With a single process an error passes as it is.

    Args:
      what: the step, for the message.
    """

    def __init__(self, what: str):
        self._what = what
        self.value: Any = None
        self.values: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import jax

        if jax.process_count() == 1:
            self.values = [self.value]
            return
        if isinstance(error, Failed) or not (error is None or isinstance(error, Exception)):
            return  # all know it already; or the user interrupts
        if error is None:
            text = None
        elif isinstance(error, ValueError | OSError | FloatingPointError):
            text = error_line(error)
        else:  # a fault of somebody's code: whoever looks for it wants the place
            traceback.print_exception(error)
            text = error_line(error, with_class=True)
        told = gather({"failure": text, "value": self.value if error is None else None})
        self.values = [each["value"] for each in told]
        failures = {
            number: each["failure"] for number, each in enumerate(told) if each["failure"] is not None
        }
        if not failures:
            return
        first, text = next(iter(failures.items()))
        if len(failures) == len(told) and len(set(failures.values())) == 1:
            raise Failed(text) from error  # the same everywhere, as in a run of one process
        raise Failed(f"process {first} of {len(told)}, {self._what}: {text}") from error


def require_alike(values: Sequence[Mapping[str, Any]]) -> None:
    """Raise `Failed`, naming the first difference, if not all processes gave the same."""
    for number, value in enumerate(values):
        for name, there in value.items():
            if there != values[0].get(name):
                raise Failed(
                    f"process {number} has another {name} than process 0; start all processes with the same config,"
                    " code and files"
                )
