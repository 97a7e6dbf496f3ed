"""Recorded pairs, as prompts that carry their responses and verdicts: the factory of the config's `offline` group.

A prompt is made again from the logged messages, with this run's tokenizer and chat template; the responses are the
tokens that were sampled. Of the `data` group, template and column (which distinguish text from conversations),
max_prompt_tokens, on_long, take, shuffle and chat_template_arguments apply.

Left out on purpose: pairs without a verdict, which are only counted; filters and deduplicate, which the prompts have
passed already. Preference data from elsewhere have no tokens of this model; preferences.py makes them.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from xpo_jax.data import conversations, preferences, sources
from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.data.prompt_sets import PromptSet
from xpo_jax.data.rows import DataError, Prompt, Row
from xpo_jax.data.transforms import Transforms, TransformSettings
from xpo_jax.data.turns import Rules
from xpo_jax.io.user_paths import expand
from xpo_jax.values import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMN = "messages"  # of the rows that the prompts are made from


class RecordedPairs(NamedTuple):
    """What the update needs of one batch besides its prompts.

    tokens: i32[S B T], lengths: i32[S B]; one pad token in padding rows.
    p_first, weight: f32[B], see values.Verdicts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    p_first: np.ndarray
    weight: np.ndarray


def log_files(pairs: str | Sequence[str]) -> list[str]:
    """Return the files that a path, a glob or a list of them names, sorted within a glob.

    Raises:
      ValueError: nothing is named, or no file matches.
    """
    files = []
    for name in map(expand, [pairs] if isinstance(pairs, str) else pairs):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not matches:
            raise ValueError(f"pairs: no file matches {name} in {Path.cwd()}; correct the pattern")
        files += matches
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
    on_bad_row: Literal["error", "skip"],
    on_extra_keys: Literal["error", "drop"],
    on_assistant_last: Literal["error", "drop"],
    chat_template_arguments: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Collection[int],
    max_new_tokens: int,
) -> PromptSet:
    """Read judged pairs, in the order in which they were judged.

    Args:
      pairs: pairs.jsonl of a run, a glob such as "runs/a/pairs*.jsonl" for a run of several processes, preference data
        (see preferences.py), or a list.
      template, column, max_prompt_tokens, on_long: see `prompts.load_prompts`; on_long applies to responses too.
      take: use only the first `take` pairs that have a verdict; None for all.
      on_bad_row, on_extra_keys, on_assistant_last: see `prompts.load_prompts`; for preference data alone.
      tokenizer, end_tokens: of the model that is trained.
      max_new_tokens: the longest response, tokens.
      chat_template_arguments: see `prompts.load_prompts`.

    Returns:
      Prompts whose row holds "responses" (two lists of tokens), "p_first" and "weight", as `recorded_pairs` reads them.

    Raises:
      ValueError: no file, a damaged line, a prompt or a response that does not fit, with file and row.
    """
    files, dropped, changes = log_files(pairs), Counter[str](), Counter[str]()
    tokenize = preferences.ResponseTokenizer(tokenizer, tuple(end_tokens))
    record = functools.partial(
        preferences.record,
        tokenize=tokenize,
        counts=dropped,
        rules=Rules(on_extra_keys, on_assistant_last),
        on_bad_row=on_bad_row,
    )
    judged = _read_judged(files, template, column, record, dropped)
    changes["end tokens stripped"] = dropped.pop("end tokens stripped", 0)
    read = len(judged) + sum(dropped.values())
    settings = TransformSettings(
        column=_COLUMN,
        max_prompt_tokens=max_prompt_tokens,
        on_long=on_long,
        chat_template_arguments=chat_template_arguments,
    )
    transforms = Transforms(settings, tokenizer)
    rows, ends = [row for row, _ in judged], frozenset(end_tokens)
    prompts: list[Prompt] = []
    digest = hashlib.sha256()
    for index, (row, pair) in enumerate(judged):
        if take is not None and len(prompts) == take:
            dropped["take"] = len(judged) - index
            break
        prompt = transforms(rows, index)  # type: ignore[arg-type]  # a list of rows suffices
        if isinstance(prompt, str):
            dropped[prompt] += 1
            continue
        responses = [_tokens(response, row, tokenizer, ends) for response in pair["responses"]]
        if _too_long(responses, row, max_new_tokens, on_long):
            dropped["max_new_tokens"] += 1
            continue
        values = {"responses": responses, "p_first": pair["p_first"], "weight": pair["weight"]}
        prompts.append(prompt._replace(row=row._replace(values=values)))
        digest.update(repr((pair["hash"], responses, pair["p_first"], pair["weight"])).encode())
    _check_left(prompts, files, read, dropped)
    note = "; each with two responses and their verdict"
    note += "".join(f"; {name} {count}" for name, count in changes.items() if count)
    identities = tuple(entry for file in files for entry in _identity(file))
    return PromptSet(tuple(prompts), read, dict(dropped), note, digest.hexdigest(), identities)


