"""Devices that cannot be used, and device memory that does not suffice."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_run import changed_config, run_name

from xpo_jax.algorithm.programs import Programs
from xpo_jax.checkpointing import checkpoint
from xpo_jax.runtime import backend, cluster_detection, compilation
from xpo_jax.runtime.backend import BackendError, NoBackend

ROOT = Path(__file__).parents[1]
OF_A_TPU = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of
15.48G hbm. Exceeded hbm capacity by 6.47G.

Total hbm usage >= 22.47G:
    reserved        530.00M
"""
OF_A_GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_start_platform_that_is_missing_is_one_line_with_status_2(platform):
    command = [sys.executable, "-m", "xpo_jax.main", "--config=configs/paraphrase.py"]
    environ = {**os.environ, "JAX_PLATFORMS": platform}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("xpo_jax: "))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert line.startswith(f"xpo_jax: JAX cannot use the devices of JAX_PLATFORMS={platform} (")
    assert line.endswith("or set JAX_PLATFORMS=cpu")


def test_start_tpu_of_another_process_is_one_line(monkeypatch):
    def devices():
        raise RuntimeError(
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 42. Not"
            " attempting to load libtpu.so in this process. (set JAX_PLATFORMS='' to automatically choose an available"
            " backend)"
        )

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(
        BackendError, match=r"in use by process with pid 42.* in this process\); stop the process"
    ):
        backend.start()


def test_start_does_not_take_the_cpu_where_a_tpu_cannot_be_used(monkeypatch):
    """JAX itself falls back to it silently if no platform was chosen."""
    platforms = []

    def devices(platform=None):
        platforms.append(platform)
        if platform == "tpu":
            raise RuntimeError("Backend 'tpu' failed to initialize: ABORTED: The TPU is already in use.")
        return [types.SimpleNamespace(platform="cpu")]

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(cluster_detection, "has_tpu", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(NoBackend, match=r"already in use\).* or set JAX_PLATFORMS=cpu"):
        backend.start()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    backend.start()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(cluster_detection, "has_tpu", lambda: False)
    backend.start()
    assert platforms == [None, "tpu", None, None]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (OF_A_GPU, r"allocate 68719476736 bytes, 68.72 GB\)"),
        (OF_A_TPU, r"hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G\)"),
    ],
)
def test_program_out_of_memory_names_program_size_and_remedy(monkeypatch, message, shown):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    program = compilation.Program("accumulate", mesh, lambda x: x + 1)
    x = jnp.ones(3)

    def raises(*args):
        raise jax.errors.JaxRuntimeError(message)

    with monkeypatch.context() as patched:
        patched.setattr(program, "lower", raises)
        with pytest.raises(
            BackendError, match=f"^out of device memory while compiling the .*'accumulate'.*{shown}"
        ):
            program.compile(x)
    program.compile(x)
    program._compiled = dict.fromkeys(program._compiled, raises)
    with pytest.raises(
        BackendError, match="while running the program 'accumulate'.*layout.micro_batch_rows"
    ) as caught:
        program(x)
    assert "\n" not in str(caught.value) and compilation.Program.latest == "accumulate"
    program._compiled = dict.fromkeys(program._compiled, lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        program(x)


def test_run_out_of_memory_in_a_step_is_one_line_with_the_step_saved(one_device, folder, monkeypatch):
    """The error appears where the results are read, outside of the call of a program."""
    update, calls = Programs.update, []

    def update_or_raise(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise jax.errors.JaxRuntimeError(OF_A_GPU)
        return update(self, *args)

    monkeypatch.setattr(Programs, "update", update_or_raise)
    status, _, err = run_name(folder, "memory", changed_config(folder, steps=4))
    lines = err.splitlines()
    assert status == 2 and lines[-1].startswith(
        "xpo_jax: out of device memory while running; the last program was"
    )
    assert checkpoint.latest(folder / "memory" / "checkpoints") == 2
