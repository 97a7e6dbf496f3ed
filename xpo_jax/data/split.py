"""Where the held-out prompts come from: a source, or a part that is split off from the training prompts.

A part is chosen by a seeded hash of each prompt's tokens, so that a prompt that occurs twice is never on both sides,
and rows that are added later move few others.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_NUMBER = re.compile(r"\d+|\d*\.\d+")


class HeldOut(NamedTuple):
    """The part of the training prompts that is held out.

    size: a fraction below 1, or a number of prompts. seed: of the choice.
    """

    size: float
    seed: int

    def choose(self, tokens: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Return the indices of the prompts that stay and of those that are held out, both in order.

        A prompt that occurs more than once is held out once, and its other occurrences are on neither side.

        Args:
          tokens: of each prompt, or a hash of them.

        Raises:
          ValueError: too few different prompts.
        """
        first: dict[bytes, int] = {}
        for index, key in enumerate(tokens):
            first.setdefault(key, index)
        count = self.size if self.size >= 1 else max(1, round(self.size * len(first)))
        if count >= len(first):
            raise ValueError(
                f"held_out: {self.size:g} of {len(first)} different prompts would leave none to train on; lower it, or"
                " name a source"
            )
        salt = str(self.seed).encode()
        ranked = sorted(first, key=lambda key: hashlib.blake2b(key, digest_size=16, salt=salt).digest())
        chosen = set(ranked[: int(count)])
        return [i for i, key in enumerate(tokens) if key not in chosen], sorted(first[key] for key in chosen)


def check_held_out(train: Any, held_out: Any) -> Any:
    """Return the source of the held-out prompts, or the `HeldOut` that describes which are split off from train.

    Args:
      train, held_out: as a config names them; from the command line a number is text.

    Raises:
      ValueError: a size or seed out of range, or train is the user's and held_out was left as the package has it.
    """
    if isinstance(held_out, str) and _NUMBER.fullmatch(held_out) and not os.path.exists(held_out):
        held_out = float(held_out) if "." in held_out else int(held_out)
    if isinstance(held_out, Mapping) and "size" in held_out:
        unknown = set(held_out) - {"size", "seed"}
        if unknown:
            names = ", ".join(sorted(map(str, held_out)))
            raise ValueError(f"held_out: a part of train has size and seed, got {names}")
        return _held_out(held_out["size"], held_out.get("seed", 0))
    if isinstance(held_out, int | float):
        return _held_out(held_out, 0)
    if isinstance(held_out, str) and held_out.startswith("embedded:") and not _is_embedded(train):
        raise ValueError(
            f"held_out: is {held_out}, German sentences of the package, but the prompts are yours; name a source, or"
            f" 0.1 to split off a tenth of train, or write ['{held_out}'] in a config if you mean it"
        )
    return held_out


def _held_out(size: Any, seed: Any) -> HeldOut:
    number = isinstance(size, int | float) and not isinstance(size, bool)
    if not number or not (0 < size < 1 or (size >= 1 and isinstance(size, int))):
        raise ValueError(
            f"held_out: must be a source, a fraction below 1 or a number of prompts, got {size!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"held_out: the seed must be from 0 to {2**32 - 1}, got {seed!r}")
    return HeldOut(size, seed)


def _is_embedded(source: Any) -> bool:
    """Whether any part of a source is the package's."""
    if isinstance(source, str):
        return source.startswith("embedded:")
    parts = source.get("sources", ()) if isinstance(source, Mapping) else source
    return any(_is_embedded(part) for part in parts)