def recorded_pairs(prompts: Prompts, max_new_tokens: int, pad_token: int) -> RecordedPairs:
    """Collect the responses and verdicts of a batch of prompts that `load_pairs` made.

    Args:
      max_new_tokens: T, at least the longest response.
    """
    size = len(prompts.rows)
    tokens = np.full((2, size, max_new_tokens), pad_token, np.int32)
    lengths = np.ones((2, size), np.int32)
    p_first, weight = np.full(size, 0.5, np.float32), np.zeros(size, np.float32)
    for i in map(int, np.flatnonzero(prompts.valid)):
        row = prompts.rows[i]
        p_first[i], weight[i] = row["p_first"], row["weight"]
        for candidate, response in enumerate(row["responses"]):
            lengths[candidate, i] = len(response)
            tokens[candidate, i, : len(response)] = response
    return RecordedPairs(tokens, lengths, p_first, weight)


def _read_judged(
    files: Sequence[str],
    template: Any,
    column: str | None,
    preference_record: Callable[[Row, int], dict[str, Any] | None],
    dropped: Counter[str],
) -> list[tuple[Row, Mapping[str, Any]]]:
    """Read the pairs that have a verdict, each with the row of its prompt; count the others in `dropped`."""
    judged: list[tuple[Row, Mapping[str, Any]]] = []
    for file in files:
        if preferences.is_preferences(file):
            for row in sources.read_rows(file):
                preference = preference_record(row, len(judged))
                if preference is not None:
                    judged.append(
                        (_prompt_row(row.file, row.number, preference, template, column), preference)
                    )
            continue
        for number, record in enumerate(read_pairs(file), start=1):
            if record["weight"] > 0:
                judged.append((_prompt_row(file, number, record, template, column), record))
            else:
                dropped["no verdict"] += 1
    judged.sort(key=lambda pair: (pair[1]["step"], pair[1]["position"]))  # each process has a file
    return judged


def _prompt_row(file: str, number: int, record: Mapping[str, Any], template: Any, column: str | None) -> Row:
    """Return the row that the prompt is made from; a plain text was logged as one message."""
    messages = record["messages"]
    row = Row(file, number, {_COLUMN: messages})
    value = template if column is None else record["row"].get(column)
    if not isinstance(conversations.unwrapped(value, row.at, "the logged prompt"), str):
        return row
    if len(messages) > 1:
        raise DataError(
            f"{row.at}: the logged prompt is a conversation, but data.{'template' if column is None else 'column'}"
            " makes plain text; set data.template to a list of messages"
        )
    return row._replace(values={_COLUMN: messages[0]["content"]})


def _tokens(
    response: Mapping[str, Any], row: Row, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
) -> list[int]:
    """Return the tokens of a recorded response, after checking that this run's model could have sampled them."""
    tokens: list[int] = response["tokens"]
    if not tokens or not all(0 <= token < len(tokenizer) for token in tokens):
        problem = f"has no tokens, or token ids beyond the tokenizer's {len(tokenizer)}"
    elif not ends.isdisjoint(tokens[:-1]) or (tokens[-1] in ends) != response["finished"]:
        problem = "does not end where this model's end tokens end it"
    elif tokenizer.decode(tokens, skip_special_tokens=True) != response["text"]:
        problem = "has token ids that do not decode to the recorded text"
    else:
        return tokens
    raise DataError(f"{row.at}: a response {problem}; set model.path to the model that sampled the pairs")


def _check_left(prompts: Sequence[Prompt], files: Sequence[str], read: int, dropped: Counter[str]) -> None:
    """Raise DataError where there is nothing to learn from."""
    if not prompts:
        reasons = ", ".join(f"{name} {count}" for name, count in dropped.items()) or "they are empty"
        raise DataError(
            f"{', '.join(files)}: no pair is left of {read} ({reasons}); name other files, or loosen these fields"
        )
    if all(prompt.row.values["p_first"] == 0.5 for prompt in prompts):
        raise DataError(
            f"{', '.join(files)}: all {len(prompts)} pairs are ties, from which nothing can be learned; name pairs of"
            " which one response is preferred"
        )


def _too_long(responses: Sequence[list[int]], row: Row, limit: int, on_long: str) -> bool:
    """Return whether a response is longer than sampling.max_new_tokens; raise DataError if that is an error."""
    longest = max(map(len, responses))
    if longest > limit and on_long == "error":
        raise DataError(
            f"{row.at}: a response has {longest} tokens, more than sampling.max_new_tokens = {limit}; raise it, or set"
            " data.on_long = 'drop'"
        )
    return longest > limit


def _identity(file: str) -> Sequence[Mapping[str, Any]]:
    if preferences.is_preferences(file):
        return sources.open_rows(file).identity
    content = Path(file).read_bytes()
    return [{"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}]
