"""What training may have cost: prompts that have nothing to do with IFEval, answered before and after.

unrelated.jsonl holds 60 short questions and tasks of this project's own, each with words of which a right answer has at
least one. An answer's helpfulness is judged by rules: it has such a word, it does not loop, and it ends. Longer answers
have more words, so the win rate stands beside that at equal lengths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.evaluation import statistics
from xpo_jax.evaluation.statistics import Rate

FILE = Path(__file__).with_name("unrelated.jsonl")
LOOP = 0.7  # an answer loops if fewer of its triples of words are distinct


class Helpful(NamedTuple):
    """What answers are, bool[n] each: right (they have an expected word), without loops, finished."""

    right: np.ndarray
    varied: np.ndarray
    finished: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """Return i[n], how many of the three an answer is."""
        return np.sum([*self], axis=0)


def rows() -> list[dict[str, Any]]:
    """Return the prompts: "prompt" and "expected" words."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def judge(prompts: Sequence[dict[str, Any]], texts: Sequence[str], finished: np.ndarray) -> Helpful:
    """Judge answers by the rules; an expected word counts where a word begins with it, in any case."""
    right = [
        any(re.search(rf"(?<!\w){re.escape(word)}", text, re.IGNORECASE) for word in row["expected"])
        for row, text in zip(prompts, texts, strict=True)
    ]
    # an answer of fewer than three words has no triples, and does not loop
    varied = [not statistics.distinct([text], 3) < LOOP for text in texts]
    return Helpful(np.array(right), np.array(varied), np.asarray(finished, bool))


def compare(
    before: tuple[Helpful, Sequence[str]], after: Sequence[tuple[Helpful, Sequence[str]]]
) -> tuple[Rate, Rate]:
    """Return the win rate over the answers before, by scores, ties a half; and that at equal lengths.

    Args:
      before: what the start's answers are, and their texts. after: the same of each trained model; a prompt's answers
        by all of them are one observation.
    """
    scores, lengths = (
        np.stack([get(model) - get(before) for model in after], axis=1)
        for get in (lambda model: model[0].score, lambda model: np.array([len(text) for text in model[1]]))
    )
    wins = list(0.5 + 0.5 * np.sign(scores))
    return statistics.win_rate(wins), statistics.length_controlled(wins, list(lengths.astype(float)))
