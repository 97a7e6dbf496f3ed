"""Read and write Hugging Face folders: config, tokenizer, and (through `weights.py`) the parameters.

transformers and vLLM load an export: safetensors, with the source's tokenizer files copied unchanged, and its
config.json in both spellings that readers use.

Left out on purpose: downloading (`hub.py`), and code that comes with a model (never run).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xpo_jax.io.files import sync
from xpo_jax.io.text import error_line, shorten
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf.end_tokens import end_token_ids, pad_token_id
from xpo_jax.models.hf.tensors import LICENCES, model_folder, read_model_json
from xpo_jax.models.hf.weights import check_params, load_head, load_params, load_weights, write_params
from xpo_jax.models.registry import param_shapes, read_model_config
from xpo_jax.models.rope import rope_parameters
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none
from xpo_jax.values import Params

__all__ = [
    "check_params",
    "end_token_ids",
    "load_head",
    "load_params",
    "load_tokenizer",
    "load_weights",
    "model_folder",
    "pad_token_id",
    "param_shapes",
    "read_config",
    "save",
]

GENERATION = "generation_config.json"
# What an export takes from its source unchanged.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    *LICENCES,
)


def read_config(folder: str | Path) -> ModelConfig:
    """Read the model's shapes from config.json.

    Raises:
      ValueError: no such folder or file, not JSON, or a model that xpo_jax does not compute.
    """
    folder = model_folder(folder)
    if (folder / "xpo_jax_run.json").is_file():
        raise ValueError(f"{folder} is a run directory; name the model that it exported, {folder / 'export'}")
    values = read_model_json(folder / "config.json")
    try:
        return read_model_config(values)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def save(
    folder: str | Path,
    params: Params,
    model_config: ModelConfig,
    source: str | Path,
    *,
    generation: Mapping[str, Any] | None = None,
    card: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    replace: bool = False,
) -> None:
    """Write a Hugging Face folder that transformers (4 and 5) and vLLM load.

    The folder is written under another name, flushed and renamed, so that it is complete or absent. All processes call
    this, because each holds a shard of the weights; process 0 writes.

    Args:
      folder: must not exist or must be empty, unless `replace` is true.
      params: as `load_params` returns them. They come to the host one (stacked) array at a time.
      source: the folder that the model came from; its tokenizer files and licence are copied unchanged,
        and so is config.json, but see `_write_config`.
      generation: fields of generation_config.json that replace the source's; None copies the source's unchanged.
      card: README.md, see model_card.py; None for none.
      dtype: of the tensors written, "float32" or "bfloat16".
      max_shard_bytes: larger weights are written to several files with an index.

    Raises:
      ValueError: the folder is not empty, parameters do not fit model_config, or the source has another config.
    """
    folder, source, leads = Path(folder), model_folder(source), distributed.is_lead_process()
    partial = folder.with_name(f".{folder.name}.partial")
    with all_or_none("starting the export"):
        if leads:
            _make_room(folder, partial, source, model_config, replace)
    try:
        with all_or_none("writing the export"):
            write_params(partial, params, model_config, dtype=dtype, max_shard_bytes=max_shard_bytes)
            if leads:
                _complete(partial, source, model_config, dtype, generation, card)
                _put_in_place(partial, folder)
    except BaseException:
        if leads:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`, replacing it; at any instant `folder` is the old one, the new one, or absent."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _make_room(folder: Path, partial: Path, source: Path, model_config: ModelConfig, replace: bool) -> None:
    if folder.exists() and not replace and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists; export to a new or an empty folder")
    if read_config(source) != model_config:
        raise ValueError(
            f"{source / 'config.json'} is not this model's; export with the folder that the model came from"
        )
    if partial.exists():  # of a run that was killed while writing
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _complete(
    partial: Path,
    source: Path,
    model_config: ModelConfig,
    dtype: str,
    generation: Mapping[str, Any] | None,
    card: str | None,
) -> None:
    """Write the files of an export other than its weights, and flush all."""
    _write_config(partial / "config.json", source / "config.json", model_config, dtype)
    _write_generation_config(partial / GENERATION, source / GENERATION, generation)
    if card is not None:
        (partial / "README.md").write_text(card, encoding="utf-8")
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    for path in partial.iterdir():
        sync(path)
    sync(partial)


def load_tokenizer(folder: str | Path, model_config: ModelConfig) -> Any:
    """Read a transformers tokenizer from local files only; code in the folder is never run.

    Returns:
      A PreTrainedTokenizerBase of at most model_config.vocab_size tokens.

    Raises:
      ValueError: no tokenizer files, files that transformers cannot read, more tokens than the model has rows.
    """
    from transformers import AutoTokenizer  # takes a second or two

    folder = model_folder(folder)
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; copy the tokenizer files of the model there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = shorten(error_line(error), 200)
        raise ValueError(
            f"{folder}: transformers cannot read the tokenizer ({reason}); restore its files"
        ) from error
    if len(tokenizer) > model_config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {model_config.vocab_size} rows"
            " (vocab_size in config.json); use the tokenizer that came with the model"
        )
    return tokenizer


def _write_config(target: Path, source: Path, model_config: ModelConfig, dtype: str) -> None:
    """Copy config.json, and add only the fields that one of its two spellings lacks.

    transformers 4 and vLLM read rope_theta, rope_scaling and torch_dtype where transformers 5 reads rope_parameters and
    dtype; a reader that does not find the rotary base silently uses 10000. The dtype is the one that was written.
    """
    config = read_model_json(source)
    added: dict[str, Any] = {}
    if config.get("rope_theta") is None:
        added["rope_theta"] = model_config.rope_theta
    rope, new = rope_parameters(config), config.get("rope_parameters") or {}
    if new.get("rope_theta") is None or new.get("rope_type", "default") != rope["rope_type"]:
        added["rope_parameters"] = {**rope, "rope_theta": model_config.rope_theta}
    if not config.get("rope_scaling") and rope["rope_type"] != "default":
        added["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    spellings = ("torch_dtype", "dtype")
    if any(config.get(key) is not None for key in spellings):
        added |= {key: dtype for key in spellings if config.get(key) != dtype}
    if not added:
        shutil.copyfile(source, target)
        return
    text = json.dumps({**config, **added}, indent=2, ensure_ascii=False)
    target.write_text(text + "\n", encoding="utf-8")


def _write_generation_config(target: Path, source: Path, fields: Mapping[str, Any] | None) -> None:
    """Write the source's generation_config.json with these fields; nothing if there is neither."""
    if fields is None:
        if source.is_file():
            shutil.copyfile(source, target)
        return
    config = read_model_json(source) if source.is_file() else {}
    target.write_text(json.dumps({**config, **fields}, indent=2) + "\n", encoding="utf-8")
