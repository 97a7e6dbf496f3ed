"""Attention by a library's kernel against the einsum: its wrapper computed by XLA, and what is lowered for CUDA.

Nothing here needs a GPU, and so nothing here runs cuDNN itself: that is tested where `jax.nn` is.
"""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import PACKED, TINY, random_params
from flax import nnx
from tiny_run import tiny_config

from xpo_jax.experiment.setup import prepare
from xpo_jax.models import attention_kernels
from xpo_jax.models.decoder import Decoder
from xpo_jax.models.layers import Causal, attention
from xpo_jax.runtime.sharding import make_mesh

by_xla = functools.partial(attention_kernels.cudnn, implementation="xla")


def arrays(*shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def prompts(B, C, T, N, K, H, dtype):
    """Return (q, k, v) and the mask of `Qwen2.prefill`."""
    return arrays((B, C, T, N, H), (B, C, K, T, H), (B, C, K, T, H), dtype=dtype), None


def rows(B, C, T, N, K, H, dtype):
    """Return (q, k, v) and the mask of `Qwen2.packed`, in which some queries see only themselves."""
    part = jnp.asarray(np.random.default_rng(1).integers(3, size=(B, T)))
    mask = (part[:, :, None] == part[:, None]) & jnp.tril(jnp.ones((T, T), bool))
    return prompts(B, C, T, N, K, H, dtype)[0], mask[:, None]


def with_gradients(function, given, mask):
    """Return the output and the gradients of a weighted sum of it, in float64."""

    def weighted(q, k, v):
        out = function(q, Causal(k, v, mask))
        (weights,) = arrays(out.shape, dtype=jnp.float32, seed=9)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*given)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


@pytest.mark.parametrize("of", [prompts, rows])
@pytest.mark.parametrize("shape", [(3, 1, 7, 4, 2, 8), (2, 2, 8, 3, 3, 16), (1, 1, 1, 4, 1, 8)])
def test_equals_the_einsum(of, shape):
    given, mask = of(*shape, jnp.float32)
    for ours, wanted in zip(
        with_gradients(by_xla, given, mask), with_gradients(attention, given, mask), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("of", [prompts, rows])
def test_rounds_bfloat16_no_worse_than_the_einsum(of):
    """Both are compared with the einsum of the same numbers in float32."""
    given, mask = of(3, 1, 7, 4, 2, 8, jnp.bfloat16)
    exact = with_gradients(attention, [x.astype(jnp.float32) for x in given], mask)
    for ours, usual, wanted in zip(
        with_gradients(by_xla, given, mask), with_gradients(attention, given, mask), exact, strict=True
    ):
        error, allowed = (np.sqrt(np.mean((x - wanted) ** 2)) for x in (ours, usual))
        assert error <= 1.5 * allowed


# ---- in the model -----------------------------------------------------------------------------------


def model(kernel, *, stacked=True):
    """Return (graphdef, shapes of the parameters)."""
    kernels = attention_kernels.choose(kernel, "cpu")
    return nnx.split(
        nnx.eval_shape(
            lambda: Decoder(TINY, rngs=nnx.Rngs(0), stacked=stacked, remat=stacked, kernels=kernels)
        )
    )


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(TINY.vocab_size, size=shape), jnp.int32)


