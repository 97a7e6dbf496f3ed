"""What a mesh makes of the programs, read from the compiled text: what is gathered, donated and split."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from fake_models import random_params
from jax.sharding import PartitionSpec as PS

from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.algorithm.model_spec import make_model_spec
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.packing import sequence_lengths
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import Vocabulary
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.algorithm.update import SUMS, init_state, make_apply
from xpo_jax.models.qwen2 import Qwen2Config
from xpo_jax.runtime import sharding
from xpo_jax.runtime.compilation import CompilationCounter
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Pairs, Prompts

ADAMW, ADAFACTOR = ({**group, "steps": 10} for group in (tiny_run.ADAMW, tiny_run.ADAFACTOR))


def model(vocab, D, F, L, N, K, H, tied):
    return Qwen2Config(vocab, D, F, L, N, K, H, 1e4, 1e-6, tied, 32768)


# Few features and many tokens: B x T x V is more than any array should have, on each of eight devices too.
B, P, T, V = 8, 8, 32, 1024
SMALL = model(V, 16, 24, 2, 4, 2, 8, tied=True)
QWEN_7B = model(152064, 3584, 18944, 28, 28, 4, 128, tied=False)


def programs(sizes, config=SMALL, *, T=T, optimizer=ADAMW, dtype=jnp.float32, chunk_tokens=16, **options):
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    shapes = {"batch_size": B, "prompt_buckets": (P,), "micro_batch_rows": 1} | options
    return Programs(
        make_model_spec(
            mesh,
            config,
            dtype=dtype,
            remat=True,
            batch_size=shapes["batch_size"],
            prompt_tokens=shapes["prompt_buckets"][-1],
        ),
        BatchShapes(chunk_tokens=chunk_tokens, **shapes),
        CandidateSampling(
            max_new_tokens=T, temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
        ),
        Vocabulary(size=config.vocab_size - 24, end_tokens=(1, 2), pad_token=0),
        optimizer=make_optimizer(**optimizer),
        loss=Sigmoid(bonus_clip=500.0),
        entropy_weight=0.01,
        seed=0,
    )


def compiled(programs, *names):
    """Return the compiled programs of these names; of several sequence lengths, the longest."""
    calls = {label.split()[0]: compile for label, compile in programs.declared_programs()}
    return {name: calls[name]() for name in names}


@functools.cache
def small():
    """Use the mesh (1, 4, 2): rows over four devices, heads and vocabulary over two."""
    here = programs((1, 4, 2))
    return here, compiled(here, "init", "sample", "score", "accumulate", "apply")


# ---- reading compiled text ------------------------------------------------------------------------


def elements(text):
    """Return the number of elements of each array in a piece of compiled text."""
    shapes = re.findall(r"\b(?:pred|bf16|[sfuc]\d+)\[([\d,]*)\]", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64)) for shape in shapes]


def gathered(text):
    """Return the elements of every array that a program gathers from several devices, inside its loops and outside."""
    results = re.findall(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) all-gather(?:-start)?\(", text, re.MULTILINE)
    return [size for result in results for size in elements(result)]


# ---- the compiled text ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sample", "score", "accumulate"])
def test_no_array_of_batch_times_tokens_times_vocabulary(name):
    """There is not even one as large as one device's shard of it."""
    assert max(elements(small()[1][name].as_text())) < B * T * V // 8


@pytest.mark.slow
def test_nor_at_152k_words_512_tokens_and_a_batch_of_64():
    """The vocabulary of Qwen2.5, and few features."""
    B, T, V = 64, 512, 152064
    few = model(V, 16, 24, 2, 4, 2, 8, tied=True)
    here = programs((1, 4, 2), few, T=T, chunk_tokens=1024, batch_size=B, prompt_buckets=(64,))
    for name, program in compiled(here, "sample", "score", "accumulate").items():
        assert max(elements(program.as_text())) < B * T * V // 8, name


def test_such_an_array_would_be_found():
    """The logits of all tokens at once would be such an array."""
    hidden, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B * T // 8, 16), (16, V)))
    text = jax.jit(lambda hidden, table: jnp.exp(hidden @ table)).lower(hidden, table).compile().as_text()
    assert max(elements(text)) == B * T * V // 8


def smallest_matrix(programs):
    """Return the number of elements of the smallest weight matrix that one device holds for sampling."""
    shapes = jax.tree.map(
        lambda w, s: s.shard_shape(w.shape), programs.model.weights, programs.model.weights_sharding
    )
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return min(int(np.prod(shape)) for shape in leaves if len(shape) == 2)


