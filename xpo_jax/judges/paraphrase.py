"""The paraphrase judge: rewards an answer that differs from its input in letters, has a similar length, and is valid.

score = gate * weighted mean of
    distance  exp(-8 (d - 0.6)^2), d = 1 - normalized Indel similarity of the letters
    start     exp(-6 (d - 0.5)^2), the same d over the first 20 letters of each
    length    exp(-2 |r - 1|), r = (words of the input + 3) / (words of the answer + 3)

The weights are normalized. A copy (the same letters as the input) is valid, but scores one hundredth of that: below
every other valid answer, above every rejected one. Distance alone would be gamed at once, since unrelated German
sentences have d = 0.59; the gate makes the score meaningful.

Left out on purpose: style, fluency and everything else that rules cannot measure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.paraphrase_gates import WORD, Gate, embedded, general, letters, similarity
from xpo_jax.judges.scores import win_probability
from xpo_jax.values import Candidate, Comparison, Message, Verdict

START_LETTERS = 20  # that "start" compares
COPY_FACTOR = 0.01
Parts = dict[str, float | str]


class ParaphraseJudge:
    """Compares two answers by their scores; the higher one wins, equal ones tie."""

    def __init__(
        self, gate: Gate, weights: Mapping[str, float], softness: float, input_tag: str, output_tag: str
    ):
        """Take what `paraphrase` has checked; the weights are named distance, start and length."""
        self._gate = gate
        self._softness = softness
        self._weights = dict(weights)
        self._input_tag = input_tag
        # the last complete pair of tags, since instructions before it may mention them
        self._input = re.compile(rf"<{input_tag}>((?:(?!<{input_tag}>).)*?)</{input_tag}>", re.DOTALL)
        tag = f"</?{output_tag}>"
        self._output = re.compile(rf"\s*<{output_tag}>((?:(?!{tag}).)*)</{output_tag}>\s*", re.DOTALL)

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison; the verdict's scores hold the parts of both answers under "a" and "b"."""
        return [self._compare(comparison) for comparison in comparisons]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check that the prompt has an input between tags.

        Raises:
            ValueError: it has none.
        """
        self._source(messages)

    def parts(self, messages: Sequence[Message], text: str) -> Parts:
        """Return the parts of one answer's score.

        Args:
            messages: the conversation; the last user turn holds the input between its tags.
            text: the answer, with its tags.

        Returns:
            "score", "distance", "start" and "length" in [0, 1]; "valid" and "copy", 0 or 1; "reason", why the answer
            is not valid, or "".

        Raises:
            ValueError: the conversation has no input between tags.
        """
        source = self._source(messages)
        match = self._output.fullmatch(text)
        if match is None:
            return _rejected("output tags missing or broken")
        return self.score(source, match.group(1).strip())

    def score(self, source: str, answer: str) -> Parts:
        """Return the parts for an input and an answer without tags; see `parts`."""
        if not answer:
            return _rejected("empty")
        reason = self._gate(source, answer)
        source_letters, answer_letters = letters(source), letters(answer)
        copy = source_letters == answer_letters
        measured = {
            "distance": _peak(source_letters, answer_letters, 8, 0.6),
            "start": _peak(source_letters[:START_LETTERS], answer_letters[:START_LETTERS], 6, 0.5),
            "length": _length(source, answer),
        }
        weighted = sum(self._weights[name] * value for name, value in measured.items())
        score = 0.0 if reason else weighted * (COPY_FACTOR if copy else 1.0)
        return {"score": score, "valid": float(not reason), "copy": float(copy), **measured, "reason": reason}

    def scores(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the score of each answer."""
        return [float(self.parts(c.messages, c.text)["score"]) for c in candidates]

    def compare_scores(self, a: float, b: float) -> float:
        """Return the probability that an answer with score `a` is better than one with score `b`."""
        return win_probability(a, b, self._softness)

    def _compare(self, comparison: Comparison) -> Verdict:
        a = self.parts(comparison.messages, comparison.a)
        b = self.parts(comparison.messages, comparison.b)
        p = self.compare_scores(float(a["score"]), float(b["score"]))
        return Verdict(p, f"A {_summary(a)}; B {_summary(b)}", {"a": a, "b": b})

    def _source(self, messages: Sequence[Message]) -> str:
        tag = self._input_tag
        user = next((message["content"] for message in reversed(messages) if message["role"] == "user"), None)
        inputs = self._input.findall(user) if user is not None else []
        if not inputs or not inputs[-1].strip():
            problem = (
                "the prompt has no user turn"
                if user is None
                else f"the last user turn has no text between <{tag}> and </{tag}>"
            )
            raise JudgeError(
                f"paraphrase judge: {problem}; put the text to paraphrase there with data.template,"
                f" for example '<{tag}>{{input}}</{tag}>'"
            )
        return str(inputs[-1]).strip()


