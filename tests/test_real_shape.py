"""Qwen2.5-0.5B's exact shape with random weights: the same numbers as transformers', and memory while loading.

tools/build/golden_model.py made the golden values; tools/build/random_model.py draws the weights again. All of it is
slow, needs about 5 GB of memory and 1 GB of disk, and no torch.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import graphdef
from flax import nnx

from tools.build import random_model
from xpo_jax.algorithm.sampler import make_sampler
from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.models.hf import model_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
GOLDEN = np.load(Path(__file__).parent / "golden" / "random_0.5b.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield random_model.write(tmp_path_factory.mktemp("random"), random_model.CONFIG_05B)


@pytest.fixture(scope="module")
def config(folder):
    return model_folder.read_config(folder)


def logits_of(params, config, *, stacked):
    """f32[positions, V] at the golden positions."""
    graph = graphdef(config, stacked=stacked)

    @jax.jit
    def run(params, ids, positions):
        model = nnx.merge(graph, params)
        return model.unembed(model.prefill(ids)[0][0, positions])

    return np.asarray(
        run(params, jnp.asarray(GOLDEN["ids"][None], jnp.int32), GOLDEN["positions"]), np.float32
    )


def test_logits_are_transformers_in_float32(folder, config):
    logits = logits_of(model_folder.load_params(folder, config), config, stacked=True)
    print(f"float32: off by at most {np.abs(logits[:, GOLDEN['columns']] - GOLDEN['logits']).max():.1e}")
    np.testing.assert_allclose(logits[:, GOLDEN["columns"]], GOLDEN["logits"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(logits.argmax(-1), GOLDEN["argmax"])
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), GOLDEN["logsumexp"], rtol=0, atol=1e-3)


def test_64_greedy_tokens_are_transformers(folder, config):
    """The closest of them leads by far more than rounding moves a logit, so all must agree."""
    assert GOLDEN["margin"] > 5e-3
    settings = Sampling(max_new_tokens=64, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1)
    none = config.vocab_size  # no token ends a response
    graph = graphdef(config, stacked=False)
    sample = make_sampler(graph, settings, vocab_size=config.vocab_size, end_tokens=(none,), pad_token=0)
    prompt = jnp.asarray(GOLDEN["ids"][None, : GOLDEN["prompt"]], jnp.int32)
    padded = jnp.pad(prompt, ((0, 0), (0, 4)), constant_values=7)  # right-padded, as prompts are in a bucket
    keys = jax.random.split(jax.random.key(0), 1)
    weights = model_folder.load_weights(folder, config, dtype=jnp.float32)
    drawn = jax.jit(sample)(weights, padded, jnp.array([prompt.shape[1]]), jnp.array([True]), keys)
    np.testing.assert_array_equal(drawn.tokens[0], GOLDEN["greedy"])


def test_bfloat16_is_as_far_off_as_transformers_is(folder, config):
    """Every activation is rounded to 8 bits. The limit is 1.5 times the error of transformers' own bfloat16 pass,
    because the order of roundings differs. That error is 4 % of the logits' spread."""
    logits = logits_of(model_folder.load_weights(folder, config, dtype=jnp.bfloat16), config, stacked=False)
    off = np.sqrt(np.mean((logits[:, GOLDEN["columns"]] - GOLDEN["logits"]) ** 2))
    print(f"bfloat16: off by {off:.4f} (rms), transformers by {GOLDEN['bfloat16_rms']:.4f}")
    assert 0.1 * GOLDEN["bfloat16_rms"] < off < 1.5 * GOLDEN["bfloat16_rms"]


LOADING = """
import sys
import jax, jax.numpy as jnp
from xpo_jax.models import registry
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime import sharding
folder, how = sys.argv[1:]
config = model_folder.read_config(folder)
if how == "masters on a mesh":
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    split = sharding.shardings(mesh, registry.param_shapes(config), registry.family(config).sharding)
    loaded = model_folder.load_params(folder, config, shardings=split)
elif how == "masters":
    loaded = model_folder.load_params(folder, config)
else:
    loaded = model_folder.load_weights(folder, config, dtype=jnp.bfloat16)
jax.block_until_ready(loaded)
# not getrusage: its ru_maxrss begins with what the process that started this one held
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)), peak)
"""


@pytest.mark.parametrize(
    ("how", "size"),
    [("masters", 494_032_768 * 4), ("masters on a mesh", 494_032_768 * 4), ("weights", 494_032_768 * 2)],
)
def test_loading_needs_the_arrays_and_little_more(folder, how, size):
    """The process, with interpreter and libraries, takes at most 1 GB more than what was loaded."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOADING, str(folder), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loaded, peak = map(int, done.stdout.split())
    print(f"{how}: {loaded / 1e9:.3f} GB loaded, peak {peak / 1e9:.3f} GB")
    assert loaded == size
    assert peak < loaded + 1e9
