"""Stand-ins for what tests must not load or cannot know: files of rows, a byte tokenizer, models small
enough to know the answer, judges of every kind, and a whole run that takes seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from xpo_jax.config import loader
from xpo_jax.data.pairs_log import pair_records
from xpo_jax.data.prompts import load_prompts
from xpo_jax.data.rows import DataError
from xpo_jax.models.hf import weights
from xpo_jax.models.qwen2 import Qwen2, Qwen2Config, unstack
from xpo_jax.models.registry import param_shapes
from xpo_jax.values import Answer, Comparison, Prompts, Samples, Verdict, Verdicts

# ---- text ---------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# AutoTokenizer builds Qwen2Tokenizer with this pattern, whatever tokenizer.json holds
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder: Path, chat_template: str | None = CHATML) -> Path:
    """Writes a Qwen2 tokenizer without merges, one token per byte (256) and the special tokens.

    Returns:
      The folder, which `AutoTokenizer.from_pretrained` loads.
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


def write_rows(path: Path, rows: list[Any]) -> str:
    """Writes rows as jsonl; returns the path as a config holds it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- prompts and pairs --------------------------------------------------------------------------


def load_data(tokenizer, max_new_tokens=64, check=None, **fields):
    """Load prompts as a config's `data` group does; of t.jsonl and good.jsonl where the fields name no other source."""
    group = {
        "train": "t.jsonl",
        "held_out": "good.jsonl",
        "select": None,
        "rename": None,
        "template": None,
        "column": "text",
        "filter_tokens": None,
        "filter_length": False,
        "max_prompt_tokens": 64,
        "buckets": (16, 32, 64),
        "on_long": "error",
        "on_bad_row": "error",
        "deduplicate": False,
        "take": None,
        "shuffle": True,
    }
    given = {"tokenizer": tokenizer, "max_new_tokens": max_new_tokens, "check": check}
    return loader.build(load_prompts, {**group, **fields}, "data", **given)


def load_error(tokenizer, kind=DataError, **fields) -> str:
    """Return the one line of the error that `load_data` raises."""
    try:
        load_data(tokenizer, **fields)
    except kind as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("load_data accepted the fields")


def follows(text: str, outline: str) -> bool:
    """Whether an error follows an outline such as "t.jsonl, row 2 ... column 13 ... one object per line".

    The first part (file, row or field) must begin the text; the others (values, remedy) must occur in this order.
    """
    first, *parts = map(re.escape, outline.split(" ... "))
    return re.match(".*".join([first, *parts]), text) is not None


def valid_ids(batch: Prompts) -> list[int]:
    """Return the ids of a batch's valid rows."""
    return [row["id"] for row, valid in zip(batch.rows, batch.valid, strict=True) if valid]


def same_batch(a: Prompts, b: Prompts) -> bool:
    """Whether two batches hold the same rows, messages and arrays."""
    return a.rows == b.rows and a.messages == b.messages and all(map(np.array_equal, a[2:], b[2:]))


PAIR_MESSAGES = [{"role": "user", "content": "Sag „ja“!"}]


def logged_pairs() -> list[dict[str, Any]]:
    """Return the log records of three rows: a verdict, a failure, and a padding row, which has none."""
    prompts = Prompts(
        rows=({"id": 1, "score": np.float32(0.1)}, {"id": 2}, {}),
        messages=(PAIR_MESSAGES, PAIR_MESSAGES, []),
        tokens=np.zeros((3, 2), np.int32),
        lengths=np.array([2, 1, 1], np.int32),
        position=np.array([4, 5, 6], np.int32),
        valid=np.array([True, True, False]),
    )
    first = Samples(
        np.array([[5, 9, 0], [6, 7, 8], [1, 1, 1]], np.int32),
        np.array([2, 3, 1]),
        np.array([True, False, True]),
    )
    second = Samples(
        np.array([[4, 0, 0], [9, 0, 0], [1, 1, 1]], np.int32),
        np.array([1, 1, 1]),
        np.array([True, True, True]),
    )
    verdicts = Verdicts(
        p_first=np.array([0.7, 0.5, 0.5], np.float32),
        weight=np.array([1, 0, 0], np.float32),
        reasons=("kürzer", "timed out", ""),
        scores=({"policy": 0.7, "reference": float("nan")}, {}, {}),
        shown=((1, 0), None, None),
        flipped=np.full(3, np.nan, np.float32),
        queries=2,
        orders=1,
    )
    texts = (["ja", "ja ja", ""], ["Ja.\nJa!", "\ud83d", ""])
    ref_logps = np.array([[-1.1, -2, 0], [-0.3, -4, 0]], np.float32)
    return pair_records(3, prompts, (first, second), texts, verdicts, verdicts.shown, ref_logps)


