"""The embedded model's tokenizer and shape: a byte-level BPE in the form of Qwen2's, trained on the grammar."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xpo_jax.embedded.german import corpus
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.qwen2 import Qwen2Config

VOCABULARY = 2048
TAGS = ("<pphr_input>", "</pphr_input>", "<pphr_output>", "</pphr_output>")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's pre-tokenizer: transformers builds it for every qwen2 folder and ignores the one in tokenizer.json.
QWEN_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPE = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=512,
)


def build_tokenizer(folder: Path, seed: int) -> None:
    """Train a byte-level BPE on the grammar's sentences and write it, with config.json, as a Qwen2 folder."""
    tokenizer = train_bpe(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "".join(" ".join(m) + "\n" if isinstance(m, list) else m + "\n" for m in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    write_configs(folder, {t: tokenizer.token_to_id(t) for t in (*CONTROL, *TAGS)})


def train_bpe(seed: int) -> Any:
    """Train a `tokenizers.Tokenizer` on 60,000 sentences of the grammar, drawn with `seed`."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    rng = random.Random(seed)
    sentences = (sentence for _ in range(30_000) for sentence in corpus.sft_pair(rng))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # the roles often enough that each becomes one token
    tokenizer.train_from_iterator([*sentences, *["system\n", "user\n", "assistant\n"] * 1000], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    return tokenizer


def write_configs(folder: Path, ids: Mapping[str, int]) -> None:
    """Write tokenizer_config.json, config.json and generation_config.json; `ids` are those of CONTROL and TAGS."""

    def write(name: str, value: Mapping[str, Any]) -> None:
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")

    write(
        "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(i): {
                    "content": t,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": t in CONTROL,
                }
                for t, i in ids.items()
            },
            "bos_token": None,
            "chat_template": CHATML,
            "eos_token": "<|im_end|>",
            "model_max_length": SHAPE.max_position_embeddings,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    fields = {field.name: getattr(SHAPE, field.name) for field in dataclasses.fields(ModelConfig)}
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    write(
        "config.json",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            **fields,
            "torch_dtype": "float32",
            "bos_token_id": None,
            "eos_token_id": ends[0],
            "use_sliding_window": False,
        },
    )
    write("generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[1]})