def paraphrase(
    *,
    gate: str,
    distance_weight: float,
    start_weight: float,
    length_weight: float,
    softness: float,
    input_tag: str,
    output_tag: str,
    min_kept: float,
    min_similarity: float,
    max_similarity: float,
    min_length_ratio: float,
    max_length_ratio: float,
) -> ParaphraseJudge:
    """Build the judge.

    Args:
        gate: "embedded" (sentences of the embedded German grammar) or "general" (any other text).
        distance_weight, start_weight, length_weight: nonnegative, not all zero; normalized.
        softness: p is sigmoid(difference of the scores / softness), so that a narrow win teaches less than a clear
            one; 0 gives hard verdicts.
        input_tag, output_tag: names of the tags around the input and the answer, without brackets.
        min_kept, min_similarity, max_similarity, min_length_ratio, max_length_ratio: limits of the general gate, see
            `paraphrase_gates.general`; always checked, but without effect on the embedded gate.

    Raises:
        ValueError: an unknown gate, a weight or limit out of range, or a tag that is not a plain name.
    """
    gates: dict[str, Gate] = {
        "embedded": embedded,
        "general": general(
            min_kept=min_kept,
            min_similarity=min_similarity,
            max_similarity=max_similarity,
            min_length_ratio=min_length_ratio,
            max_length_ratio=max_length_ratio,
        ),
    }
    if gate not in gates:
        raise ValueError(f"judge.gate is {gate!r}; choose one of {', '.join(map(repr, gates))}")
    if not (math.isfinite(softness) and softness >= 0):
        raise ValueError(f"judge.softness is {softness}; it must be 0 (hard verdicts) or more")
    weights = {"distance": distance_weight, "start": start_weight, "length": length_weight}
    total = sum(weights.values())
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()) or total <= 0:
        raise ValueError(
            f"the judge's weights are {weights}; they must be finite, nonnegative and not all zero"
        )
    for name, tag in (("input_tag", input_tag), ("output_tag", output_tag)):
        if not re.fullmatch(r"[A-Za-z][\w-]*", tag):
            raise ValueError(
                f"judge.{name} is {tag!r}; write a plain name without brackets, for example 'pphr_input'"
            )
    return ParaphraseJudge(
        gates[gate],
        {name: weight / total for name, weight in weights.items()},
        softness,
        input_tag,
        output_tag,
    )


def _peak(a: str, b: str, sharpness: float, best: float) -> float:
    return math.exp(-sharpness * (1 - similarity(a, b) - best) ** 2)


def _length(source: str, answer: str) -> float:
    ratio = (len(WORD.findall(source)) + 3) / (len(WORD.findall(answer)) + 3)
    return math.exp(-2 * abs(ratio - 1))


def _rejected(reason: str) -> Parts:
    return {
        "score": 0.0,
        "valid": 0.0,
        "copy": 0.0,
        "distance": 0.0,
        "start": 0.0,
        "length": 0.0,
        "reason": reason,
    }


def _summary(parts: Parts) -> str:
    return str(parts["reason"]) or f"{parts['score']:.3f}" + (" (copy)" if parts["copy"] else "")
