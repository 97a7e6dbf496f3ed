"""How often the pairs of a run tie: by what is followed strictly, and by the verdicts that the run learned from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xpo_jax.data.pairs_log import read_pairs

from .checks import grade


class Ties(NamedTuple):
    """Counts of the pairs whose prompt has an instruction."""

    pairs: int
    strict: int
    judged: int


def count_ties(path: str | Path) -> dict[str, Ties]:
    """Return the counts by instruction, and over all pairs under "all pairs".

    Args:
      path: the pairs.jsonl of a run of the config ifeval.

    Raises:
      ValueError: a file that is no such log.
    """
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for pair in read_pairs(path):
        row = pair["row"]
        if "instruction_id_list" not in row:
            raise ValueError(f"{path}: its prompts have no instructions; name a log of the config ifeval")
        strict, judged = _followed_equally(row, pair["responses"]), pair["p_first"] == 0.5
        for name in ("all pairs", *sorted(set(row["instruction_id_list"]))):
            for i, number in enumerate((1, strict, judged)):
                counts[name][i] += number
    return {name: Ties(*counts[name]) for name in sorted(counts, key=lambda name: -counts[name][0])}


def _followed_equally(row: Mapping[str, Any], responses: Sequence[Mapping[str, Any]]) -> bool:
    a, b = (
        grade(row["instruction_id_list"], row["kwargs"], response["text"]).followed for response in responses
    )
    return sum(a) == sum(b)


def table(ties: Mapping[str, Ties]) -> str:
    """Return the counts as lines of text."""
    lines = [f"{'':42} pairs   ties: strict   as judged"]
    for name, (pairs, strict, judged) in ties.items():
        lines.append(f"{name:42} {pairs:5}   {strict / pairs:12.0%}   {judged / pairs:9.0%}")
    return "\n".join(lines)
