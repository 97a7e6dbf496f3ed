"""tools.plan --compile with the real GPU compiler, and cuDNN's attention by it; no GPU is needed, and nothing is run.

The compiler is skipped where it is not installed: python -m pip install -e '.[dev,cuda12]' installs it (5.5 GB).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the GPU compiler is not installed"
    ),
]
# Compiles attention of prompts and of packed rows over eight H100s, forward and with its gradient, as scoring and the
# update call it; prints the results of cuDNN's calls, and the temporary bytes beside those of all scores.
CUDNN = """
import json, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as PS
from tools.planner import topology
from xpo_jax.models import attention_kernels
from xpo_jax.models.layers import Causal
from xpo_jax.runtime import sharding
devices = topology.devices(topology.parse("h100x8"))
mesh = sharding.mesh_over(devices, data=1, fsdp=8, tensor=1)
B, T, N, K, H = 16, 2051, 14, 2, 64
kernels = attention_kernels.choose("auto", sharding.platform(mesh), device=devices[0], dtype=jnp.bfloat16, head_dim=H)
attention_kernels.check("cudnn", devices[0], dtype=jnp.bfloat16, head_dim=H)

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PS(sharding.ROWS)))

def attended(q, k, v, mask=None):
    return attention_kernels.attend(kernels.at(T), q, Causal(k, v, mask))

def total(*arguments):
    return attended(*arguments).astype(jnp.float32).sum()

given, found = (array(B, 1, T, N, H), *[array(B, 1, K, T, H)] * 2), {}
for rows, arguments in (("prompts", given), ("packed", (*given, array(B, 1, T, T, dtype=jnp.bool_)))):
    for name, function in (("forward", attended), ("gradient", jax.grad(total, argnums=(0, 1, 2)))):
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*arguments).compile()
        call = r"= (\\(.*?\\)) custom-call\\(.*?custom_call_target=\\"(__cudnn\\$\\w+)\\""
        calls = re.findall(call, compiled.as_text())
        found[f"{rows} {name}"] = [calls, compiled.memory_analysis().temp_size_in_bytes]
print(json.dumps({"kernel": kernels.at(T), "scores": B // 8 * N * T * T * 4, "found": found}))
"""
# Compiles the attention of a decoded token, as the decoder calls it there, and prints the kernels and what they move.
DECODED = """
import json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as PS
from tools.planner import hlo, topology, traffic
from xpo_jax.models import attention_kernels
from xpo_jax.models.layers import Segment, before
from xpo_jax.runtime import sharding
devices = topology.devices(topology.parse("h100x1"))
mesh = sharding.mesh_over(devices, data=1, fsdp=1, tensor=1)
B, P, T, N, K, H = 8, 1024, 128, 14, 2, 64
kernels = attention_kernels.choose("auto", sharding.platform(mesh), device=devices[0], dtype=jnp.bfloat16, head_dim=H)

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PS()))

def decoded(q, k, v, new_k, new_v, lengths, t):
    segments = Segment(k, v, before(lengths, P)), Segment(new_k, new_v, before(t, T))
    return attention_kernels.attend(kernels.at(1), q, segments, fuse_rows=kernels.fuse_rows)

caches = *[array(B, K, P, H)] * 2, *[array(B, K, T, H)] * 2
given = array(B, 1, 1, N, H), *caches, array(B, dtype=jnp.int32), array(1, dtype=jnp.int32)
with jax.set_mesh(mesh):
    module = hlo.parse(jax.jit(decoded).lower(*given).compile().as_text())
kernels = [i for i in module.computations[module.entry].values() if i.opcode not in hlo.FREE]
print(json.dumps({"opcodes": [i.opcode for i in kernels], "moved": sum(traffic.total(module, module.entry))}))
"""


def run(*command):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


def test_programs_of_the_embedded_model_compile_for_eight_h100():
    done = run("-m", "tools.plan", "--compile", "--topology=h100x8", "--config=paraphrase", "--longest")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith("h100x8: 8 x NVIDIA H100") and "fits: " in done.stdout
    assert "finding" not in done.stdout and "refused" not in done.stdout


def test_auto_attention_of_long_rows_is_one_call_of_cudnn_in_scoring_and_in_the_update():
    done = run("-c", CUDNN)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kernel"] == "cudnn"
    for rows, target in (("prompts", "fmhaSoftmax"), ("packed", "fmhaScaleBiasSoftmax")):
        (forward,), temporary = result["found"][f"{rows} forward"]
        (again, backward), with_gradient = result["found"][f"{rows} gradient"]
        assert forward == again and forward[1] == f"__cudnn${target}"
        assert "f32[2,14,2056]" in forward[0]  # the sums of the softmax: the kernel for training
        assert backward[1] == f"__cudnn${target}Backward"
        assert max(temporary, with_gradient) < result["scores"] / 4


def test_attention_of_a_decoded_token_has_one_kernel_for_mask_and_softmax():
    """Beside it: one for the mask of all layers, one for the scores, two for the values, and one that adds these.

    It moves the caches, the scores in float32 twice, the probabilities in bfloat16 twice, and little else.
    """
    done = run("-c", DECODED)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert compiled["opcodes"] == ["fusion"] * 6
    caches, scores = 2 * 8 * 2 * (1024 + 128) * 64 * 2, 8 * 14 * (1024 + 128) * 4
    assert compiled["moved"] < 1.1 * (caches + 3 * scores)
