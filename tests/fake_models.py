"""Tokenizers and models small enough to write in milliseconds and to compute their outputs by other means."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from xpo_jax.models.decoder import Decoder
from xpo_jax.models.decoder_config import DecoderConfig
from xpo_jax.models.decoder_family import unstack
from xpo_jax.models.hf import weights
from xpo_jax.models.hf.adapter import adapter_shapes
from xpo_jax.models.lora import LoRA
from xpo_jax.models.qwen2 import Qwen2Config
from xpo_jax.models.registry import param_shapes

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# AutoTokenizer builds Qwen2Tokenizer with this pattern, regardless of tokenizer.json
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder: Path, chat_template: str | None = CHATML) -> Path:
    """Write a Qwen2 tokenizer without merges: one token for each of the 256 bytes, and the special tokens.

    Returns:
      The folder, for `AutoTokenizer.from_pretrained`.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


# ---- models, with the interface that sampler and update use -----------------------------------------


class Markov(nnx.Module):
    """A Markov chain: the last token selects the row of a table that holds the logits of the next."""

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))
        self.config = SimpleNamespace(vocab_size=self.table.shape[-1])

    def prefill(self, tokens):
        return self.table[...][tokens], ()

    def packed(self, tokens, positions, part, prompt):
        return self.table[...][tokens]

    def decode(self, token, t, prompt_lengths, prompt_caches, caches):
        return self.table[...][token], caches

    def empty_caches(self, B, T):
        return ()

    def unembedding(self):
        return jnp.eye(self.config.vocab_size)

    def unembed(self, hidden):
        return hidden


def split(model):
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


TINY = Qwen2Config(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=128,
)


def tiny(seed: int = 0, config: Qwen2Config = TINY, scale: float = 3.0):
    """Return (stacked graphdef, its params, unstacked graphdef, its params), with logits far from uniform."""
    stacked, params = split(Decoder(config, rngs=nnx.Rngs(seed), stacked=True))
    params = jax.tree.map(lambda p: p * scale, params)
    return stacked, params, graphdef(config, stacked=False), unstack(params)


def graphdef(config: Qwen2Config, *, stacked: bool) -> Any:
    """Return what `nnx.merge` takes beside the parameters; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), stacked=stacked)))[0]


SPEAKING = dataclasses.replace(
    TINY, vocab_size=264
)  # the byte tokenizer has 259 tokens: five rows are padding
ENDS = (256, 258, *range(64))  # a quarter of all tokens, so that responses of random weights end


def random_params(seed: int, config: DecoderConfig, scale: float = 0.5) -> Any:
    """Return parameters of Decoder(stacked=True) as NumPy arrays, normally distributed around 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(np.float32), param_shapes(config)
    )


def random_adapter(seed: int, config: DecoderConfig, lora: LoRA, scale: float = 0.5) -> Any:
    """Return an adapter as NumPy arrays with stacked layers, of which neither A nor B is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(np.float32), adapter_shapes(config, lora)
    )


def write_model(folder: Path, seed: int = 0, config: DecoderConfig = SPEAKING) -> Path:
    """Write a complete Hugging Face folder of a model with random weights and the byte tokenizer."""
    write_tokenizer(folder)
    kind = config.model_type
    about = {"model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"], "torch_dtype": "float32"}
    fields = dataclasses.asdict(config)
    if (scaling := fields.pop("rope_scaling")) is not None:
        fields["rope_scaling"] = {"rope_type": type(config.rope_scaling).__name__.lower(), **scaling}
    (folder / "config.json").write_text(json.dumps({**about, **fields}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ENDS)}))
    params = random_params(seed, config)
    weights.write_params(folder, params, config, dtype="float32", max_shard_bytes=2**40)
    return folder


# Positions, parts and prompts of packed rows, as a model's `packed` takes them: a prompt of four tokens, responses of
# three and two to it, and two empty positions, in each of four rows.
PACKED = tuple(
    np.tile(np.array(row, np.int32), (4, 1))
    for row in (
        [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1],
    )
)
