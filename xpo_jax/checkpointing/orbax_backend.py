"""Orbax, as checkpoint.py uses it: which of its parts, with what settings, and what it need not say.

Left out on purpose: orbax.checkpoint.v1, whose threads for a folder that cannot be made keep the process from
exiting for twenty minutes (0.12.8; the same here, if folders were made in the background), and everything of Orbax
that decides which checkpoints there are.
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
    """Writes one tree in the background; the processes of a run each what their devices hold.

    Args:
      name: of this write, among those under way on other processes.
    """

    def __init__(self, name: str):
        _hush()
        # By default each device that holds an array like others cuts its part of it out first, with a program that
        # is compiled per shape and device in the middle of the run. So one of them writes it.
        kinds = ocp.type_handlers
        registry = kinds.create_type_handler_registry(
            (jax.Array, kinds.ArrayHandler(use_replica_parallel=False)), (np.ndarray, kinds.NumpyHandler())
        )
        # Weights hardly compress, so that is left; zarr3 allows for files of a certain size.
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
        """Returns when the arrays are copied from the devices. All processes call it."""
        self._orbax.save(folder, args=ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=_FILE_BYTES))

    def finish(self) -> None:
        """Returns when the files of all processes are in the folder; raises whatever went wrong in this one.

        Processes wait for each other through the coordination service, so that any thread may call it.
        """
        self._orbax.close()


def read(folder: epath.Path, like: Any) -> Any:
    """The tree that was written there, in the shapes, dtypes and shardings of jax.ShapeDtypeStructs."""
    _hush()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        return orbax.restore(folder, args=ocp.args.StandardRestore(like))


@functools.cache
def _hush() -> None:
    """What Orbax raises is told in one line; the tracebacks that it logs as well, from any thread, are not."""

    def not_orbax(record: logging.LogRecord) -> bool:
        trace = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
        where = (record.pathname, record.getMessage(), *(frame.filename for frame in trace))
        return not any(word in text for text in where for word in ("orbax", "OCDBT"))

    for name in ("absl", "asyncio"):  # the latter: tasks that failed with another, when they are collected
        logging.getLogger(name).addFilter(not_orbax)
