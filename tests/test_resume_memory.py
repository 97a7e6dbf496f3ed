"""A resumed run needs no more memory than one that was never interrupted, at the shape of SmolLM2-135M.

python -m pytest -n 0 -s -m slow tests/test_resume_memory.py prints both peaks: some minutes, 6 GB.
"""

import os
import subprocess
import sys
from pathlib import Path

import fake_models
import pytest
import tiny_run

from tools.planner.hardware import size_of

ROOT = Path(__file__).parents[1]
MEASURED = """
import sys
from xpo_jax.main import main
main()
# not getrusage: its ru_maxrss begins with what the process that started this one held
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", peak)
"""


def peak(folder, run, steps, rank):
    """Peak resident bytes of a process that takes a run to step `steps`."""
    config = tiny_run.tiny_config(folder)
    config.run_dir, config.steps, config.batch_size = str(folder / run), steps, 2
    config.model.dtype, config.lora.rank = "float32", rank
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 1
    config.sampling.max_new_tokens = 8
    config.layout.micro_batch_rows = 2
    config.optimizer.warmup_steps = 0
    config.evaluation.prompts, config.evaluation.reference_samples = 2, 1
    spec = tiny_run.write_config(folder / f"{run}_{steps}.py", config)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEASURED, f"--config={spec}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("peak ", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16], ids=["all weights", "rank 16"])
def test_a_resumed_run_needs_no_more_memory_than_a_fresh_one(tmp_path, rank):
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    fake_models.write_model(tmp_path / "model", config=size_of("SmolLM2-135M"))
    tiny_run.write_prompts(tmp_path)
    peak(tmp_path, "warm", 1, rank)  # fills the compilation cache, for compiling needs memory too
    fresh = peak(tmp_path, "fresh", 4, rank)
    peak(tmp_path, "resumed", 2, rank)
    resumed = peak(tmp_path, "resumed", 4, rank)
    print(f"fresh {fresh / 2**30:.2f} GiB, resumed {resumed / 2**30:.2f} GiB")
    assert resumed <= 1.05 * fresh
