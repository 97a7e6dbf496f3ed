"""Streaming prompts: those of a source too large for memory, read and tokenised on each access.

A row that the transforms exclude (a bad one under on_bad_row = "skip", a long one, ...) is replaced by the next usable
row of the source, so batches stay full and a batch remains a function of rows, seed and step. The replacement then
occurs twice in the epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from xpo_jax.data.rows import DataError, Prompt, Rows
from xpo_jax.data.transforms import REASONS, Transforms

_CHECKED_ROWS = 1_000  # rows checked before the run: most mistakes are in every row
_MAX_SKIPPED = 1_000  # consecutive unusable rows before the source is rejected


class StreamingPrompts(Sequence[Prompt]):
    """Prompts by index, re-read from disk on each access.

    lengths: i32[prompts], tokens, if every row was read before the run; otherwise None.
    dropped: how many of the first rows each transform excluded, by config field.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        transforms: Transforms,
        indices: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
    ):
        """Make the first prompts, to check that the settings fit the rows.

        Args:
          name: of the source, for errors.
          rows, transforms: what a prompt is made from, and how.
          indices: i64[prompts], the rows that give a prompt, if every row was read before the run.
          lengths: of these prompts, tokens.

        Raises:
          DataError: as `Transforms`.
        """
        self._name, self._rows, self._transforms = name, rows, transforms
        self._indices, self.lengths = indices, lengths
        counts: Counter[str] = Counter()
        shortest, longest = 2**31, 0
        for index in range(min(_CHECKED_ROWS, len(rows)) if indices is None else 0):
            prompt = transforms(rows, index)
            if isinstance(prompt, str):
                counts[prompt] += 1
            else:
                shortest, longest = min(shortest, len(prompt.tokens)), max(longest, len(prompt.tokens))
        self._range = (shortest, longest)
        if indices is None and not longest:
            self[0]  # none of the first rows is usable: a later one may be
        self.dropped: Mapping[str, int] = {reason: counts[reason] for reason in REASONS if counts[reason]}

    def __len__(self) -> int:
        """Count the prompts, including rows that will be replaced."""
        return len(self._rows if self._indices is None else self._indices)

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        """Return the prompt at an index from 0."""
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Prompt, int]:
        """Return the prompt at an index from 0, and how many unusable rows were skipped to reach it.

        Raises:
          DataError: a bad row where that is an error, or too many consecutive unusable rows.
        """
        if self._indices is not None:
            prompt = self._transforms(self._rows, int(self._indices[index]))
            assert not isinstance(prompt, str)  # it was a prompt before, and a source that changes raises
            return prompt, 0
        for skipped in range(_MAX_SKIPPED):
            prompt = self._transforms(self._rows, (index + skipped) % len(self._rows))
            if not isinstance(prompt, str):
                return prompt, skipped
        raise DataError(
            f"{self._name}: {_MAX_SKIPPED} consecutive rows, from row {index + 1} of the source, are unusable, the last"
            f" because of {prompt}; loosen that field, or remove these rows"
        )

    def head(self, count: int) -> list[Prompt]:
        """Return the first `count` prompts, in memory, no row twice; all of them if there are fewer."""
        prompts: list[Prompt] = []
        for index in range(len(self)):
            if len(prompts) == count:
                break
            prompt = self._transforms(
                self._rows, index if self._indices is None else int(self._indices[index])
            )
            if not isinstance(prompt, str):
                prompts.append(prompt)
        return prompts

    def summary(self) -> str:
        """Describe the prompts for the start-up summary."""
        if self.lengths is not None:
            return f"{len(self)} prompts of {self.lengths.min()} to {self.lengths.max()} tokens, streamed"
        return (
            f"prompts of {self._range[0]} to {self._range[1]} tokens in the first {_CHECKED_ROWS} rows, the others"
            " checked when read (overlap with the held-out prompts is not counted)"
        )
