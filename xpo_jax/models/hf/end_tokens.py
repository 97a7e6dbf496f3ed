"""The tokens that end a response.

The files of a model do not always say which they are: a base model with a chat template names <|endoftext|>, but its
template ends the assistant's turn with <|im_end|>. So the turn of a rendered conversation counts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xpo_jax.models.hf.tensors import model_folder, read_model_json

SHOWN = 8  # end tokens in the opening summary

_QUESTION, _ANSWER = "Question 4711?", "Answer 4711."


def end_token_ids(folder: str | Path, tokenizer: Any, names: Sequence[str] | None = None) -> tuple[int, ...]:
    """Return the tokens that end a response, the one that ends a conversation's turn first.

    They are the token with which the chat template ends the assistant's turn, eos_token_id in generation_config.json
    (in config.json if there is none, as in transformers), a number or a list, and the tokenizer's own end token.
    Qwen2.5 has two: <|im_end|> and <|endoftext|>.

    Args:
      folder, tokenizer: of the model.
      names: these tokens instead, as `sampling.end_tokens` gives them.

    Raises:
      ValueError: there is none, or it is not a token of this tokenizer.
    """
    if names is not None:
        return _ids(names, tokenizer)
    path, config = _generation_config(folder)
    stated = config.get("eos_token_id")
    stated = [i for i in (stated if isinstance(stated, list) else [stated]) if i is not None]
    wrong = [i for i in stated if type(i) is not int or not 0 <= i < len(tokenizer)]
    if wrong:
        raise ValueError(
            f"{path}: eos_token_id {wrong[0]!r} is not one of the tokenizer's {len(tokenizer)} tokens"
        )
    ids = [turn_end_id(tokenizer), *stated, tokenizer.eos_token_id]
    ends = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not ends:
        raise ValueError(
            f"{path}: no eos_token_id, and the tokenizer has no eos token; name one in either, or in"
            " sampling.end_tokens"
        )
    return ends


def turn_end_id(tokenizer: Any) -> int | None:
    """Return the special token with which the chat template ends an assistant's turn; None if there is none."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program; one that rejects this conversation ends turns in its own way
        return None
    _, answer, rest = rendered.rpartition(_ANSWER)
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if answer else []
    return ids[0] if ids and ids[0] in _special_ids(tokenizer) else None


def describe_end_tokens(folder: str | Path, tokenizer: Any, names: Sequence[str] | None = None) -> str:
    """Return the tokens that end a response for the opening summary, and which of them no file of the model names."""
    ids = end_token_ids(folder, tokenizer, names)
    text = ", ".join(tokenizer.convert_ids_to_tokens(list(ids[:SHOWN])))
    text += f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    if names is not None:
        return f"{text} (sampling.end_tokens)"
    stated = _generation_config(folder)[1].get("eos_token_id")
    in_files = {*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id}
    if ids[0] in in_files:
        return text
    return f"{text}; the first is the chat template's, which the model's files do not name"


def pad_token_id(folder: str | Path, tokenizer: Any) -> int:
    """Return the padding token: the tokenizer's, or generation_config.json's, or the first end token.

    Padding is never read, so any token is suitable.
    """
    stated = tokenizer.pad_token_id
    stated = _generation_config(folder)[1].get("pad_token_id") if stated is None else stated
    return end_token_ids(folder, tokenizer)[0] if stated is None else int(stated)


def _generation_config(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    path = model_folder(folder) / "generation_config.json"
    path = path if path.is_file() else path.with_name("config.json")
    return path, read_model_json(path)


def _special_ids(tokenizer: Any) -> set[int]:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def _ids(names: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    if not names:
        raise ValueError("sampling.end_tokens: is empty; name at least one token, or set it to None")
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name not in vocabulary:
            raise ValueError(
                f"sampling.end_tokens: {name!r} is not a token of this tokenizer; write one as its vocabulary does,"
                f" such as {tokenizer.eos_token or next(iter(vocabulary))!r}"
            )
    return tuple(dict.fromkeys(vocabulary[name] for name in names))
