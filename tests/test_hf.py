"""Hugging Face folders: what is read equals what was written, and every kind of damage has its own error."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from xpo_jax.models.decoder import Decoder
from xpo_jax.models.decoder_family import unstack
from xpo_jax.models.hf import model_folder, weights
from xpo_jax.models.qwen2 import FAMILY
from xpo_jax.runtime import sharding

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/logits.npz"))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def copy(tmp_path):
    """Return a function that copies a golden model to a folder where a test may damage it."""
    return lambda name: shutil.copytree(GOLDEN / name, tmp_path / name)


def tensors(folder):
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), model_folder.param_shapes(config)
    )


def assert_same_bits(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def fails(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Reading


@pytest.mark.parametrize("name", MODELS)
def test_params_are_the_files_tensors_as_float32(name):
    config = model_folder.read_config(GOLDEN / name)
    params, stored = model_folder.load_params(GOLDEN / name, config), tensors(GOLDEN / name)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(array.size for array in stored.values())
    same = lambda ours, tensor: np.testing.assert_array_equal(ours, stored[tensor].astype(np.float32))
    same(params["embed_tokens"]["embedding"], EMBEDDING)
    same(params["layers"]["self_attn"]["k_proj"]["kernel"][1].T, K_PROJ)
    same(params["layers"]["self_attn"]["q_proj"]["kernel"][0].T, "model.layers.0.self_attn.q_proj.weight")
    if config.qkv_bias:
        same(params["layers"]["self_attn"]["q_proj"]["bias"][0], "model.layers.0.self_attn.q_proj.bias")
    if config.qk_norm:
        same(params["layers"]["self_attn"]["k_norm"]["scale"][1], "model.layers.1.self_attn.k_norm.weight")
    assert ("lm_head" in params) is (HEAD in stored)


def test_sharded_loading_gives_the_requested_shardings():
    name = "qwen2_untied_head_dim_f16"
    config = model_folder.read_config(GOLDEN / name)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    where = sharding.shardings(mesh, model_folder.param_shapes(config), FAMILY.sharding)
    by_layer = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
    where["layers"]["mlp"]["gate_proj"]["kernel"] = by_layer
    params = model_folder.load_params(GOLDEN / name, config, shardings=where)
    assert jax.tree.map(lambda p: p.sharding, params) == where
    assert_same_bits(params, model_folder.load_params(GOLDEN / name, config))
    assert params["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape == (2, 16, 32)
    assert params["layers"]["mlp"]["gate_proj"]["kernel"].addressable_shards[0].data.shape == (1, 32, 32)


def test_sharded_loading_reads_each_byte_once(monkeypatch):
    config = model_folder.read_config(GOLDEN / "qwen2_tied")
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    where = sharding.shardings(mesh, model_folder.param_shapes(config), FAMILY.sharding)
    read, original = [], weights.read_slice

    def counted(stored, window):
        piece = original(stored, window)
        read.append(piece.size)
        return piece

    monkeypatch.setattr(weights, "read_slice", counted)
    params = model_folder.load_params(GOLDEN / "qwen2_tied", config, shardings=where)
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert max(read) < config.vocab_size * config.hidden_size  # never a complete embedding


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.bfloat16) for name in MODELS), ("qwen2_tied_one_kv_bf16", jnp.float32)]
)
def test_sampling_weights_are_the_params_unstacked_and_rounded_once(name, dtype):
    """The files are in float32, float16 and bfloat16; the arrays are on one device and in shards over a mesh."""
    config = model_folder.read_config(GOLDEN / name)
    want = jax.tree.map(lambda p: p.astype(dtype), unstack(model_folder.load_params(GOLDEN / name, config)))
    ours = model_folder.load_weights(GOLDEN / name, config, dtype=dtype)
    mesh = sharding.make_mesh(data=4, fsdp=2, tensor=1)
    where = sharding.shardings(mesh, want, FAMILY.sharding)
    sharded = model_folder.load_weights(GOLDEN / name, config, dtype=dtype, shardings=where)
    assert jax.tree.map(lambda p: p.sharding, sharded) == where
    for loaded in (ours, sharded):
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
        exact = jax.tree.map(lambda p: p.astype(jnp.float32), loaded)
        assert_same_bits(exact, jax.tree.map(lambda p: p.astype(jnp.float32), want))


@pytest.mark.parametrize("block", [4, 1000])
def test_files_are_read_in_blocks(monkeypatch, block):
    """The rows do not divide into blocks, transposed or not; a block is at least one row."""
    name = "qwen2_untied_sharded"
    config = model_folder.read_config(GOLDEN / name)
    whole, read, original = model_folder.load_params(GOLDEN / name, config), [], weights.read_slice
    monkeypatch.setattr(weights, "BLOCK_BYTES", block)

    def counted(stored, window):
        piece = original(stored, window)
        read.append((piece.shape[0], 4 * piece.size))
        return piece

    monkeypatch.setattr(weights, "read_slice", counted)
    assert_same_bits(model_folder.load_params(GOLDEN / name, config), whole)
    assert all(rows == 1 or size <= block for rows, size in read)


# Writing


@pytest.mark.parametrize("name", MODELS)
def test_saved_params_are_loaded_bit_for_bit(name, tmp_path):
    config = model_folder.read_config(GOLDEN / name)
    params = random_params(config)
    norm = params["norm"]["scale"]
    params["norm"]["scale"] = norm.at[:4].set(jnp.asarray([-0.0, 1e-42, 3.4e38, -1e-30], jnp.float32))
    model_folder.save(tmp_path / "new" / "export", params, config, GOLDEN / name)
    assert model_folder.read_config(tmp_path / "new" / "export") == config
    assert_same_bits(model_folder.load_params(tmp_path / "new" / "export", config), params)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["export"]  # nothing is left beside it


def test_large_models_are_written_in_shards_with_an_index(tmp_path):
    config = model_folder.read_config(GOLDEN / "qwen2_tied")
    params = random_params(config)
    model_folder.save(tmp_path / "export", params, config, GOLDEN / "qwen2_tied", max_shard_bytes=40_000)
    files = sorted(tmp_path.glob("export/*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(sum(a.nbytes for a in load_file(f).values()) <= 40_000 for f in files)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert_same_bits(model_folder.load_params(tmp_path / "export", config), params)


def test_params_on_a_mesh_come_to_the_host_one_array_at_a_time(tmp_path, monkeypatch):
    name = "qwen2_untied_head_dim_f16"
    config = model_folder.read_config(GOLDEN / name)
    where = sharding.shardings(
        sharding.make_mesh(data=2, fsdp=2, tensor=2), model_folder.param_shapes(config), FAMILY.sharding
    )
    params = model_folder.load_params(GOLDEN / name, config, shardings=where)
    on_host = lambda: [leaf.shape for leaf in jax.tree.leaves(params) if leaf._npy_value is not None]
    fetched, original = [], jax.device_get

    def counted(tree):
        fetched.append([leaf.shape for leaf in jax.tree.leaves(tree)])
        return original(tree)

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", counted)
        model_folder.save(tmp_path / "export", params, config, GOLDEN / name, max_shard_bytes=10_000)
    assert sorted(shape for (shape,) in fetched) == sorted(leaf.shape for leaf in jax.tree.leaves(params))
    assert on_host() == []  # jax keeps what was fetched for as long as the array lives
    assert len(list(tmp_path.glob("export/*.safetensors"))) > 8
    jax.device_get(params["embed_tokens"])
    assert on_host() == [(config.vocab_size, config.hidden_size)]  # so the check above would have seen it
    assert_same_bits(model_folder.load_params(tmp_path / "export", config), params)


def test_bfloat16_export_rounds_once_and_says_so_in_the_config(tmp_path):
    name = "qwen2_untied_sharded"  # spelt torch_dtype
    config = model_folder.read_config(GOLDEN / name)
    params = random_params(config)
    model_folder.save(tmp_path / "export", params, config, GOLDEN / name, dtype="bfloat16")
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same_bits(model_folder.load_params(tmp_path / "export", config), rounded)
    assert (
        config_of(tmp_path / "export")["torch_dtype"] == config_of(tmp_path / "export")["dtype"] == "bfloat16"
    )


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


OLD = {"rope_theta": 1e6, "torch_dtype": "float32"}
NEW = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "float32"}


@pytest.mark.parametrize(
    ("source", "added"),
    [
        (OLD, NEW),
        (NEW, OLD),
        (OLD | NEW, {}),
        # what is there stays, and only what is missing is added
        (OLD | {"rope_parameters": None}, NEW),
        (OLD | {"rope_parameters": {"rope_type": "default"}}, NEW),
        (
            {"rope_theta": 1000000},
            {"rope_parameters": NEW["rope_parameters"]},
        ),  # the source states no dtype, so the export states none
        (NEW | {"dtype": "bfloat16"}, OLD | {"dtype": "float32"}),  # as written
    ],
)
def test_config_json_is_carried_over_with_both_spellings(source, added, copy, tmp_path):
    folder = copy("qwen2_tied")
    rest = {k: v for k, v in config_of(folder).items() if k not in OLD | NEW} | {"özgür": [1e-06, None]}
    (folder / "config.json").write_text(json.dumps(rest | source))
    config = model_folder.read_config(folder)
    assert config.rope_theta == 1e6
    model_folder.save(tmp_path / "export", random_params(config), config, folder)
    assert config_of(tmp_path / "export") == rest | source | added
    assert model_folder.read_config(tmp_path / "export") == config
    if not added:
        assert (tmp_path / "export" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "source",
    [
        {"rope_theta": 1e6, "rope_scaling": YARN},  # as transformers 4 and vLLM read it
        {
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
        {"rope_parameters": YARN | {"rope_theta": 1e6}},  # as transformers 5 does
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "rope_scaling": YARN,
        },  # added by hand
    ],
)
def test_scaled_positions_are_carried_over_in_both_spellings(source, copy, tmp_path):
    folder = copy("qwen2_tied")
    rest = {k: v for k, v in config_of(folder).items() if k not in OLD | NEW}
    (folder / "config.json").write_text(json.dumps(rest | source))
    config = model_folder.read_config(folder)
    assert config.rope_scaling.factor == 4.0 and config.max_position_embeddings == 128
    model_folder.save(tmp_path / "export", random_params(config), config, folder)
    written = config_of(tmp_path / "export")
    for spelling in ("rope_scaling", "rope_parameters"):
        alone = {key: value for key, value in written.items() if key in (*rest, "rope_theta", spelling)}
        (folder / "config.json").write_text(json.dumps(alone))
        assert model_folder.read_config(folder) == config


def test_the_sources_files_are_carried_over_as_they_were(copy, tmp_path):
    source = copy("qwen2_untied_sharded")
    for name in model_folder.CARRIED:
        (source / name).write_bytes(b"\xff bytes of " + name.encode())
    (source / "modeling.py").write_text("raise SystemExit")
    config = model_folder.read_config(source)
    model_folder.save(tmp_path / "export", random_params(config), config, source, card="# Größe\n")
    written = {path.name for path in (tmp_path / "export").iterdir()}
    assert written == {*model_folder.CARRIED, "config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "export" / "README.md").read_text(encoding="utf-8") == "# Größe\n"
    for name in model_folder.CARRIED:
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes()
    assert len({path.stat().st_mode for path in (tmp_path / "export").iterdir()}) == 1


def test_nothing_is_overwritten_and_nothing_left_half_made(tmp_path, monkeypatch):
    source = GOLDEN / "qwen2_tied"
    config = model_folder.read_config(source)
    params = random_params(config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    fails(
        "export to a new or an empty folder",
        model_folder.save,
        tmp_path / "full",
        params,
        config,
        source,
    )
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]

    def full_disk(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "sync", full_disk)
        with pytest.raises(OSError, match="No space"):
            model_folder.save(tmp_path / "export", params, config, source)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / ".export.partial").mkdir()  # as a killed run leaves it
    (tmp_path / ".export.partial" / "model-00001-of-00002.safetensors").write_text("half")
    (tmp_path / "export").mkdir()
    model_folder.save(tmp_path / "export", params, config, source)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "export"}
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"config.json", "model.safetensors"}


def test_params_that_do_not_fit_are_not_written(tmp_path):
    source = GOLDEN / "qwen2_tied"
    config = model_folder.read_config(source)
    params = random_params(config)
    save = functools.partial(model_folder.save, tmp_path / "export")
    fails(
        "dtype of the export is 'int8'; give one of float32, bfloat16",
        save,
        params,
        config,
        source,
        dtype="int8",
    )
    other = model_folder.read_config(GOLDEN / "qwen2_untied_sharded")
    fails("config.json is not this model's", save, params, config, GOLDEN / "qwen2_untied_sharded")
    fails(
        "do not fit the model's config: embed_tokens.embedding",
        save,
        params,
        other,
        GOLDEN / "qwen2_untied_sharded",
    )
    assert not list(tmp_path.iterdir())


# Damaged folders


def test_config_errors_name_the_file_or_folder(copy, tmp_path):
    fails(
        f"{tmp_path / 'nowhere'} is not a folder; give a Hugging",
        model_folder.read_config,
        tmp_path / "nowhere",
    )
    (tmp_path / "empty").mkdir()
    fails(f"{tmp_path / 'empty' / 'config.json'} is missing", model_folder.read_config, tmp_path / "empty")
    folder = copy("qwen2_tied")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "xpo_jax_run.json").touch()
    fails(
        f"is a run directory; name the model that it exported, {tmp_path}/run/export",
        model_folder.read_config,
        tmp_path / "run",
    )
    edit_json(folder / "config.json", model_type="mistral")
    fails(f"{folder}: config.json: model_type is 'mistral'", model_folder.read_config, folder)
    for text, message in (
        (b"{", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b"[]", "holds a list"),
    ):
        (folder / "config.json").write_bytes(text)
        fails(f"{folder / 'config.json'} {message}", model_folder.read_config, folder)


def test_all_tensors_that_do_not_fit_are_in_one_error(copy):
    folder = copy("qwen2_tied")
    config, held = model_folder.read_config(folder), tensors(folder)
    del held[K_PROJ], held["model.norm.weight"]
    held["model.layers.2.mlp.up_proj.weight"] = held["model.layers.1.mlp.up_proj.weight"]
    held[EMBEDDING] = held[EMBEDDING][:-1]
    held["model.layers.0.mlp.down_proj.weight"] = held["model.layers.0.mlp.down_proj.weight"].T.copy()
    held["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.int8)
    save_file(held, folder / "model.safetensors")
    text = fails(f"{folder}: the weights do not fit config.json", model_folder.load_params, folder, config)
    assert f"2 missing: {K_PROJ}, model.norm.weight;" in text
    assert "1 unexpected: model.layers.2.mlp.up_proj.weight;" in text
    assert (
        f"2 mis-shaped: {EMBEDDING} is (129, 32), not (130, 32), model.layers.0.mlp.down_proj.weight" in text
    )
    assert "1 of an unknown dtype: model.layers.0.self_attn.q_proj.bias is I8" in text


def test_a_long_list_of_tensors_is_cut(copy):
    folder = copy("qwen2_tied")
    config, held = model_folder.read_config(folder), tensors(folder)
    save_file(
        {name.removeprefix("model."): array for name, array in held.items()}, folder / "model.safetensors"
    )
    text = fails("26 missing: model.embed_tokens.weight, ", model_folder.load_params, folder, config)
    assert "and 20 more; 26 unexpected: embed_tokens.weight" in text and len(text) < 900


def test_damaged_weight_files_have_distinct_errors(copy):
    folder = copy("qwen2_untied_sharded")
    config, index = model_folder.read_config(folder), folder / "model.safetensors.index.json"
    load = functools.partial(model_folder.load_params, folder, config)
    names = json.loads(index.read_text())["weight_map"]
    second = folder / "model-00002-of-00003.safetensors"

    whole = load_file(second)
    save_file({**whole, EMBEDDING: tensors(folder)[EMBEDDING]}, second)
    text = fails(f"1 duplicate: {EMBEDDING} in model-0000", load)
    assert "missing" not in text
    second.write_bytes(second.read_bytes()[:-3])
    fails(f"{second} is damaged", load)
    second.unlink()
    fails(f"{folder} lacks {second.name}, which model.safetensors.index.json names", load)
    for outside in ("../model.safetensors", "/model.safetensors", "a/../../model.safetensors"):
        edit_json(index, weight_map={**names, EMBEDDING: outside})
        fails(f"names files outside its folder: {outside}", load)
    edit_json(index, weight_map={})
    fails(f"{index} has no weight_map", load)
    index.unlink()
    fails("has neither model.safetensors nor model.safetensors.index.json", load)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    fails("has only pickled weights (pytorch_model.bin), which may run code and are never opened", load)


def test_a_tied_models_stray_head_must_be_the_embedding(copy):
    folder = copy("qwen2_tied_one_kv_bf16")
    config, held = model_folder.read_config(folder), tensors(folder)
    want = model_folder.load_params(folder, config)
    save_file({**held, HEAD: held[EMBEDDING].copy()}, folder / "model.safetensors")
    assert_same_bits(model_folder.load_params(folder, config), want)
    held[HEAD] = held[EMBEDDING].copy()
    held[HEAD][-1, -1] += 1
    save_file(held, folder / "model.safetensors")
    fails("lm_head.weight differs from model.embed_tokens.weight", model_folder.load_params, folder, config)
    save_file({**held, HEAD: held[EMBEDDING][:-1].copy()}, folder / "model.safetensors")
    fails("lm_head.weight differs from model.embed_tokens.weight", model_folder.load_params, folder, config)


# Tokenizers


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """Write a byte-level tokenizer in Qwen's format without merges: 256 bytes and three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copyfile(GOLDEN / "qwen2_tied" / "config.json", folder / "config.json")
    edit_json(folder / "config.json", vocab_size=259)
    return folder


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    return shutil.copytree(tokenizer_folder, tmp_path / "model")


