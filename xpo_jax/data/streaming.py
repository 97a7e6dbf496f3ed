"""The prompts of a source that is too large to be held: each is made when it is asked for.

A row that its steps leave out (a bad one under on_bad_row = "skip", a long one, ...) is replaced by the next row of the
source that can be used, so that batches stay full and a batch remains a function of rows, seed and step. That row
then occurs twice in the epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from xpo_jax.data.rows import DataError, Prompt, Rows
from xpo_jax.data.transforms import REASONS, Steps

_LOOKED_AT = 1_000  # rows looked at before the run: most mistakes are in all rows
_MOST_REPLACED = 1_000  # rows passed over in a row, before the source is refused


class PassingPrompts(Sequence[Prompt]):
    """Prompts by their place, made anew each time.

    lengths: i32[prompts], tokens, where all rows have been looked at; else None.
    dropped: how many of the first rows each step left out.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        steps: Steps,
        places: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
    ):
        """Makes the first prompts, to see that the settings fit the rows.

        Args:
          name: of the source, for errors.
          rows, steps: from these a prompt is made.
          places: i64[prompts], the rows that are prompts, where all have been looked at.
          lengths: of these, tokens.

        Raises:
          DataError: as `Steps`.
        """
        self._name, self._rows, self._steps, self._places, self.lengths = name, rows, steps, places, lengths
        counts: Counter[str] = Counter()
        shortest, longest = 2**31, 0
        for index in range(min(_LOOKED_AT, len(rows)) if places is None else 0):
            prompt = steps(rows, index)
            if isinstance(prompt, str):
                counts[prompt] += 1
            else:
                shortest, longest = min(shortest, len(prompt.tokens)), max(longest, len(prompt.tokens))
        self._range = (shortest, longest)
        if places is None and not longest:
            self[0]  # none of the first can be used: perhaps a later one
        self.dropped: Mapping[str, int] = {name: counts[name] for name in REASONS if counts[name]}

    def __len__(self) -> int:
        """How many, those included that will be replaced."""
        return len(self._rows if self._places is None else self._places)

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        """The prompt at a place from 0."""
        return self.made(index)[0]

    def made(self, index: int) -> tuple[Prompt, int]:
        """The prompt at a place from 0, and how many rows were passed over for it.

        Raises:
          DataError: a bad row where that is an error, or too many in a row that cannot be used.
        """
        if self._places is not None:
            prompt = self._steps(self._rows, int(self._places[index]))
            assert not isinstance(prompt, str)  # it was a prompt before, and a source that changes raises
            return prompt, 0
        for passed in range(_MOST_REPLACED):
            prompt = self._steps(self._rows, (index + passed) % len(self._rows))
            if not isinstance(prompt, str):
                return prompt, passed
        raise DataError(
            f"{self._name}: {_MOST_REPLACED} rows on end from place {index + 1} cannot be used, the last"
            f" because of {prompt}; loosen that field, or take these rows out"
        )

    def first(self, count: int) -> list[Prompt]:
        """The first so many prompts, in memory, no row twice; all where there are fewer."""
        found: list[Prompt] = []
        for index in range(len(self)):
            if len(found) == count:
                break
            prompt = self._steps(self._rows, index if self._places is None else int(self._places[index]))
            if not isinstance(prompt, str):
                found.append(prompt)
        return found

    def described(self) -> str:
        """For the start-up summary."""
        if self.lengths is not None:
            return f"{len(self)} prompts of {self.lengths.min()} to {self.lengths.max()} tokens, read as they pass"
        return (
            f"prompts of {self._range[0]} to {self._range[1]} tokens in the first {_LOOKED_AT} rows, the others checked"
            " as they pass (overlap with the held-out prompts is not counted)"
        )
