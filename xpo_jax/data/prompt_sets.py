"""The prompts of one source, or of its two parts, in memory or streamed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.data.rows import DataError, Prompt, Rows
from xpo_jax.data.sources import Source, open_rows, source_name
from xpo_jax.data.split import HeldOut
from xpo_jax.data.streaming import StreamingPrompts
from xpo_jax.data.transforms import REASONS, Transforms

# Larger sources are streamed. This many rows take half a minute to tokenise and some 100 MB.
MAX_ROWS_IN_MEMORY = 50_000


class PromptSet(NamedTuple):
    """The prompts of one source.

    prompts: in the order of the source; at least one. A tuple if they are in memory, otherwise StreamingPrompts.
    read: rows in the source.
    dropped: how many rows each transform excluded, by config field, without zeros. For StreamingPrompts that did
      not need every row: of the first rows only.
    note: further text for the start-up summary.
    fingerprint: hexadecimal SHA-256 over the rows kept and their messages; for StreamingPrompts that did not need
      every row, over `sources`.
    sources: what was read: files with size and SHA-256, data sets with their commits.
    """

    prompts: Sequence[Prompt]
    read: int
    dropped: Mapping[str, int]
    note: str
    fingerprint: str
    sources: Sequence[Mapping[str, Any]]

    def summary(self) -> str:
        """Describe the prompts in one line of the start-up summary."""
        reasons = ", ".join(f"{name} {count}" for name, count in self.dropped.items())
        if isinstance(self.prompts, StreamingPrompts):
            counted = self.prompts.summary()
        else:
            lengths = [len(prompt.tokens) for prompt in self.prompts]
            counted = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens"
        return f"{counted}, from {self.read} rows" + (f"; left out: {reasons}" if reasons else "") + self.note


class _Pass(NamedTuple):
    """All prompts of a source that its transforms keep, after one pass over the rows.

    indices, lengths: of each prompt, its row and its tokens.
    keys, lines: hashes of its tokens and of its content; for a source that will be split.
    prompts: the same, if they are held in memory.
    dropped: rows by the field that excludes them.
    digest: SHA-256 over the content of all.
    """

    indices: list[int]
    lengths: list[int]
    keys: list[bytes]
    lines: list[bytes]
    prompts: list[Prompt]
    dropped: Counter[str]
    digest: Any


def load_set(source: Source, transforms: Transforms, take: int | None, deduplicate: bool) -> PromptSet:
    """Return the prompts of a source; see `prompts.load_prompts` for the arguments.

    Raises:
      DataError: an unusable source or row, or no prompt is left.
    """
    rows = open_rows(source)
    in_memory = min(len(rows), take or len(rows)) <= MAX_ROWS_IN_MEMORY
    if not in_memory and take is None and not deduplicate:
        streaming = StreamingPrompts(source_name(source), rows, transforms)
        digest = hashlib.sha256(json.dumps(list(rows.identity), sort_keys=True).encode())
        return PromptSet(
            streaming,
            len(rows),
            streaming.dropped,
            _note(transforms),
            digest.hexdigest(),
            tuple(rows.identity),
        )
    read = _read(source, rows, transforms, take, deduplicate, in_memory, split=False)
    return _part(source, rows, transforms, read, None, in_memory)


def split_set(
    source: Source, transforms: Transforms, held_out: HeldOut, take: int | None, deduplicate: bool
) -> tuple[PromptSet, PromptSet]:
    """Return the training and the held-out prompts of one source; every row is read.

    `take` is applied to those that are left for training.

    Raises:
      ValueError: too few different prompts. DataError: as `load_set`.
    """
    rows = open_rows(source)
    in_memory = len(rows) <= MAX_ROWS_IN_MEMORY
    read = _read(source, rows, transforms, None, deduplicate, in_memory, split=True)
    train, other = held_out.choose(read.keys)
    read.dropped["held_out"] = len(read.keys) - len(train)
    read.dropped["take"] = max(0, len(train) - take) if take is not None else 0
    train_set = _part(source, rows, transforms, read, train[:take], in_memory)
    other_set = _part(source, rows, transforms, read._replace(dropped=Counter()), other, in_memory)
    return train_set, other_set._replace(note=f"; split off from train by seed {held_out.seed}")


def _read(
    source: Source,
    rows: Rows,
    transforms: Transforms,
    take: int | None,
    deduplicate: bool,
    in_memory: bool,
    split: bool,
) -> _Pass:
    """Make the prompts of a source, and raise DataError if none is left."""
    read = _Pass([], [], [], [], [], Counter(), hashlib.sha256())
    seen: set[bytes] = set()
    for index in range(len(rows)):
        if take is not None and len(read.indices) == take:
            read.dropped["take"] = len(rows) - index
            break
        prompt = transforms(rows, index)
        if isinstance(prompt, str):
            read.dropped[prompt] += 1
            continue
        key = hashlib.blake2b(prompt.tokens.tobytes(), digest_size=16).digest()
        if deduplicate:
            if key in seen:
                read.dropped["deduplicate"] += 1
                continue
            seen.add(key)
        content: list[Any] = [prompt.row.values, prompt.messages]
        line = json.dumps(content, sort_keys=True).encode() + b"\n"
        read.digest.update(line)
        if split:
            read.keys.append(key)
            read.lines.append(hashlib.sha256(line).digest())
        read.indices.append(index)
        read.lengths.append(len(prompt.tokens))
        if in_memory:
            read.prompts.append(prompt)
    if not read.indices:
        reasons = ", ".join(f"{name} dropped {count}" for name, count in _counts(read).items())
        first = f"; first: {transforms.first_bad}" if transforms.first_bad else ""
        raise DataError(
            f"{source_name(source)}: no prompt is left of {len(rows)} rows ({reasons}{first}); loosen these fields"
        )
    return read


def _part(
    source: Source,
    rows: Rows,
    transforms: Transforms,
    read: _Pass,
    chosen: Sequence[int] | None,
    in_memory: bool,
) -> PromptSet:
    """Return some of the prompts of a pass, by their indices in it; all of them for None."""
    digest = read.digest if chosen is None else hashlib.sha256(b"".join(read.lines[i] for i in chosen))
    chosen = range(len(read.indices)) if chosen is None else chosen
    prompts: Sequence[Prompt] = tuple(read.prompts[i] for i in chosen) if in_memory else ()
    if not in_memory:
        indices = np.array([read.indices[i] for i in chosen], np.int64)
        lengths = np.array([read.lengths[i] for i in chosen], np.int32)
        prompts = StreamingPrompts(source_name(source), rows, transforms, indices, lengths)
    return PromptSet(
        prompts, len(rows), _counts(read), _note(transforms), digest.hexdigest(), tuple(rows.identity)
    )


def _counts(read: _Pass) -> dict[str, int]:
    return {name: read.dropped[name] for name in REASONS if read.dropped[name]}


def _note(transforms: Transforms) -> str:
    left_out, first_bad = transforms.columns_left_out, transforms.first_bad
    columns = f"; columns left out by select: {', '.join(left_out)}" if left_out else ""
    changes = ", ".join(f"{name} {count}" for name, count in sorted(transforms.conversation_changes.items()))
    columns += f"; dropped from conversations: {changes}" if changes else ""
    return columns + (f"; the first bad row: {first_bad}" if first_bad else "")