# ---- models: the sampler and the update see them as any other model --------------------------------


class Markov(nnx.Module):
    """The logits of the next token are a row of a table, chosen by the last token: everything is known."""

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
    """(stacked graphdef, its params, unstacked graphdef, its params), with logits that are far from flat."""
    stacked, params = split(Qwen2(config, rngs=nnx.Rngs(seed), stacked=True))
    params = jax.tree.map(lambda p: p * scale, params)
    return stacked, params, graphdef(config, stacked=False), unstack(params)


def graphdef(config: Qwen2Config, *, stacked: bool) -> Any:
    """What `nnx.merge` wants beside the parameters; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0), stacked=stacked)))[0]


SPEAKING = dataclasses.replace(TINY, vocab_size=264)  # five rows more than the byte tokenizer has tokens
ENDS = (256, 258, *range(64))  # a quarter of all tokens: responses of random weights end, too


def random_params(seed: int, config: Qwen2Config, scale: float = 0.5) -> Any:
    """Parameters of Qwen2(stacked=True) as NumPy arrays, normally distributed around 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(np.float32), param_shapes(config)
    )


def write_model(folder: Path, seed: int = 0, config: Qwen2Config = SPEAKING) -> Path:
    """Writes a complete Hugging Face folder of a Qwen2 model with random weights and the byte tokenizer."""
    write_tokenizer(folder)
    about = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**about, **dataclasses.asdict(config)}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ENDS)}))
    params = random_params(seed, config)
    weights.write_params(folder, params, config, dtype="float32", max_shard_bytes=2**40)
    return folder


# ---- judges: factories, as a config names them ("fakes:Longer") -----------------------------------


class LongerText:
    """The longer text wins, equal lengths tie; `parts` tells the length and calls a long text valid."""

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        return [Verdict(0.5 + 0.5 * np.sign(len(c.a) - len(c.b)), "length", _lengths(c)) for c in comparisons]

    def parts(self, messages: Any, text: str) -> dict[str, Any]:
        return {"letters": float(len(text)), "valid": float(len(text) > 3), "reason": "text is left out"}


def _lengths(comparison: Comparison) -> dict[str, int]:
    return {"a": len(comparison.a), "b": len(comparison.b)}


class Recording(LongerText):
    """Remembers what every instance was shown, in `Recording.calls`, one list of comparisons per call."""

    calls: ClassVar[list[list[Comparison]]] = []

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        Recording.calls.append(list(comparisons))
        return super().__call__(comparisons)


class Slow(LongerText):
    """Takes its time."""

    def __init__(self, *, seconds: float):
        self._seconds = seconds

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        time.sleep(self._seconds)
        return super().__call__(comparisons)


class Always:
    """Gives one and the same answer to everything: "A", "tie", None, prose, an integer, ..."""

    def __init__(self, *, answer: Any):
        self._answer = answer

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Any]:
        return [self._answer] * len(comparisons)


def tied() -> Always:
    """Sees no difference, ever."""
    return Always(answer="tie")


def prose() -> Always:
    """Answers as a chat model does that was not told how."""
    return Always(answer="Answer A is better because it is more polite.")


def silent() -> Always:
    """Has no verdict, ever."""
    return Always(answer=None)


def lost() -> Always:
    """Computes NaN."""
    return Always(answer=float("nan"))


class Patchy(Recording):
    """As Recording, but without a verdict where `Patchy.fails` says so: None for a, NaN for b."""

    @staticmethod
    def fails(a: str, b: str) -> bool:
        return (len(a) + len(b)) % 3 == 0

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        return [
            (None if len(c.a) > len(c.b) else float("nan")) if self.fails(c.a, c.b) else answer
            for c, answer in zip(comparisons, super().__call__(comparisons), strict=True)
        ]


class Miscounting:
    """Answers one comparison too few."""

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        return ["A"] * (len(comparisons) - 1)


class Broken:
    """Raises, from call number `at` (from 0) on; before that everything ties."""

    def __init__(self, *, at: int):
        self._left = at

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        self._left -= 1
        if self._left < 0:
            raise KeyError("the\nserver is gone")
        return ["tie"] * len(comparisons)


class BrokenOn(LongerText):
    """Raises on one process of several, at its call number `at` (from 0); prints the time at which it does."""

    def __init__(self, *, process: int, at: int):
        self._left = at if jax.process_index() == process else None

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                print(f"raised at {time.time()}", file=sys.stderr, flush=True)
                raise KeyError("the\nserver is gone")
        return super().__call__(comparisons)


class Turning(LongerText):
    """Keeps the contract until call number `at` (from 0), and breaks it there with an integer."""

    def __init__(self, *, at: int):
        self._left = at

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Any]:
        self._left -= 1
        return [1] * len(comparisons) if self._left < 0 else super().__call__(comparisons)


