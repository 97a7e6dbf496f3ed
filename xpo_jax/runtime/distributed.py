"""The processes of one run: how they start and end, and which part of the work each one does.

Every process holds all prompts and runs the same program over the same global batches; nothing that is learned
depends on the number of processes. They differ in three things. Their devices hold slices of the arrays (`put`). Each
judges its local rows (`local_rows`), after which all processes have all verdicts. Process 0 (`is_lead_process`) writes
the files that a run has once. With a single process all of this is the identity.

Host steps that can fail run through `collectives.py`, so that a failure on any process fails all, with its reason. A
process that dies without a message ends the others too: through its broken connection where a collective is under way,
or at the latest when its heartbeat has been missing for HEARTBEAT_SECONDS.

Left out on purpose: continuing with fewer processes, and JAX's preemption notice, which swallows SIGTERM: a run that
gets a signal ends. JAX is not imported at the top, because reading a run directory does not need it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xpo_jax.runtime import cluster_detection, collectives
from xpo_jax.values import Array, Prompts

HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this long counts as dead
SHUTDOWN_SECONDS = 30  # how long the first process to end waits for the last
_GATHER_BYTES = 2**28  # of an array that is gathered at a time


# ---- start and end ------------------------------------------------------------------------------


def start(
    *,
    mode: Literal["auto", "on", "off"],
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: int,
) -> None:
    """Join the other processes of the run, if there are any; call this before anything else of JAX.

    Args:
      mode: "off" is a single process. "on" fails where no other processes are detected. "auto" joins other processes
        where `cluster_detection.detect` detects them or a coordinator is set, and is "off" elsewhere.
      coordinator: "host:port" of process 0, or None: JAX asks the cluster's scheduler.
      num_processes, process_id: required with a coordinator; None leaves them to the scheduler, too.
      timeout_seconds: how long to wait for all processes to appear; after that JAX aborts this one.

    Raises:
      ValueError: settings that contradict each other, or with which JAX cannot start.
    """
    if timeout_seconds < 1:
        raise ValueError(f"timeout_seconds is {timeout_seconds}, must be at least 1")
    if coordinator is None and (num_processes is not None or process_id is not None):
        raise ValueError("coordinator is None, but num_processes or process_id is set; set all three or none")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator is {coordinator!r}, must be host:port of process 0")
    cluster = None if coordinator is not None else cluster_detection.detect(os.environ)
    if mode == "off" or (mode == "auto" and coordinator is None and cluster is None):
        return
    if coordinator is None and cluster is None:
        raise ValueError(
            "mode is 'on', but no TPU pod, Slurm step, Open MPI job or indexed Kubernetes job was detected; set"
            " coordinator, num_processes and process_id, or mode='off'"
        )
    _initialize(coordinator, num_processes, process_id, timeout_seconds, cluster or str(coordinator))
    import jax
    from jax.experimental import multihost_utils

    from xpo_jax.runtime import backend

    backend.start()
    if mode == "on" and jax.process_count() == 1:
        raise ValueError(f"mode is 'on', but this is the only process ({cluster or coordinator})")
    if not is_lead_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends: only process 0 prints
    collectives.all_gather(None)  # compiles the exchange, so that no step has to
    multihost_utils.sync_global_devices("start")  # the same for Orbax


def _initialize(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: int,
    address: str,
) -> None:
    import jax

    # JAX aborts a process whose wait times out without raising, so print what it waits for beforehand.
    number = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    print(
        f"{number} joins the others ({address}), waiting for them for up to {timeout_seconds} s",
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
    except Exception as error:  # the scheduler's interface may raise any type as well
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the processes cannot find each other ({reason}); set coordinator, num_processes and process_id, or"
            " mode='off'"
        ) from error


def is_running() -> bool:
    """Return whether this process has joined others."""
    import jax

    return jax.distributed.is_initialized()


def leave(status: int) -> int:
    """Return the exit status; but where other processes may wait for this one, which failed alone, exit right here.

    An ordinary exit would first wait for the other processes, which wait for this one.
    """
    if is_running():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


# ---- who does what ------------------------------------------------------------------------------


def is_lead_process() -> bool:
    """Return whether this is process 0, which writes metrics, samples, environment and export, and prints."""
    import jax

    return jax.process_index() == 0


def local_slice(size: int) -> slice:
    """Return which of `size` rows this process judges and logs: in process order, and every row on one process."""
    import jax

    number, count = jax.process_index(), jax.process_count()
    return slice(size * number // count, size * (number + 1) // count)


def local_rows(prompts: Prompts) -> Prompts:
    """Return the same batch, in which only the rows of this process's `local_slice` are valid."""
    is_local = np.zeros(len(prompts.valid), bool)
    is_local[local_slice(len(is_local))] = True
    return prompts._replace(valid=prompts.valid & is_local)


def file_name(name: str) -> str:
    """Return this process's name for a file that every process writes: "pairs.jsonl", "pairs-1.jsonl", ..."""
    import jax

    path, number = Path(name), jax.process_index()
    return name if number == 0 else f"{path.stem}-{number}{path.suffix}"


# ---- between host and devices --------------------------------------------------------------------


def put(args: Any, shardings: Any) -> Any:
    """Turn host arrays into global arrays; each process gives its devices the slices that they hold.

    Args:
      args: a tree; NumPy arrays in it are complete and equal on every process, jax.Arrays pass unchanged.
      shardings: a tree of jax.sharding.Sharding, or a prefix of one.
    """
    import jax

    def put_leaf(leaf: Any, sharding: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        array = np.asarray(leaf)
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(
        lambda sharding, tree: jax.tree.map(lambda leaf: put_leaf(leaf, sharding), tree), shardings, args
    )


def fetch_to_lead(array: Array) -> Any:
    """Return the complete array on the host of process 0, gathered in bounded parts; None on the others.

    All processes call this at the same point. See `fetched_to_lead` for several arrays.
    """
    import jax
    from jax.experimental import multihost_utils

    if not isinstance(array, jax.Array):
        return np.asarray(array) if is_lead_process() else None
    if array.is_fully_addressable:
        # A jax.Array caches its copy on the host; a second one of the same buffers can be dropped with it.
        shards = [shard.data for shard in array.addressable_shards]
        return jax.device_get(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
    if array.ndim == 0 or array.nbytes <= _GATHER_BYTES:
        complete = multihost_utils.process_allgather(array, tiled=True)
        return complete if is_lead_process() else None
    rows = max(1, _GATHER_BYTES * array.shape[0] // array.nbytes)
    out = np.empty(array.shape, array.dtype) if is_lead_process() else None
    for first in range(0, array.shape[0], rows):
        part = multihost_utils.process_allgather(array[first : first + rows], tiled=True)
        if out is not None:
            out[first : first + rows] = part
    return out


@contextlib.contextmanager
def fetched_to_lead(arrays: Sequence[Array]) -> Iterator[Iterator[Any]]:
    """Yield an iterator over `fetch_to_lead` of each array, in order: what an export reads.

    Arrays that its reader leaves unread, because its disk is full or because it is not process 0, are gathered all the
    same at the end, because the other processes take part in it.
    """
    rest = iter(arrays)
    try:
        yield (fetch_to_lead(array) for array in rest)
    finally:
        for array in rest:
            fetch_to_lead(array)