def test_tokenizer_is_read_from_the_folder(folder):
    tokenizer = model_folder.load_tokenizer(folder, model_folder.read_config(folder))
    text = "Größe <|im_end|>"
    assert len(tokenizer) == 259
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == 258 and len(ids) == len("Größe ".encode()) + 1
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    edit_json(folder / "config.json", vocab_size=258)
    fails(
        "the tokenizer has 259 tokens, the model only 258 rows",
        model_folder.load_tokenizer,
        folder,
        model_folder.read_config(folder),
    )
    (folder / "tokenizer.json").write_text("{")
    fails(
        "transformers cannot read the tokenizer",
        model_folder.load_tokenizer,
        folder,
        model_folder.read_config(folder),
    )
    (folder / "tokenizer.json").unlink()
    fails(
        f"{folder} has no tokenizer.json",
        model_folder.load_tokenizer,
        folder,
        model_folder.read_config(folder),
    )


def test_code_in_a_folder_is_never_run(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    mapped = {"AutoTokenizer": ["evil.Evil", None]}
    edit_json(folder / "tokenizer_config.json", auto_map=mapped, tokenizer_class="Evil")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", **mapped})
    try:
        model_folder.load_tokenizer(folder, model_folder.read_config(folder))
    except ValueError as error:
        assert "\n" not in str(error)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(copy, dtype, bad):
    """One element of one tensor is enough; the largest finite number is accepted."""
    folder = copy(MODELS[0])
    path = folder / "model.safetensors"
    cast = {name: array.astype(np.dtype(dtype)) for name, array in tensors(folder).items()}
    name = K_PROJ
    cast[name][0, 0] = ml_dtypes.finfo(np.dtype(dtype)).max
    save_file(cast, path)
    config = model_folder.read_config(folder)
    model_folder.load_params(folder, config)
    cast[name][3, 2] = bad
    save_file(cast, path)
    fails(
        f"model.safetensors: tensor {name} holds a number that is not finite",
        model_folder.load_params,
        folder,
        config,
    )


# Where torch is installed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_our_export(name, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = model_folder.read_config(GOLDEN / name)
    params = jax.tree.map(lambda p: 0.3 * p, random_params(config))
    model_folder.save(tmp_path / "export", params, config, GOLDEN / name, dtype=dtype, max_shard_bytes=60_000)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values()), report
    as_stated = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert as_stated.dtype == getattr(torch, dtype)  # so config.json states what was written
    hf_model = as_stated.to(torch.float32).eval()
    ids = np.random.default_rng(1).integers(config.vocab_size, size=(2, 11))
    with torch.no_grad():
        want = hf_model(input_ids=torch.tensor(ids)).logits.numpy()

    params = model_folder.load_params(tmp_path / "export", config)
    model = nnx.merge(
        nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), stacked=True)))[0], params
    )
    ours = model.unembed(model.prefill(jnp.asarray(ids, jnp.int32))[0])
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-4)
