"""Prompts and fine-tuning pairs from the grammar, with meanings held out for evaluation.

A hash of the meaning decides whether it is held out (`meaning.is_held_out`), so there is no list to maintain and no
pair can leak. Writes no files and applies no template; the builder of the embedded model does both.
"""

from __future__ import annotations

import random

from xpo_jax.embedded.german.grammar import realise
from xpo_jax.embedded.german.meaning import Meaning, is_held_out, random_meaning

Row = dict[str, str]


def sft_pair(rng: random.Random) -> tuple[str, str]:
    """Draw (source, target): two different sentences of one meaning that is not held out."""
    meaning = random_meaning(rng)
    while is_held_out(meaning):
        meaning = random_meaning(rng)
    source = realise(meaning, rng)
    target = realise(meaning, rng)
    while target == source:
        target = realise(meaning, rng)
    return source, target


def prompts(rng_seed: int, train: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """Draw `train` and `held_out` rows {"input": sentence}; no meaning occurs twice in either or in both.

    Args:
        rng_seed: the same seed gives the same rows.
        train: number of rows whose meanings `sft_pair` may draw.
        held_out: number of rows whose meanings it never draws.
    """
    rng = random.Random(rng_seed)
    rows: dict[bool, list[Row]] = {False: [], True: []}
    wanted = {False: train, True: held_out}
    seen: set[Meaning] = set()
    while any(len(rows[side]) < wanted[side] for side in rows):
        meaning = random_meaning(rng)
        side = is_held_out(meaning)
        if meaning in seen or len(rows[side]) == wanted[side]:
            continue
        seen.add(meaning)
        rows[side].append({"input": realise(meaning, rng)})
    return rows[False], rows[True]