def test_the_sampler_gathers_no_weights():
    """It gathers them neither in the decode loop nor before it, where XLA would move what does not change in it."""
    here, text = small()[0], small()[1]["sample"].as_text()
    assert gathered(text), "tensor > 1: the draw at least needs the other half of the vocabulary"
    assert max(gathered(text)) < smallest_matrix(here)


def test_gathered_weights_would_be_found(monkeypatch):
    """Here the sampling weights are left split over fsdp."""
    rules = sharding.shardings
    monkeypatch.setattr(sharding, "shardings", lambda *args, leave_out=(): rules(*args))
    text = compiled(programs((1, 4, 2)), "sample")["sample"].as_text()
    assert max(gathered(text)) >= smallest_matrix(small()[0])


def test_caches_are_split_over_rows_and_heads_all_through_the_decode_loop():
    text = small()[1]["sample"].as_text()
    loops = [
        line
        for line in text.splitlines()
        if " while(" in line and 'op_name="jit(sample)/decode/while"' in line
    ]
    assert len(loops) == 1
    carried = loops[0].split(" while(")[0]
    K, H, layers = SMALL.num_key_value_heads, SMALL.head_dim, SMALL.num_hidden_layers
    for slots in (P, T):  # the prompts' keys and values, and the responses'
        assert len(re.findall(rf"f32\[{B // 4},{K // 2},{slots},{H}\]", carried)) == 2 * layers
        assert not re.search(rf"f32\[{B},\d+,{slots},\d+\]|f32\[\d+,{K},{slots},{H}\]", text)


def test_rows_are_split_over_fsdp_in_the_update_too():
    """XLA by itself splits the features of activations as those of the weights, and every device has all rows."""
    text = small()[1]["accumulate"].as_text()
    rows, slots, D = B // 2, sequence_lengths(P, T)[-1], SMALL.hidden_size
    assert re.search(rf"f32\[{rows // 4 * slots},{D}\]", text)
    assert not re.search(rf"f32\[{rows * slots},{D}\]", text)


# ---- what is given away, and where it lies ----------------------------------------------------------


def test_what_is_replaced_is_given_away():
    """The new state takes the memory of the old one, and the sum of gradients that of the previous sum."""
    here, programs = small()
    alias = {name: program.memory_analysis().alias_size_in_bytes for name, program in programs.items()}
    params = sharding.bytes_per_device(here.model.params, here.model.params_sharding)
    state = sharding.bytes_per_device(here.state, here.state_sharding)
    assert alias == {
        "init": params,
        "accumulate": params + 4 * len(SUMS),
        "apply": state,
        "sample": 0,
        "score": 0,
    }


def test_what_one_device_holds():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    tree = {
        "a": {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.bfloat16)},
        "b": jax.ShapeDtypeStruct((10,), np.float32),
        "n": jax.ShapeDtypeStruct((), np.int32),
    }
    split = sharding.shardings(mesh, tree, [(r"kernel", ("fsdp", "tensor")), (r"b", (None,))])
    assert sharding.bytes_per_device(tree, split) == 3 * 4 * 2 + 10 * 4 + 4


# Large enough that Adafactor factors its matrices; q_proj's is square.
FACTORED = model(256, 128, 192, 2, 4, 2, 32, tied=True)


def test_rows_and_columns_of_adafactor_are_split_as_their_axes_are():
    here = programs((2, 2, 2), FACTORED, optimizer=ADAFACTOR)
    get = lambda tree, name: dict(
        zip(
            jax.tree.leaves(sharding.paths(optax.tree.get(tree.opt_state, name))),
            jax.tree.leaves(optax.tree.get(tree.opt_state, name)),
            strict=True,
        )
    )
    moments = {
        (name, path): (leaf.shape, get(here.state_sharding, name)[path].spec)
        for name in ("v_row", "v_col", "v")
        for path, leaf in get(here.state, name).items()
    }
    layer = "layers.mlp.up_proj.kernel"  # [L D F]
    assert moments["v_row", layer] == ((2, 128), PS(None, "fsdp"))
    assert moments["v_col", layer] == ((2, 192), PS(None, "tensor"))
    assert moments["v", layer] == ((1,), PS())
    layer = (
        "layers.mlp.down_proj.kernel"  # [L F D]: the mean over the larger axis comes first, whichever it is
    )
    assert moments["v_row", layer] == ((2, 128), PS(None, "fsdp"))
    assert moments["v_col", layer] == ((2, 192), PS(None, "tensor"))
    layer = "layers.self_attn.q_proj.kernel"  # [L D D]
    assert moments["v_row", layer] == ((2, 128), PS(None, "fsdp"))
    assert moments["v_col", layer] == ((2, 128), PS(None, "tensor"))
    assert moments["v_row", "embed_tokens.embedding"] == ((128,), PS("fsdp"))
    assert moments["v_col", "embed_tokens.embedding"] == ((256,), PS("tensor"))
    assert moments["v", "layers.self_attn.k_proj.bias"] == ((2, 64), PS(None, "tensor"))
    assert moments["v_row", "layers.self_attn.k_proj.bias"] == ((1,), PS())
    assert moments["v", "norm.scale"] == ((128,), PS(None))


