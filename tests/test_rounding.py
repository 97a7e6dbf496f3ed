"""The tool that measures what bfloat16 costs a gradient, and rotary angles at positions beyond 8k."""

import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import SPEAKING, write_model
from safetensors.numpy import load_file, save_file

from tools import rounding
from xpo_jax.models.hf import weights
from xpo_jax.models.layers import rope_angles

BATCH = rounding.batch_of(range(1, 200, 3), 2, 4, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_gradient_of_a_tensor_in_the_file_equals_finite_differences(folder, tmp_path, name):
    gradient = rounding.ours(folder, BATCH, jnp.float32)[name]
    value = rounding.objective(SPEAKING, BATCH, jnp.float32)
    stored = load_file(folder / "model.safetensors")
    direction = np.random.default_rng(0).normal(size=gradient.shape).astype(np.float32)

    def changed(by):
        save_file({**stored, name: stored[name] + by * direction}, tmp_path / "model.safetensors")
        return float(value(weights.load_params(tmp_path, SPEAKING)))

    slope = (changed(2e-3) - changed(-2e-3)) / 4e-3
    assert np.sum(gradient * direction) == pytest.approx(slope, rel=0.02, abs=0.05)


def test_gradients_in_float32_are_those_of_transformers(folder):
    pytest.importorskip("torch")
    computed, expected = (
        rounding.ours(folder, BATCH, jnp.float32),
        rounding.by_torch(folder, BATCH, autocast=False),
    )
    assert computed.keys() == expected.keys()
    assert max(rounding.distance(computed[n], expected[n]).error for n in expected) < 1e-4


def test_distance_is_relative_and_has_the_cosine():
    assert rounding.distance(np.array([1.0, 1]), np.array([1.0, 0])) == pytest.approx((1, 2**-0.5))
    assert rounding.distance(np.array([1.0]), np.array([0.0])) is None


def test_table_has_the_median_and_the_worst_of_the_layers():
    exact = {f"model.layers.{i}.norm": np.array([1.0, 0]) for i in range(3)}
    near = {f"model.layers.{i}.norm": np.array([1.0, 0.01 * 2**i]) for i in range(3)}
    assert rounding.table(exact, {"bfloat16": near}).splitlines()[-1].split() == (
        ["layers.*.norm", "0.02", "/", "0.04", "0.999201"]
    )


def test_rounding_prints_an_error_of_bfloat16_for_each_kind_of_tensor(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rounding, "has_torch", lambda: False)
    text = tmp_path / "text"
    text.write_text("The dog barks, and the cat sleeps. " * 2)
    arguments = [f"--model={folder}", f"--text={text}", "--prompt_tokens=8", "--response_tokens=16"]
    assert rounding.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    kinds = {line.split()[0]: [float(x) for x in line.split() if x[0].isdigit()] for line in lines}
    assert {"embed_tokens.weight", "layers.*.self_attn.q_proj.bias", "norm.weight"} <= kinds.keys()
    for median, worst, cosine in kinds.values():
        assert 1e-4 < median <= worst < 0.2 and 0.98 < cosine < 1
    assert rounding.main([*arguments, "--rows=9"]) == 2
    assert "--text: it has 70 tokens, and 9 x 24 are needed" in capsys.readouterr().err


@pytest.mark.parametrize("position", [8_192, 32_768, 131_071])
def test_rotary_angles_are_float32s_at_long_positions(position):
    """A bfloat16 angle would be wrong by up to 256 radians there; a float32 angle is by 2**-24 of itself, or two."""
    cos, sin = rope_angles(jnp.asarray([position]), 64, 1e6)
    exact = position * 1e6 ** (-np.arange(0, 64, 2) / 64)
    error = np.hypot(np.cos(exact) - np.ravel(cos), np.sin(exact) - np.ravel(sin)).max()
    assert error < 4 * position * 2**-24
