"""What is chosen by the platform is chosen by the mesh's devices, not by this process's default backend."""

import ast
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_config

from xpo_jax.algorithm.model_spec import compute_dtype
from xpo_jax.experiment.setup import prepare
from xpo_jax.models import attention_kernels
from xpo_jax.runtime import sharding

ROOT = Path(__file__).parents[1]


def mesh_of(platform):
    """A mesh of two devices that are not attached."""
    client = SimpleNamespace(platform_version=platform)
    devices = [SimpleNamespace(platform=platform, client=client, device_kind=platform)] * 2
    return SimpleNamespace(devices=np.array(devices).reshape(1, 2, 1))


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [("cpu", jnp.float32), ("tpu", jnp.bfloat16), ("gpu", jnp.bfloat16), ("cuda", jnp.bfloat16)],
)
def test_compute_dtype_auto_is_that_of_the_meshs_devices(platform, dtype):
    assert jax.default_backend() == "cpu"
    assert compute_dtype("auto", sharding.platform(mesh_of(platform))) is dtype
    assert sharding.platform(mesh_of(platform)) in attention_kernels.LONG
    for name in ("float32", "bfloat16"):
        assert compute_dtype(name, sharding.platform(mesh_of(platform))) == jnp.dtype(name)


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16")])
def test_prepare_programs_compute_in_the_dtype_of_the_mesh(tmp_path, monkeypatch, platform, dtype):
    config = tiny_config(tmp_path)
    config.model.dtype = "auto"
    monkeypatch.setattr(sharding, "platform", lambda mesh: platform)
    model = prepare(config).programs.model
    assert model.dtype == dtype and {leaf.dtype.name for leaf in jax.tree.leaves(model.weights)} == {dtype}


def test_check_kernel_reports_the_platform_of_the_mesh():
    with pytest.raises(
        ValueError, match="needs an NVIDIA GPU, and this backend is tpu; set it to 'auto' or 'blocks'"
    ):
        attention_kernels.check("cudnn", mesh_of("tpu").devices.flat[0], dtype=jnp.bfloat16, head_dim=64)


def test_mesh_over_devices_of_a_topology_has_those_devices():
    devices = jax.devices()[:4]
    mesh = sharding.mesh_over(devices, data=1, fsdp=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2} and set(mesh.devices.flat) == set(devices)
    with pytest.raises(ValueError, match="is not the 4"):
        sharding.mesh_over(devices, data=3, fsdp=1, tensor=1)


def calls(path, *names):
    """Lines of a module that call jax.NAME."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id == "jax"
    ]


def test_no_module_that_is_lowered_reads_the_default_backend():
    """A program may be compiled for devices that are not attached: `python -m tools.plan --compile`."""
    rooms = [ROOT / "xpo_jax" / room for room in ("algorithm", "models", "judges")]
    paths = [path for room in rooms for path in room.rglob("*.py")]
    names = ("default_backend", "devices", "local_devices", "device_count", "local_device_count")
    assert paths and {path.name: calls(path, *names) for path in paths if calls(path, *names)} == {}
