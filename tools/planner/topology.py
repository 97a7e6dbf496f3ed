"""Accelerators that are not attached: their compilers compile for a topology that is described by its name.

`v5e-8` is named as Google Cloud names it, `h100x8` by the number of GPUs. The TPU compiler is libtpu (the extra `tpu`),
the GPU compiler is in JAX's CUDA plugin (the extra `cuda12`); both install on a machine that has no such device.

Left out on purpose: several slices of TPUs, and several hosts of GPUs; their links are slower, which no byte count
shows.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from .hardware import DEVICES, Device

# Chips of a TPU slice by axis, from Google Cloud's pages. v5e and v6e count chips; v5p counts its cores, two a chip.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TPUS: dict[str, tuple[str, dict[int, str]]] = {
    "v5e": ("tpu-v5e", _FLAT),
    "v6e": ("tpu-v6e", _FLAT),
    "v5p": (
        "tpu-v5p",
        {
            2: "1x1x1",
            8: "2x2x1",
            16: "2x2x2",
            32: "2x2x4",
            64: "2x4x4",
            128: "4x4x4",
            256: "4x4x8",
            512: "4x8x8",
        },
    ),
}
_GPUS = {"h100": "h100-80gb", "h200": "h200"}
_ALL_GPUS = 8  # of one host, and of one NVLink domain

# A GpuTargetConfigProto in text: what XLA reads of the device itself where there is one. Without the versions of cuDNN
# and CUDA it does not rewrite matmuls. What was compiled with these: docs/accelerators.md.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
_GPU_VALUES: dict[str, dict[str, Any]] = {
    "h100": {"bandwidth": 3352320000000, "memory": 84978434048, "name": "NVIDIA H100 80GB HBM3"},
    "h200": {"bandwidth": 4800000000000, "memory": 150754820096, "name": "NVIDIA H200"},
}


class Topology(NamedTuple):
    """Devices to compile for.

    name: as on the command line. platform: "tpu" or "cuda". count: devices. device: key of `hardware.DEVICES`.
    arguments: of `topologies.get_topology_desc`, besides the platform.
    """

    name: str
    platform: str
    count: int
    device: str
    arguments: dict[str, Any]

    @property
    def hardware(self) -> Device:
        """Its memory, peak and bandwidth, from the maker's data sheet."""
        return DEVICES[self.device]


def parse(name: str) -> Topology:
    """Return the topology of a name such as "v5e-8", "v5p-8" (8 cores, 4 chips) or "h100x8".

    Raises:
      ValueError: not a topology, with those that are.
    """
    match = re.fullmatch(r"(\w+?)(?:-(\d+)|x(\d+))", name)
    kind, number = (match[1], int(match[2] or match[3])) if match else ("", 0)
    if match and match[2] and number in _TPUS.get(kind, ("", {}))[1]:
        device, sizes = _TPUS[kind]
        axes = sizes[number]
        count = math.prod(int(axis) for axis in axes.split("x"))
        arguments: dict[str, Any] = {"topology_name": f"{kind}:{axes}"}
        if count == 1:  # by default a host has four chips
            arguments["chips_per_host_bounds"] = (1, 1, 1)
        return Topology(name, "tpu", count, device, arguments)
    if match and match[3] and kind in _GPUS and 0 < number <= _ALL_GPUS:
        target = _TARGET.format(**_GPU_VALUES[kind])
        arguments = {"topology_name": "", "target_config": target, "topology": f"1x1x{number}"}
        return Topology(name, "cuda", number, _GPUS[kind], arguments)
    tpus = [f"{tpu}-{'|'.join(map(str, sizes))}" for tpu, (_, sizes) in _TPUS.items()]
    gpus = [f"{gpu}x1 to x{_ALL_GPUS}" for gpu in _GPUS]
    raise ValueError(f"--topology={name}: no topology; known are {', '.join([*tpus, *gpus])}")


def prepare_environment(environ: Any) -> None:
    """Keep libtpu from waiting for a metadata server, and JAX from taking the devices of this machine.

    Call it before JAX's backends start.
    """
    environ["TPU_SKIP_MDS_QUERY"] = "1"  # otherwise minutes of waiting where there is no TPU
    environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # no device is used, so several processes may compile
    environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    environ["JAX_PLATFORMS"] = "cpu"


def devices(topology: Topology) -> Sequence[Any]:
    """Return the devices of a topology, which programs are compiled for and which hold no arrays.

    Raises:
      ValueError: its compiler is not installed, or does not start.
    """
    check_compiler(topology)
    prepare_environment(os.environ)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform=topology.platform, **topology.arguments)
    except Exception as error:  # of the plugin, in any class
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"--topology={topology.name}: its compiler does not start ({line}). If it is"
            f" not complete, {_install(topology)}"
        ) from error
    unattached: Sequence[Any] = described.devices
    return unattached


def _install(topology: Topology) -> str:
    extra = {"tpu": "tpu", "cuda": "cuda12"}[topology.platform]
    return f"install it with: python -m pip install 'xpo-jax[{extra}]' (no such device is needed)"


def check_compiler(topology: Topology) -> None:
    """Raise ValueError, with how to install it, if the compiler of a topology is missing."""
    modules = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}[topology.platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        raise ValueError(
            f"--topology={topology.name}: the {topology.platform.upper()} compiler is missing; {_install(topology)}"
        )
