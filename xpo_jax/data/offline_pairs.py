"""Pairs that were judged before, as prompts that bring their answers along: the factory of the `offline` group.

A prompt is made again from the messages in the log, with the tokenizer and chat template of this run; the answers are
the tokens that were sampled. Of the `data` group template and column (which tell text from conversation),
max_prompt_tokens, on_long, take and shuffle apply.

Left out on purpose: rows without a verdict, which are counted; filters and deduplicate, which the prompts have been
through; pairs from elsewhere, which have no tokens of this model's.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.data.prompts import PromptSet
from xpo_jax.data.rows import DataError, Prompt, Row
from xpo_jax.data.transforms import Steps
from xpo_jax.values import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMN = "messages"  # of the rows that the prompts are made from


class Recorded(NamedTuple):
    """Of one batch of such prompts what the update wants besides them.

    tokens: i32[S B T], lengths: i32[S B]; one pad token where a row is not real.
    p_first, weight: f32[B], see values.Verdicts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    p_first: np.ndarray
    weight: np.ndarray


def log_files(pairs: str | Sequence[str]) -> list[str]:
    """The files that a path, a glob or a list of them names, sorted within a glob.

    Raises:
      ValueError: nothing is named, or no file matches.
    """
    files = []
    for name in [pairs] if isinstance(pairs, str) else pairs:
        found = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not found:
            raise ValueError(f"pairs: no file matches {name}, seen from {Path.cwd()}")
        files += found
    if not files:
        raise ValueError("pairs: name at least one pairs.jsonl")
    return files


def load_pairs(
    *,
    pairs: str | Sequence[str],
    template: Any,
    column: str | None,
    max_prompt_tokens: int,
    on_long: Literal["error", "drop"],
    take: int | None,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Collection[int],
    max_new_tokens: int,
) -> PromptSet:
    """Read judged pairs, in the order in which they were judged.

    Args:
      pairs: pairs.jsonl of a run, a glob such as "runs/a/pairs*.jsonl" for one of several processes, or a list.
      template, column, max_prompt_tokens, on_long: see `prompts.load_prompts`; on_long is of answers as well.
      take: the first so many pairs with a verdict; None for all.
      tokenizer, end_tokens: of the model that is trained.
      max_new_tokens: the longest answer, tokens.

    Returns:
      Prompts whose row holds "responses", two lists of tokens, "p_first" and "weight": what `recorded` reads.

    Raises:
      ValueError: no file, a damaged line, a prompt or an answer that does not fit, with file and row.
    """
    files, dropped = log_files(pairs), Counter[str]()
    judged: list[tuple[Row, Mapping[str, Any]]] = []
    for file in files:
        for number, record in enumerate(read_pairs(file), start=1):
            if record["weight"] > 0:
                judged.append((_prompt_row(file, number, record, template, column), record))
            else:
                dropped["no verdict"] += 1
    read = len(judged) + dropped["no verdict"]
    judged.sort(key=lambda pair: (pair[1]["step"], pair[1]["position"]))  # processes have a file each
    steps = Steps(
        tokenizer=tokenizer,
        select=None,
        rename=None,
        template=None,
        column=_COLUMN,
        filter_tokens=None,
        filter_length=None,
        max_prompt_tokens=max_prompt_tokens,
        on_long=on_long,
        on_bad_row="error",
        check=None,
    )
    rows, ends = [row for row, _ in judged], frozenset(end_tokens)
    prompts: list[Prompt] = []
    digest = hashlib.sha256()
    for index, (row, pair) in enumerate(judged):
        if take is not None and len(prompts) == take:
            dropped["take"] = len(judged) - index
            break
        prompt = steps(rows, index)  # type: ignore[arg-type]  # a list of rows is enough
        if isinstance(prompt, str):
            dropped[prompt] += 1
            continue
        responses = [_tokens(response, row, tokenizer, ends) for response in pair["responses"]]
        longest = max(map(len, responses))
        if longest > max_new_tokens and on_long == "error":
            raise DataError(
                f"{row.at}: an answer has {longest} tokens, more than sampling.max_new_tokens = {max_new_tokens};"
                " raise it, or set data.on_long = 'drop'"
            )
        if longest > max_new_tokens:
            dropped["max_new_tokens"] += 1
            continue
        values = {"responses": responses, "p_first": pair["p_first"], "weight": pair["weight"]}
        prompts.append(prompt._replace(row=row._replace(values=values)))
        digest.update(repr((pair["hash"], responses, pair["p_first"], pair["weight"])).encode())
    if not prompts:
        why = ", ".join(f"{name} {count}" for name, count in dropped.items()) or "they are empty"
        raise DataError(f"{', '.join(files)}: no pair is left of {read} ({why})")
    note = "; each with two answers and their verdict"
    sources = tuple(_identity(file) for file in files)
    return PromptSet(tuple(prompts), read, dict(dropped), note, digest.hexdigest(), sources)


def _prompt_row(file: str, number: int, record: Mapping[str, Any], template: Any, column: str | None) -> Row:
    """What the prompt is made from; a plain text was logged as one message."""
    is_text = isinstance(template if column is None else record["row"].get(column), str)
    messages = record["messages"]
    return Row(file, number, {_COLUMN: messages[0]["content"] if is_text else messages})


def _tokens(
    response: Mapping[str, Any], row: Row, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
) -> list[int]:
    """The tokens of a recorded answer, if this run's model could have drawn them."""
    tokens: list[int] = response["tokens"]
    if not tokens or not all(0 <= token < len(tokenizer) for token in tokens):
        wrong = f"has no tokens, or some beyond the tokenizer's {len(tokenizer)}"
    elif not ends.isdisjoint(tokens[:-1]) or (tokens[-1] in ends) != response["finished"]:
        wrong = "ends elsewhere than at this model's end tokens"
    elif tokenizer.decode(tokens, skip_special_tokens=True) != response["text"]:
        wrong = "has tokens that are not its text"
    else:
        return tokens
    raise DataError(f"{row.at}: an answer {wrong}; take the model that the pairs were sampled from")


def _identity(file: str) -> dict[str, Any]:
    content = Path(file).read_bytes()
    return {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def recorded(prompts: Prompts, width: int, pad_token: int) -> Recorded:
    """The answers and verdicts of a batch of prompts that `load_pairs` made.

    Args:
      width: T, at least the longest answer.
    """
    size = len(prompts.rows)
    tokens = np.full((2, size, width), pad_token, np.int32)
    lengths = np.ones((2, size), np.int32)
    p_first, weight = np.full(size, 0.5, np.float32), np.zeros(size, np.float32)
    for i in map(int, np.flatnonzero(prompts.valid)):
        row = prompts.rows[i]
        p_first[i], weight[i] = row["p_first"], row["weight"]
        for candidate, response in enumerate(row["responses"]):
            lengths[candidate, i] = len(response)
            tokens[candidate, i, : len(response)] = response
    return Recorded(tokens, lengths, p_first, weight)
