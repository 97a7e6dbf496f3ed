"""Judges of one's own for IFEval's prompts: what an answer follows decides, or how short it is.

`follows` is what `config.judge.name` names: a factory, whose arguments are the other fields of the group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from xpo_jax.judges.scores import win_probability
from xpo_jax.values import Candidate, Comparison, Message, Verdict

from .checks import Graded, grade, score


class Follows:
    """The answer that follows more of its prompt's instructions wins; equal scores tie.

    The score of an answer is the mean over the instructions of its prompt: 1 where it follows one strictly, else
    `nearness_weight` times how nearly it does.
    """

    def __init__(self, nearness_weight: float, softness: float):
        """Take what `follows` has checked."""
        self._nearness_weight, self._softness = nearness_weight, softness
        self._rows: dict[str, Mapping[str, Any]] = {}  # by prompt, from `check`

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check that a row has instructions that can be checked.

        Raises:
          ValueError: it does not, or the package if-verifiable is missing.
        """
        if missing := {"instruction_id_list", "kwargs"} - set(row):
            raise ValueError(
                f"no column {min(missing)!r}; use IFEval's rows, as tools.ifeval.prompts has them"
            )
        _grade(row, "any answer")
        self._rows[messages[-1]["content"]] = row

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison; the scores of the verdict hold the score of both answers."""
        return [self._verdict(_grade(c.row, c.a), _grade(c.row, c.b)) for c in comparisons]

    def scores(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the score of each answer."""
        return [self._score(_grade(c.row, c.text)) for c in candidates]

    def compare_scores(self, a: float, b: float) -> float:
        """Return the probability that an answer with score `a` is better than one with score `b`."""
        return win_probability(a, b, self._softness)

    def parts(self, messages: Sequence[Message], text: str) -> dict[str, float]:
        """Return the fraction of instructions that an answer follows, whether it follows all, and its score."""
        row = self._rows.get(messages[-1]["content"])
        if row is None:
            return {}
        graded = _grade(row, text)
        followed = graded.followed
        return {
            "followed": sum(followed) / len(followed),
            "followed_all": float(all(followed)),
            "score": self._score(graded),
        }

    def _score(self, graded: Graded) -> float:
        return score(graded, self._nearness_weight)

    def _verdict(self, a: Graded, b: Graded) -> Verdict:
        scores = {"a": self._score(a), "b": self._score(b)}
        counts = f"A follows {sum(a.followed)}, B {sum(b.followed)} of {len(a.followed)}"
        return Verdict(self.compare_scores(scores["a"], scores["b"]), counts, scores)


def follows(*, nearness_weight: float, softness: float) -> Follows:
    """Build the judge.

    Args:
      nearness_weight: what an instruction counts for that is missed by nothing, from 0 (only what is followed
        strictly counts) to below 1.
      softness: p = sigmoid(difference of the scores / softness); 0 gives hard verdicts.

    Raises:
      ValueError: a value out of range; the field comes first.
    """
    if not 0 <= nearness_weight < 1:
        raise ValueError(f"nearness_weight is {nearness_weight}, must be from 0 to below 1")
    if not 0 <= softness < math.inf:
        raise ValueError(f"softness is {softness}, must be 0 (hard verdicts) or more")
    return Follows(nearness_weight, softness)


def _grade(row: Mapping[str, Any], answer: str) -> Graded:
    return grade(row["instruction_id_list"], row["kwargs"], answer)


def briefer(comparisons: Sequence[Comparison]) -> list[str]:
    """Prefer the answer of fewer words, of those with at least three."""
    words = [[len(text.split()) for text in (c.a, c.b)] for c in comparisons]
    lengths = [[n if n >= 3 else math.inf for n in pair] for pair in words]
    return ["tie" if a == b else "A" if a < b else "B" for a, b in lengths]
