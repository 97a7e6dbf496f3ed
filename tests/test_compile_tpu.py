"""tools.plan --compile with the real TPU compiler: Qwen2.5-0.5B's programs for a v5e-8, from shapes alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = """
import json, sys
from tools.planner import compiled, estimate, hlo, programs, topology
from tools.planner.fit import Source, setup
named = topology.parse("v5e-8")
devices = topology.devices(named)
fewer = ("layout.reference_steps=1",)  # one sampler instead of two
planned, config = setup(Source("paraphrase:Qwen/Qwen2.5-0.5B-Instruct", fewer, named.count, None))
declared = programs.declare(planned, config, devices)
wanted = [p for p in programs.longest(declared.programs) if p[0].split()[0] != "judge"]
built, refused = compiled.compile_all(wanted, lambda line: print(line, file=sys.stderr))
loops = {p.label: compiled.decode_loop(planned, p) for p in built if p.name == "sample"}
loop = next(iter(loops.values()))
plan = {name: sum(parts.values()) for name, parts in estimate.memory(planned).items()}
print(json.dumps({
    "refused": refused, "findings": compiled.findings(planned, built, loops, declared.spec.dtype),
    "dtype": declared.spec.dtype.name, "gathered": loop.gathered, "moved": sum(loop.moved) / loop.floor,
    "programs": {p.name: [p.arguments, p.outputs, p.aliased, p.temporaries] for p in built},
    "planned": {p.name: compiled.planned_total(planned, p.label) for p in built},
    "phases": {name: size / plan[name] for name, size in compiled.phases(planned, built).items()},
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: make compile installs it",
)
def test_programs_of_qwen_0_5b_compile_for_a_v5e_8():
    """Minutes; in its own process, because libtpu reads the environment when it is loaded."""
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert (result["refused"], result["findings"], result["dtype"]) == ([], [], "bfloat16")
    weights = 494_032_768
    arguments, outputs, aliased, _ = result["programs"]["accumulate"]
    gradients = weights * 4 / 8  # float32, over eight devices
    assert aliased == pytest.approx(gradients, rel=0.01) and outputs == pytest.approx(gradients, rel=0.01)
    assert arguments == pytest.approx(2 * gradients, rel=0.01)
    state = result["programs"]["apply"]
    assert state[2] == pytest.approx(3 * gradients, rel=0.01)  # the whole state is updated in place
    assert result["programs"]["sample"][0] == pytest.approx(
        2 * weights, rel=0.01
    )  # bfloat16, on every device
    assert result["gathered"] == 0 and result["moved"] < 1.1
    assert all(0.75 < ratio < 1.25 for ratio in result["phases"].values())