def loss(graphdef, params):
    """Return a number that depends on every hidden state of a pass over prompts and of one over packed rows."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model.prefill(tokens(4, 9))
    packed = model.packed(tokens(4, 11), *PACKED)
    return sum(
        jnp.sum(x * weights) for x in (hidden, packed) for weights in arrays(x.shape, dtype=jnp.float32)
    )


@pytest.mark.parametrize("sizes", [pytest.param(None, marks=pytest.mark.slow), (2, 2, 2)])
def test_the_model_learns_the_same(monkeypatch, sizes):
    """This holds without a mesh, and with rows over four devices and heads over two."""
    calls = []
    monkeypatch.setattr(
        attention_kernels, "cudnn", lambda q, keys: (calls.append(q.shape), by_xla(q, keys))[1]
    )
    params = random_params(0, TINY)

    def learned(kernel):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, model(kernel)[0])))
        if sizes is None:
            return step(params)
        with jax.set_mesh(make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))):
            return step(params)

    ours, wanted = learned("cudnn"), learned(attention_kernels.EINSUM)
    # what one device computes: of 4 rows and 4 heads all, or 1 and 2
    R, N = (4, 4) if sizes is None else (1, 2)
    assert set(calls) == {(R, 1, 9, N, 4), (R, 1, 11, N, 4)}
    for leaf, wanted_leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(
            leaf, wanted_leaf, rtol=2e-4, atol=2e-4 * float(jnp.abs(wanted_leaf).max())
        )


def test_decoding_is_the_einsums():
    """Decoding with cuDNN could not be traced here, because this machine does not have it."""
    graphdef, shapes = model("cudnn", stacked=False)
    bare, lengths = model(attention_kernels.EINSUM, stacked=False)[0], jnp.asarray([6, 3])

    def decode(params):
        model = nnx.merge(graphdef, params)
        caches = nnx.merge(bare, params).prefill(tokens(2, 6))[1]
        return model.decode(tokens(2), 0, lengths, caches, model.empty_caches(2, 3))[0]

    assert jax.eval_shape(decode, shapes).shape == (2, TINY.hidden_size)
    with pytest.raises(RuntimeError, match="cuDNN"):
        jax.eval_shape(lambda params: nnx.merge(graphdef, params).prefill(tokens(2, 6)), shapes)


def test_forward_is_the_same_call_with_and_without_a_gradient(monkeypatch):
    """cuDNN has one kernel for inference and one for training, which may round differently."""
    calls = []

    @jax.custom_vjp
    def library(q, k, v):
        calls.append("inference")
        return q

    def forward(q, k, v):
        calls.append("training")
        return q, (q, k, v)

    library.defvjp(forward, lambda saved, gradient: (gradient, *(jnp.zeros_like(x) for x in saved[1:])))
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: library(q, k, v))
    given, mask = rows(2, 1, 8, 4, 2, 8, jnp.bfloat16)

    def total(q, k, v):
        return jnp.sum(attention_kernels.cudnn(q, Causal(k, v, mask)).astype(jnp.float32))

    jax.eval_shape(total, *given)
    assert calls == ["training"]
    jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), *given)
    jax.eval_shape(jax.grad(jax.checkpoint(total), argnums=(0, 1, 2)), *given)
    assert set(calls) == {"training"}


def test_auto_takes_cudnn_on_an_nvidia_gpu_in_bfloat16_and_blocks_elsewhere():
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
    device = SimpleNamespace(
        platform="gpu", client=client, compute_capability="9.0", device_kind="NVIDIA H100"
    )
    long = functools.partial(choose_long, device=device, dtype=jnp.bfloat16, head_dim=64)
    assert long() == "cudnn"
    assert long(dtype=jnp.float32) == long(head_dim=256) == "blocks"
    device.compute_capability = "7.5"
    assert long() == "blocks"
    client.platform_version, device.device_kind = "rocm 60000", "AMD Instinct MI300X"
    assert long() == "blocks"


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 0), ("gpu", 1), ("tpu", 1)])
def test_prefill_computes_keys_and_values_with_their_layer_on_accelerators(platform, barriers):
    kernels = attention_kernels.choose("auto", platform)
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: Decoder(TINY, rngs=nnx.Rngs(0), stacked=False, kernels=kernels))
    )
    traced = str(jax.make_jaxpr(lambda params: nnx.merge(graphdef, params).prefill(tokens(2, 6)))(shapes))
    assert traced.count("optimization_barrier") == barriers  # in the function of a layer
    assert traced.count("name=layer") == TINY.num_hidden_layers  # which is called for each


def choose_long(**properties):
    return attention_kernels.choose("auto", "gpu", **properties).at(attention_kernels.EINSUM_TOKENS + 1)


# ---- for a GPU --------------------------------------------------------------------------------------


def lowered_for_cuda(function, given, mask):
    call = lambda q, k, v: jnp.sum(function(q, Causal(k, v, mask)).astype(jnp.float32))
    traced = jax.jit(jax.grad(call, argnums=(0, 1, 2))).trace(*given)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def most_elements(text):
    """Return the number of elements of the largest array in a lowered program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
    return max(int(np.prod([int(n) for n in shape.split("x") if n])) for shape in shapes)