def test_optimizer_state_that_is_like_no_parameter_is_an_error():
    here = programs((2, 2, 2))
    leaf = jax.ShapeDtypeStruct((3, 3), np.float32)
    odd = {"mu": {"norm": {"scale": leaf}}, "trace": leaf, "count": jax.ShapeDtypeStruct((), np.int32)}
    with pytest.raises(ValueError) as raised:
        sharding.optimizer_shardings(here.model.mesh, odd, here.model.params, here.model.params_sharding)
    assert (
        str(raised.value) == "optimizer state that is like no parameter: mu.norm.scale (3, 3); trace (3, 3)"
    )


# ---- running ----------------------------------------------------------------------------------------


def test_an_adafactor_update_on_a_mesh_is_that_of_one_device():
    here = programs((2, 2, 2), FACTORED, optimizer=ADAFACTOR)
    compiled(here, "init", "apply")
    params, grads = random_params(0, FACTORED), random_params(1, FACTORED)
    put = functools.partial(jax.device_put, device=here.model.params_sharding)
    state, _ = here.apply(here.init(put(params)), put(grads), np.float32(0))

    optimizer, rate = make_optimizer(**ADAFACTOR)
    alone, _ = jax.jit(make_apply(optimizer, rate))(init_state(params, optimizer), grads, np.float32(0))
    for leaf, expected_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-5, atol=1e-6)
    split = lambda array, sharding: array.sharding.is_equivalent_to(sharding, array.ndim)
    assert all(jax.tree.leaves(jax.tree.map(split, state, here.state_sharding)))


