"""tools.plan --compile with the real TPU compiler: Qwen2.5-0.5B's programs for a v5e-8, from shapes alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.planner.program_code import PASS, SAMPLER

REPOSITORY = Path(__file__).parents[1]
SCRIPT = """
import json, sys
from tools.planner import compiled, findings, hlo, programs, topology
from tools.planner.fit import Source, setup
named = topology.parse("v5e-8")
devices = topology.devices(named)
fewer = ("layout.reference_steps=1",)  # one sampler instead of two
planned, config = setup(Source("paraphrase:Qwen/Qwen2.5-0.5B-Instruct", fewer, named.count, None, "tpu"))
declared = programs.declare(planned, config, devices)
wanted = [p for p in programs.longest(declared.programs) if p[0].split()[0] != "judge"]
built, refused = compiled.compile_all(wanted, lambda line: print(line, file=sys.stderr))
loops = {p.label: compiled.decode_loop(planned, p) for p in built if p.name == "sample"}
loop = next(iter(loops.values()))
plan = compiled.planned_phases(planned)
print(json.dumps({
    "refused": refused, "findings": findings.findings(planned, built, loops, declared.spec.dtype),
    "dtype": declared.spec.dtype.name, "gathered": loop.gathered, "moved": sum(loop.moved) / loop.floor,
    "programs": {p.name: [p.arguments, p.outputs, p.aliased, p.temporaries] for p in built},
    "code": {p.name: p.code / planned.model.num_hidden_layers for p in built},
    "permutes": {p.name: p.collectives["collective-permute"] for p in built},
    "planned": {p.name: compiled.planned_total(planned, p.label) for p in built},
    "phases": {name: size / plan[name] for name, size in compiled.phases(planned, built).items()},
}))
"""


ATTENTION = """
import json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as PS
from tools.planner import topology
from xpo_jax.models import attention_kernels
from xpo_jax.models.layers import Causal, Parts
from xpo_jax.runtime import sharding

def call(q, k, v, part, prompt):
    parts = Parts(part, prompt)
    order = attention_kernels.packed_order("splash", parts)
    mask = attention_kernels.packed_mask("splash", jax.tree.map(lambda x: jnp.take_along_axis(x, order, 1), parts))
    return jnp.sum(attention_kernels.attend("splash", q, Causal(k, v, mask)).astype(jnp.float32))

sizes = {}
for name, N, K, H, T in json.loads(input()):
    devices = topology.devices(topology.parse(name))
    mesh = sharding.mesh_over(devices, data=1, fsdp=-1, tensor=2)
    B = mesh.shape["fsdp"]
    def shaped(dtype, spec, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PS(*spec)))
    q = shaped(jnp.bfloat16, (sharding.ROWS, None, None, "tensor"), B, 1, T, N, H)
    k = shaped(jnp.bfloat16, (sharding.ROWS, None, "tensor"), B, 1, K, T, H)
    part = shaped(jnp.int32, (sharding.ROWS,), B, T)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(call, argnums=(0, 1, 2))).lower(q, k, k, part, part).compile()
    text = compiled.as_text()
    sizes[name] = [compiled.memory_analysis().temp_size_in_bytes, text.count('custom_call_target="tpu_custom_call"')]
print(json.dumps(sizes))
"""


def in_a_process(script, given=""):
    """What a script prints; in its own process, because libtpu reads the environment when it is loaded."""
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


without_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: make compile installs it",
)


@pytest.mark.slow
@without_compiler
def test_splash_attention_of_packed_rows_compiles_for_tpus_in_linear_memory():
    """A row per device of a prompt of 8,192 tokens and two responses of 1,024, forward and backward."""
    T = 10240
    cases = [("v5e-8", 14, 2, 64, T), ("v5p-8", 28, 4, 128, T), ("v6e-8", 16, 2, 80, T)]
    sizes = in_a_process(ATTENTION, json.dumps(cases))
    assert {name: kernels for name, (_, kernels) in sizes.items()} == {name: 3 for name, *_ in cases}
    for name, N, _, _, _ in cases:
        # queries, results and their gradients, and the sums of a query in a tile; scores take 1.5 GB and more
        assert sizes[name][0] < 8 * N // 2 * T * 128 * 4 < N // 2 * T * T * 4 / 2


@pytest.mark.slow
@without_compiler
def test_splash_attention_in_wider_blocks_compiles_for_tpus():
    """1,280 slots are two blocks of 640, whose scores, with those of the backward pass, must fit on the chip."""
    cases = [("v5e-8", 28, 4, 128, 1280), ("v5p-8", 28, 4, 128, 1280), ("v6e-8", 14, 2, 64, 1280)]
    sizes = in_a_process(ATTENTION, json.dumps(cases))
    assert {name: kernels for name, (_, kernels) in sizes.items()} == {name: 3 for name, *_ in cases}


@pytest.mark.slow
@without_compiler
def test_programs_of_qwen_0_5b_compile_for_a_v5e_8():
    """Minutes."""
    result = in_a_process(SCRIPT)
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
    # a layer's weights are gathered before their matmuls, not piece by piece in loops over shards
    assert result["permutes"]["accumulate"] == 0
    assert result["gathered"] == 0 and result["moved"] < 1.1
    assert all(0.9 < ratio < 1.1 for ratio in result["phases"].values())
    # per layer, which the planner counts for every program
    assert result["code"]["sample"] == pytest.approx(SAMPLER, rel=0.3)
    assert result["code"]["score"] == pytest.approx(PASS, rel=0.3)
    # one embedding is gathered, not all weights; and no device holds a float32 gradient of the complete embedding twice
    assert result["programs"]["for_sampling"][3] < 0.65 * weights
    assert result["programs"]["accumulate"][3] < 2 * weights