# ---- time ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def hasty_compilation() -> Iterator[None]:
    """XLA optimises little in here: programs that run a few times take half the time to compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """The same, and each program is compiled once, whoever asks for it again; `folder` keeps them."""
    names = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with hasty_compilation():
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


# ---- a whole run ----------------------------------------------------------------------------------

TRAIN_ROWS, HELD_OUT_ROWS = 21, 11  # the last batch of eight is a part batch in both


def write_prompts(folder: Path) -> None:
    """train.jsonl and held_out.jsonl; two training prompts and a held-out one need the second bucket."""
    texts = [
        f"{i:02d}" + "x" * (19 if i in (4, 13, 25) else i * 5 % 11) for i in range(TRAIN_ROWS + HELD_OUT_ROWS)
    ]
    rows = [{"text": text, "number": i} for i, text in enumerate(texts)]
    write_rows(folder / "train.jsonl", rows[:TRAIN_ROWS])
    write_rows(folder / "held_out.jsonl", rows[TRAIN_ROWS:])


ADAMW = {
    "name": "adamw",
    "learning_rate": 1e-2,
    "schedule": "constant",
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "mu_dtype": "float32",
    "weight_decay": 0.0,
    "clip_norm": 1.0,
}  # the arguments of make_optimizer but for the steps


def tiny_config(folder: Path) -> ConfigDict:
    """A complete config for a run of seconds, with model and prompts in `folder`, which it writes.

    Its run_dir is `folder / "run"`.
    """
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_prompts(folder)
    return ConfigDict(
        {
            "run_dir": str(folder / "run"),
            "seed": 3,
            "steps": 4,
            "batch_size": 8,
            "max_skipped": 2,
            "max_step_seconds": 300.0,
            "data": {
                "train": str(folder / "train.jsonl"),
                "held_out": str(folder / "held_out.jsonl"),
                "select": None,
                "rename": None,
                "template": ({"role": "user", "content": "{text}"},),
                "column": None,
                "filter_tokens": None,
                "filter_length": False,
                "max_prompt_tokens": 40,
                "buckets": (32, 40),
                "on_long": "error",
                "on_bad_row": "error",
                "deduplicate": False,
                "take": None,
                "shuffle": True,
            },
            "offline": None,
            "model": {
                "path": str(folder / "model"),
                "reference": None,
                "reference_every_steps": None,
                "dtype": "float32",
                "attention": "einsum",
            },
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
            "distributed": {
                "mode": "auto",
                "coordinator": None,
                "num_processes": None,
                "process_id": None,
                "timeout_seconds": 60,
            },
            "sampling": {
                "max_new_tokens": 8,
                "temperature": 0.9,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            },
            "judge": {"name": "fakes:LongerText"},
            "judging": {
                "both_orders": False,
                "max_queries": None,
                "max_failed_fraction": 0.5,
                "max_failed_batches": 2,
            },
            "loss": {
                "second_candidate": "reference",
                "name": "sigmoid",
                "beta": 0.1,
                "alpha": 1e-3,
                "bonus_clip": 500.0,
                "entropy_weight": 0.0,
                "unfinished_loses": False,
            },
            "replay": {"updates": 1, "capacity": 1000},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-2,
                "schedule": "linear",
                "warmup_steps": 1,
                "b1": 0.9,
                "b2": 0.99,
                "eps": 1e-4,  # large: rounding must not become a whole step where a gradient is near zero
                "mu_dtype": "float32",
                "weight_decay": 0.0,
                "clip_norm": 1.0,
            },
            "layout": {
                "micro_batch_rows": 2,
                "chunk_tokens": 1024,
                "remat": False,
                "reference_steps": 1,
            },
            "evaluation": {
                "prompts": HELD_OUT_ROWS,
                "reference_samples": 2,
                "every_steps": 0,
                "answers": None,
                "stop_kl": None,
                "stop_win_rate": None,
                "stop_validity_drop": None,
            },
            "checkpoint": {"every_steps": None, "keep_last": 2, "keep_every": None, "export": "last"},
            "logging": {"table_every_steps": 1, "tensorboard": False, "wandb": False, "profile": False},
        }
    )


def run_main(argv: Sequence[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command line, in this process."""
    from xpo_jax.main import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(argv)
    return status, out.getvalue(), err.getvalue()


def write_config(path: Path, config: ConfigDict) -> str:
    """Writes a config as a Python file with get_config; returns the path as the command line takes it."""
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config(arg=None):\n    return ConfigDict({config.to_dict()!r})\n",
        encoding="utf-8",
    )
    return str(path)
