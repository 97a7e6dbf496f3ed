"""Detect whether this process was started as one of many, and by what: the basis of `distributed.mode = "auto"`.

JAX's own detection cannot be queried without being used, and treats a Slurm step of a single task, or any Kubernetes
pod, as a cluster. So this reads the variables that the schedulers document, and reports a cluster only where they
state more than one process; `jax.distributed.initialize()` then determines addresses and process numbers. A TPU
machine may be one of many without any variable that says so: there JAX queries the machine's metadata server, which
is near and answers at once.

Left out on purpose: schedulers that JAX does not support. There, set coordinator, num_processes and process_id.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path


def detect(environ: Mapping[str, str]) -> str | None:
    """Return the name of what started several processes including this one; None on a plain machine.

    Args:
      environ: the environment variables.
    """

    def number(name: str) -> int:
        text = environ.get(name, "")
        return int(text) if text.isdecimal() else 0

    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if "SLURM_STEP_NODELIST" in environ and number("SLURM_NTASKS") > 1:
        return "Slurm"  # in a step (srun); the batch script itself runs once
    if environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
        if "," in hosts or environ.get("TPU_PROCESS_ADDRESSES_PATH") or number("MEGASCALE_NUM_SLICES") > 1:
            return "TPU pod on Kubernetes"
        if not hosts and "TPU_SKIP_MDS_QUERY" not in environ and has_tpu():
            return "TPU VM"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"  # a pod of an indexed job
    return None


def has_tpu() -> bool:
    """Return whether this machine has TPU chips, and what JAX needs to use them is installed."""
    devices = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return devices and importlib.util.find_spec("libtpu") is not None
