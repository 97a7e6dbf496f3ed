"""Pairs -> rows of slots, packed on the host so that few slots are empty and few shapes are compiled.

A pair takes one run of slots in a row: its prompt, once, then its first response, then its second. A row holds as
many pairs as fit. A micro-batch is a fixed number of rows of one of few widths, and a batch as many micro-batches as
it needs: what is computed grows with the tokens that there are, not with the longest response.

Left out on purpose: the best packing there is. Filling each row with the largest pair that still fits, and taking the
width that this fills best, leaves under 8 % of the slots empty at realistic lengths (tests/test_packing.py), as long as
a micro-batch has few rows: the last one of a batch is seldom full.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from xpo_jax.values import Array

LEAST = 8  # slots that a pair has in the mean, at least: there are places for so many results


class Packed(NamedTuple):
    """One micro-batch, as the model runs it. R rows of W slots, which N devices share evenly; results have Q places.

    tokens, positions: i32[R W], what stands in each slot and its rotary position.
    part: i32[R W], which prompt or response of its row a slot belongs to; -1 is empty.
    prompt: i32[R W], the part that is the prompt of that; a slot looks at both, as far as they stand before it.
    source: i32[N U], the slots whose next tokens count, numbered through a device's rows.
    target: i32[N U], those tokens. response: i32[N U], where to add their log-probabilities, below Q; -1 nowhere.
    """

    tokens: Array
    positions: Array
    part: Array
    prompt: Array
    source: Array
    target: Array
    response: Array


def needed(prompt_lengths: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """i64[B], the slots that each pair takes.

    A response's last token is read by none, and the first is told by the prompt; but there must be a place for every
    token's source, which a prompt of one token alone does not give.
    """
    S = len(lengths)
    return np.maximum(prompt_lengths, S) + (lengths.astype(np.int64) - 1).sum(0)


def widths(most_prompt: int, most_response: int, candidates: int = 2) -> tuple[int, ...]:
    """The widths of rows that are compiled, ascending: what the longest pair needs, three quarters and half of it.

    In multiples of 8, which accelerators want.
    """
    longest = int(needed(np.array([most_prompt]), np.full((candidates, 1), most_response))[0])
    return tuple(sorted({math.ceil(longest * share / 8) * 8 for share in (0.5, 0.75, 1)}))


def fill(need: np.ndarray, rows: int, widths: Sequence[int]) -> list[tuple[int, list[list[int]]]]:
    """Which pairs go into which rows of which micro-batch.

    Args:
      need: i[B], slots that each pair takes. rows: of a micro-batch. widths: ascending, the last holds every pair.

    Returns:
      Per micro-batch its width, and for each row the pairs in it.
    """
    order = np.argsort(need, kind="stable")
    left = [(int(need[i]), int(i)) for i in order]  # ascending, so that bisect finds the largest that fits
    found = []
    while left:
        best: tuple[float, int, list[list[int]], list[tuple[int, int]]] | None = None
        for width in widths:
            if width < left[-1][0]:
                continue  # the longest must go somewhere, and now
            rest, taken, used = list(left), [], 0
            for _ in range(rows):
                row: list[int] = []
                room = width
                while len(row) < max(1, width // LEAST) and (
                    at := bisect.bisect_right(rest, (room, len(need)))
                ):
                    slots, pair = rest.pop(at - 1)
                    row.append(pair)
                    room -= slots
                taken.append(row)
                used += width - room
            share = used / (rows * width)
            if best is None or share > best[0]:
                best = share, width, taken, rest
        assert best is not None, "a pair that no row holds"
        found.append((best[1], best[2]))
        left = best[3]
    return found


@dataclasses.dataclass(frozen=True)
class Packer:
    """Lays out batches.

    Args:
      rows: of a micro-batch. widths: that a row may have, see `widths`.
      shares: groups of devices that a micro-batch is split over; they divide rows.
      candidates: S, responses of a pair.
    """

    rows: int
    widths: tuple[int, ...]
    shares: int
    candidates: int = 2
    _last: list[Any] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    def pairs(self, width: int) -> int:
        """Q / S, how many pairs each share has places for in a micro-batch of this width."""
        return self.rows // self.shares * width // LEAST

    def shapes(self, width: int) -> Packed:
        """A micro-batch, as ShapeDtypeStructs."""
        i32 = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
        slots, sources = i32(self.rows, width), i32(self.shares, self.rows // self.shares * width)
        return Packed(*[slots] * 4, *[sources] * 3)

    def __call__(
        self,
        prompt_tokens: np.ndarray,
        prompt_lengths: np.ndarray,
        tokens: np.ndarray,
        lengths: np.ndarray,
        keep: np.ndarray,
    ) -> list[tuple[Packed, np.ndarray]]:
        """The micro-batches of a batch.

        Args:
          prompt_tokens: i32[B P], right-padded. prompt_lengths: i32[B].
          tokens: i32[S B T], right-padded. lengths: i32[S B].
          keep: bool[B], the pairs to lay out.

        Returns:
          Per micro-batch its slots, and i32[N Q/S], the pair in B whose results stand in places S q to S q + S - 1;
          -1 where there is none. The same list for the same arrays as in the last call: the update takes what the
          reference scored.
        """
        given, chosen = (prompt_tokens, prompt_lengths, tokens, lengths), np.flatnonzero(keep)
        if self._last:
            before, of, found = self._last
            if all(x is y for x, y in zip(given, before, strict=True)) and np.array_equal(chosen, of):
                return found  # type: ignore[no-any-return]
        found = []
        for width, held in fill(needed(prompt_lengths, lengths)[chosen], self.rows, self.widths):
            packed = Packed(*(np.full(leaf.shape, 0, np.int32) for leaf in self.shapes(width)))
            for name in ("part", "prompt", "response"):
                getattr(packed, name).fill(-1)
            pairs = np.full((self.shares, self.pairs(width)), -1, np.int32)
            by_share = self.rows // self.shares
            for share in range(self.shares):
                mine = [
                    [int(chosen[i]) for i in row] for row in held[share * by_share : (share + 1) * by_share]
                ]
                of_share = Packed(*(x.reshape(self.shares, -1)[share] for x in packed))
                _lay_out(of_share, mine, width, prompt_tokens, prompt_lengths, tokens, lengths)
                indices = [pair for row in mine for pair in row]
                pairs[share, : len(indices)] = indices
            found.append((packed, pairs))
        self._last[:] = given, chosen, found
        return found


def padding(micro_batches: Sequence[tuple[Packed, np.ndarray]]) -> float:
    """The share of the slots that is empty."""
    slots = sum(packed.part.size for packed, _ in micro_batches)
    return sum(int((packed.part < 0).sum()) for packed, _ in micro_batches) / max(1, slots)


def _lay_out(
    into: Packed,
    rows: list[list[int]],
    width: int,
    prompt_tokens: np.ndarray,
    prompt_lengths: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Write the pairs of one share's rows into its arrays, flat and empty."""
    S, place, filled = len(lengths), 0, 0
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
                told = slice(filled, filled + n)
                into.source[told] = np.arange(end - 1, end + n - 1)
                into.source[filled] = last_of_prompt
                into.target[told] = tokens[candidate, pair, :n]
                into.response[told] = place + candidate
                end, filled = end + n - 1, filled + n
            into.prompt[begin:end] = part
            begin, part, place = end, part + 1 + S, place + S