@pytest.fixture
def as_if_cudnn_were_here(monkeypatch):
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("of", [prompts, rows])
def test_lowered_for_cuda_it_is_cudnn_and_holds_no_scores(as_if_cudnn_were_here, of):
    """Both passes are lowered, at an odd length, on a machine without a GPU."""
    B, T, N, H = 2, 131, 16, 8
    given, mask = of(B, 1, T, N, 2, H, jnp.bfloat16)
    text = lowered_for_cuda(attention_kernels.cudnn, given, mask)
    bias = "" if mask is None else "ScaleBias"
    called = re.findall(r"custom_call @(__cudnn\$\w+)", text)
    assert called == [f"__cudnn$fmha{bias}Softmax", f"__cudnn$fmha{bias}SoftmaxBackward"]
    assert re.findall(r"mask_type\\22: \\22(\w+)", text) == ["CAUSAL", "CAUSAL"]
    assert most_elements(text) == max(B * 136 * N * H, 0 if mask is None else B * 136 * 136)
    # the einsum of packed rows has four blocks of queries
    scores = B * N * T * T if mask is None else B * N * (T - T * 3 // 4) * T
    assert most_elements(lowered_for_cuda(attention, given, mask)) == scores > 3 * most_elements(text)


def test_on_a_mesh_each_device_calls_cudnn_for_its_own_rows_and_heads(as_if_cudnn_were_here):
    given, mask = rows(4, 1, 11, 4, 2, 8, jnp.bfloat16)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        text = lowered_for_cuda(functools.partial(attention_kernels.attend, "cudnn"), given, mask)
    # one row of 11 slots, padded to 16, of two heads of queries that share one of keys
    wanted = "tensor<1x16x2x8xbf16>, tensor<1x16x1x8xbf16>, tensor<1x16x1x8xbf16>"
    assert (
        re.findall(r"custom_call @__cudnn.* : \((.*?), tensor<1x(?:1x16x16xbf|2x16xf)", text) == [wanted] * 2
    )


# ---- where it is allowed ----------------------------------------------------------------------------


def test_refused_where_the_backend_is_no_nvidia_gpu(tmp_path):
    config = tiny_config(tmp_path)
    config.model.attention = "cudnn"
    with pytest.raises(ValueError) as refused:
        prepare(config)
    assert str(refused.value) == (
        "model.attention 'cudnn' needs an NVIDIA GPU, and this backend is cpu; set it to 'auto' or 'blocks'"
    )
    config.model.attention = "flash"
    with pytest.raises(ValueError, match="model.attention: .*'cudnn' or 'splash' is expected, found 'flash'"):
        prepare(config)


def test_what_the_kernel_cannot_do_is_known_beforehand():
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
    device = SimpleNamespace(
        platform="gpu", client=client, compute_capability="8.6", device_kind="NVIDIA A10"
    )
    check = functools.partial(attention_kernels.check, device=device, dtype=jnp.bfloat16, head_dim=64)
    check("cudnn")
    for head_dim in (20, 256):
        with pytest.raises(
            ValueError, match=f"at most 128 numbers, and this model's have {head_dim}; set it"
        ):
            check("cudnn", head_dim=head_dim)
        check("einsum", head_dim=head_dim)
    with pytest.raises(ValueError, match="needs model.dtype bfloat16, and it is float32; set it to 'auto'"):
        check("cudnn", dtype=jnp.float32)
    device.compute_capability = "7.5"
    with pytest.raises(ValueError, match="capability 8.0 or more, and this one has 7.5; set it to 'auto'"):
        check("cudnn")
    unattached = SimpleNamespace(platform_version="NVIDIA H100 80GB HBM3")  # of the compiler without a device
    check(
        "cudnn", device=SimpleNamespace(**{**vars(device), "client": unattached, "compute_capability": "9.0"})
    )
    client.platform_version, device.device_kind = "rocm 60000", "AMD Instinct MI300X"
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and this backend is gpu; set it to 'auto'"):
        check("cudnn")
