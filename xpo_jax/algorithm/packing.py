"""Pairs -> rows of slots, packed on the host so that few slots are empty and few shapes are compiled.

A pair takes one run of slots in a row: its prompt, once, then its first response, then its second. A row holds as
many pairs as fit. A micro-batch is a fixed number of rows of one of few sequence lengths, and a batch is as many
micro-batches as it needs: the work grows with the number of tokens, not with the longest response.

Left out on purpose: the optimal packing. Filling each row with the largest pair that still fits, and taking the
sequence length that this fills best, leaves under 8 % of the slots empty at realistic lengths (tests/test_packing.py),
as long as a micro-batch has few rows: the last one of a batch is seldom full.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from xpo_jax.values import Array

CANDIDATES = 2  # S, responses per pair
MIN_MEAN_SLOTS = 8  # per pair; bounds the number of pairs, and so of results, that a row can hold


class Packed(NamedTuple):
    """The slots of one micro-batch, as the model runs them: R rows of W slots, split evenly over G shards.

    tokens, positions: i32[R W], the token in each slot and its rotary position.
    part: i32[R W], the prompt or response of its row that a slot belongs to; -1 is empty.
    prompt: i32[R W], the part that is that one's prompt; a slot attends to earlier slots of both.
    source: i32[G U], the slots whose next token is scored, numbered through a shard's rows.
    target: i32[G U], those next tokens.
    response: i32[G U], the result, below Q, that their log-probability is added to; -1 for none.
    """

    tokens: Array
    positions: Array
    part: Array
    prompt: Array
    source: Array
    target: Array
    response: Array


class MicroBatch(NamedTuple):
    """One micro-batch, and which pairs of the batch it holds.

    slots: what the model runs.
    pairs: i32[G Q/S], the pair in B whose results are numbers S q to S q + S - 1 of the shard; -1 for none.
    """

    slots: Packed
    pairs: np.ndarray


def needed_slots(
    prompt_lengths: Int[np.ndarray, " B"], lengths: Int[np.ndarray, "S B"]
) -> Int[np.ndarray, " B"]:
    """Return the number of slots that each pair takes.

    The last token of a response is never fed to the model, and the first is predicted from the prompt's last token.
    Every scored token needs a source slot, though, which a prompt of a single token would not give to all responses.
    """
    S = len(lengths)
    return np.maximum(prompt_lengths, S) + (lengths.astype(np.int64) - 1).sum(0)


def sequence_lengths(max_prompt: int, max_response: int, candidates: int = CANDIDATES) -> tuple[int, ...]:
    """Return the compiled sequence lengths, increasing: the longest pair's slots, three quarters and half of them.

    They are multiples of 8, which accelerators prefer.
    """
    longest = int(needed_slots(np.array([max_prompt]), np.full((candidates, 1), max_response))[0])
    return tuple(sorted({math.ceil(longest * fraction / 8) * 8 for fraction in (0.5, 0.75, 1)}))


def fill(need: Int[np.ndarray, " B"], rows: int, widths: Sequence[int]) -> list[tuple[int, list[list[int]]]]:
    """Distribute pairs over the rows of micro-batches.

    Args:
      need: slots that each pair takes.
      rows: rows per micro-batch.
      widths: sequence lengths, increasing; every pair fits into the last.

    Returns:
      Per micro-batch its sequence length, and for each row the pairs in it.
    """
    order = np.argsort(need, kind="stable")
    left = [(int(need[i]), int(i)) for i in order]  # increasing, so that bisect gives the largest that fits
    micro_batches = []
    while left:
        best: tuple[float, int, list[list[int]], list[tuple[int, int]]] | None = None
        for width in widths:
            if width < left[-1][0]:
                continue  # the longest pair left must fit
            rest, taken, used = list(left), [], 0
            for _ in range(rows):
                row: list[int] = []
                room = width
                while len(row) < max(1, width // MIN_MEAN_SLOTS) and (
                    at := bisect.bisect_right(rest, (room, len(need)))
                ):
                    slots, pair = rest.pop(at - 1)
                    row.append(pair)
                    room -= slots
                taken.append(row)
                used += width - room
            fraction = used / (rows * width)
            if best is None or fraction > best[0]:
                best = fraction, width, taken, rest
        assert best is not None, "a pair longer than any row"
        micro_batches.append((best[1], best[2]))
        left = best[3]
    return micro_batches


@dataclasses.dataclass(frozen=True)
class Packer:
    """Lays out batches.

    Args:
      rows: R, rows per micro-batch.
      widths: the sequence lengths W that a row may have, see `sequence_lengths`.
      shards: G, groups of devices that a micro-batch is split over; they divide `rows`.
      candidates: S, responses per pair.
    """

    rows: int
    widths: tuple[int, ...]
    shards: int
    candidates: int = CANDIDATES

    def pairs_per_shard(self, width: int) -> int:
        """Return Q / S, the number of pairs that each shard can hold in a micro-batch of this sequence length."""
        return self.rows // self.shards * width // MIN_MEAN_SLOTS

    def shapes(self, width: int) -> Packed:
        """Return the slots of a micro-batch as ShapeDtypeStructs."""
        slots = jax.ShapeDtypeStruct((self.rows, width), np.int32)
        sources = jax.ShapeDtypeStruct((self.shards, self.rows // self.shards * width), np.int32)
        return Packed(
            tokens=slots,
            positions=slots,
            part=slots,
            prompt=slots,
            source=sources,
            target=sources,
            response=sources,
        )

    def __call__(
        self,
        prompt_tokens: Int[np.ndarray, "B P"],
        prompt_lengths: Int[np.ndarray, " B"],
        tokens: Int[np.ndarray, "S B T"],
        lengths: Int[np.ndarray, "S B"],
        valid: Bool[np.ndarray, " B"],
    ) -> list[MicroBatch]:
        """Pack the valid pairs of a batch into micro-batches; padding rows are ignored.

        Args:
          prompt_tokens, prompt_lengths: the prompts, right-padded.
          tokens, lengths: their responses, right-padded.
          valid: False marks padding rows.
        """
        chosen, rows_per_shard = np.flatnonzero(valid), self.rows // self.shards
        micro_batches = []
        for width, rows in fill(needed_slots(prompt_lengths, lengths)[chosen], self.rows, self.widths):
            slots = Packed(*(np.zeros(leaf.shape, np.int32) for leaf in self.shapes(width)))
            for index in (slots.part, slots.prompt, slots.response):
                index.fill(-1)
            pairs = np.full((self.shards, self.pairs_per_shard(width)), -1, np.int32)
            for shard in range(self.shards):
                shard_rows = [
                    [int(chosen[i]) for i in row]
                    for row in rows[shard * rows_per_shard : (shard + 1) * rows_per_shard]
                ]
                views = Packed(*(x.reshape(self.shards, -1)[shard] for x in slots))
                _lay_out(views, shard_rows, width, prompt_tokens, prompt_lengths, tokens, lengths)
                indices = [pair for row in shard_rows for pair in row]
                pairs[shard, : len(indices)] = indices
            micro_batches.append(MicroBatch(slots, pairs))
        return micro_batches


def padding(micro_batches: Sequence[MicroBatch]) -> float:
    """Return the fraction of slots that are empty."""
    slots = sum(batch.slots.part.size for batch in micro_batches)
    return sum(int((batch.slots.part < 0).sum()) for batch in micro_batches) / max(1, slots)


def _lay_out(
    into: Packed,
    rows: list[list[int]],
    width: int,
    prompt_tokens: np.ndarray,
    prompt_lengths: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Write the pairs of one shard's rows into its arrays, which are flat and empty."""
    S, result, filled = len(lengths), 0, 0
    for row, pairs in enumerate(rows):
        begin, part = row * width, 0
        for pair in pairs:
            prompt = int(prompt_lengths[pair])
            end = begin + prompt
            into.tokens[begin:end] = prompt_tokens[pair, :prompt]
            into.positions[begin:end] = np.arange(prompt)
            into.part[begin:end] = part
            last_of_prompt = end - 1
            for candidate in range(S):
                n = int(lengths[candidate, pair])
                fed = slice(end, end + n - 1)
                into.tokens[fed] = tokens[candidate, pair, : n - 1]
                into.positions[fed] = np.arange(prompt, prompt + n - 1)
                into.part[fed] = part + 1 + candidate
                scored = slice(filled, filled + n)
                into.source[scored] = np.arange(end - 1, end + n - 1)
                into.source[filled] = last_of_prompt
                into.target[scored] = tokens[candidate, pair, :n]
                into.response[scored] = result + candidate
                end, filled = end + n - 1, filled + n
            into.prompt[begin:end] = part
            begin, part, result = end, part + 1 + S, result + S