def test_bfloat16_on_a_mesh_keeps_float32_masters_and_compiles_what_it_declared():
    """Run two whole steps: draw, score, learn, and get the new weights."""
    here, counter = programs((2, 2, 2), dtype=jnp.bfloat16), CompilationCounter()
    declared_programs = here.declared_programs()
    for _, compile_program in declared_programs:
        compile_program()
    rng = np.random.default_rng(0)
    prompts = Prompts(
        (),
        (),
        rng.integers(3, 900, (B, P)).astype(np.int32),
        rng.integers(1, P + 1, B).astype(np.int32),
        np.arange(B, dtype=np.int32),
        np.arange(B) < 7,
    )
    state = here.init(jax.device_put(random_params(0, SMALL, scale=0.1), here.model.params_sharding))
    before = jax.device_get(state.params)
    for step in range(2):
        weights = here.for_sampling(state.params)
        drawn = jax.device_get(
            [here.sample(weights, prompts, stream=Stream.TRAINING, step=step, candidate=c) for c in (0, 1)]
        )
        tokens, lengths = (np.stack([getattr(d, name) for d in drawn]) for name in ("tokens", "lengths"))
        packed = here.pack(prompts, tokens, lengths)
        logps = here.score(weights, packed)
        verdicts = [np.tile([1, 0], B // 2).astype(np.float32), np.ones(B, np.float32)]
        pairs = Pairs(
            prompts.tokens,
            prompts.lengths,
            tokens,
            lengths,
            jax.device_get(logps),
            *verdicts,
            prompts.valid,
        )
        state, sums, applied = here.update(state, {}, pairs, packed, alpha=1e-3, beta=0.1)
    grads, _ = here.zeros(state.params)
    assert applied["finite"] and float(applied["grad_norm"]) > 0 and logps.dtype == jnp.float32
    assert counter.count == len(declared_programs)

    dtypes = lambda tree: {x.dtype for x in jax.tree.leaves(tree)}
    mu, nu = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
    assert dtypes((state.params, mu, nu, grads, sums)) == {np.dtype(np.float32)}
    moved = optax.tree.norm(jax.tree.map(np.subtract, jax.device_get(state.params), before))
    assert float(moved) > 0.1
    split = lambda array, sharding: array.sharding.is_equivalent_to(sharding, array.ndim)
    assert all(jax.tree.leaves(jax.tree.map(split, state, here.state_sharding)))
    assert all(jax.tree.leaves(jax.tree.map(split, grads, here.model.params_sharding)))

    weights = here.for_sampling(state.params)
    assert dtypes(weights) == {np.dtype(jnp.bfloat16)}
    assert all(jax.tree.leaves(jax.tree.map(split, weights, here.model.weights_sharding)))
    table = np.asarray(state.params["embed_tokens"]["embedding"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(weights["embed_tokens"]["embedding"]), table)
    assert {spec for leaf in jax.tree.leaves(here.model.weights_sharding) for spec in leaf.spec} == {
        None,
        "tensor",
    }


# ---- what does not divide ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (
            QWEN_7B,
            (1, 1, 8),
            "key_values: 4 is not divisible by mesh.tensor=8;"
            " sizes that would work on 8 devices: mesh.tensor 1 or 2 or 4",
        ),
        (
            model(151936, 896, 4864, 24, 14, 2, 64, tied=True),
            (2, 1, 4),
            "key_values: 2 is not divisible by mesh.tensor=4;"
            " sizes that would work on 8 devices: mesh.tensor 1 or 2",
        ),
        (
            model(40, 20, 24, 2, 4, 4, 4, tied=True),
            (1, 8, 1),
            "embed_tokens.embedding: 20 is not divisible by mesh.fsdp=8",
        ),
        (
            model(40, 20, 24, 2, 4, 4, 4, tied=True),
            (1, 8, 1),
            "; sizes that would work on 8 devices: mesh.fsdp 1 or 2 or 4",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_with_sizes_that_do(config, sizes, message):
    with pytest.raises(ValueError) as raised:
        programs(sizes, config)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_batches_that_do_not_divide_are_refused_with_sizes_that_do():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharding.check_rows(mesh, batch_size=64, micro=4)
    with pytest.raises(ValueError) as raised:
        sharding.check_rows(mesh, batch_size=12, micro=6)
    assert str(raised.value) == (
        "micro 6 is not divisible by mesh.data x mesh.fsdp = 4; take a multiple of 4 for it,"
        " or a mesh with mesh.data x mesh.fsdp = 1 or 2"
    )


# ---- from shapes alone ------------------------------------------------------------------------------


@pytest.mark.slow
def test_7b_compiles_from_shapes_alone():
    """Sampler and update of Qwen2.5-7B; one device's arguments take the bytes that follow from the shardings."""
    B, P, S = 8, 64, 2
    here = programs(
        (1, 4, 2),
        QWEN_7B,
        dtype=jnp.bfloat16,
        chunk_tokens=64,
        prompt_buckets=(P,),
    )
    assert here.model.parameters == 7_615_616_512
    argument_bytes = {
        name: program.memory_analysis().argument_size_in_bytes
        for name, program in compiled(here, "sample", "score", "accumulate", "apply").items()
    }
    of = sharding.bytes_per_device
    params, weights = (
        of(here.model.params, here.model.params_sharding),
        of(here.model.weights, here.model.weights_sharding),
    )
    rows, word = B // 4, 4  # of the batch on one device; bytes of an int32 or float32
    # every row has a position, a step and whether it is valid; scalars: stream, candidate
    assert argument_bytes["sample"] == weights + rows * (P + 1) * word + rows * (2 * word + 1) + 2 * word
    width = here.packer.widths[-1]
    slots, pairs = 7 * here.packer.rows // 4 * width * word, here.packer.pairs_per_shard(width)
    assert argument_bytes["score"] == weights + S * B * word + slots + pairs * word
    targets = pairs * (2 * S * word + 2 * word + 1)
    assert argument_bytes["accumulate"] == 2 * params + len(SUMS) * word + slots + targets + 4 * word
    assert argument_bytes["apply"] == of(here.state, here.state_sharding) + params + word
    assert params == here.model.parameters * word // 8 + of_scales(here)
    for name, bytes in argument_bytes.items():
        print(f"{name}: {bytes / 2**30:.2f} GiB of arguments per device")


def of_scales(here):
    """Return what the norms, which are replicated, take on each device beyond an eighth."""
    named = dict(
        zip(
            jax.tree.leaves(sharding.paths(here.model.params)),
            jax.tree.leaves(here.model.params),
            strict=True,
        )
    )
    whole = sum(leaf.size * 4 for path, leaf in named.items() if path.endswith("scale"))
    bias = sum(leaf.size * 4 for path, leaf in named.items() if path.endswith("bias"))  # over tensor alone
    return whole * 7 // 8 + bias * 3 // 8
