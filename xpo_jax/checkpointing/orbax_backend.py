"""Orbax as checkpoint.py configures it, including which of its log messages are silenced.

Left out on purpose: orbax.checkpoint.v1, whose threads keep the process from exiting for twenty minutes if a folder
cannot be made (0.12.8; the same would happen here if folders were made in the background), and CheckpointManager, see
retention.py.
"""

from __future__ import annotations

import functools
import logging
import traceback
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

_FILE_BYTES = 2**27  # roughly; each file is hashed by one thread
_WRITE_SECONDS = 4 * 3600  # after which Orbax gives up


class Writer:
    """Writes one tree in the background; each process writes what its devices hold.

    Args:
      name: of this write; the same on all processes, and another for each write.
    """

    def __init__(self, name: str):
        _silence_logs()
        # By default devices that hold the same array each slice out a part of it first, with a program that is
        # compiled per shape and device in the middle of the run. Here one of them writes the array.
        kinds = ocp.type_handlers
        registry = kinds.create_type_handler_registry(
            (jax.Array, kinds.ArrayHandler(use_replica_parallel=False)), (np.ndarray, kinds.NumpyHandler())
        )
        # Weights hardly compress, so compression is off; zarr3 supports a target size of files.
        handler = ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry, use_compression=False, use_zarr3=True
        )
        self._orbax = ocp.AsyncCheckpointer(
            handler,
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_WRITE_SECONDS, create_directories_asynchronously=False
            ),
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name),
        )

    def start(self, folder: epath.Path, tree: Any) -> None:
        """Start writing; return when the arrays are copied from the devices. All processes call it."""
        self._orbax.save(folder, args=ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=_FILE_BYTES))

    def finish(self) -> None:
        """Wait until the files of all processes are in the folder; raise any error of this process.

        Processes wait for each other through the coordination service, so any thread may call it.
        """
        self._orbax.close()


def read(folder: epath.Path, like: Any) -> Any:
    """Return the tree that was written there, in the shapes, dtypes and shardings of jax.ShapeDtypeStructs."""
    _silence_logs()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        return orbax.restore(folder, args=ocp.args.StandardRestore(like))


@functools.cache
def _silence_logs() -> None:
    """Drop the tracebacks that Orbax logs, from any thread: what it raises is reported in one line."""

    def not_orbax(record: logging.LogRecord) -> bool:
        trace = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
        where = (record.pathname, record.getMessage(), *(frame.filename for frame in trace))
        return not any(word in text for text in where for word in ("orbax", "OCDBT"))

    for name in (
        "absl",
        "asyncio",
    ):  # the latter logs tasks that failed with another, when they are collected
        logging.getLogger(name).addFilter(not_orbax)
