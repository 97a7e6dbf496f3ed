"""The paraphrase judge: far from the input in letters, alike in length, and right.

score = gate * weighted mean of
    distance  exp(-8 (d - 0.6)^2), d = 1 - normalised Indel similarity of the letters
    start     exp(-6 (d - 0.5)^2), the same d on the first 20 letters of each
    length    exp(-2 |r - 1|), r = (words in + 3) / (words out + 3)

The weights are divided by their sum. A copy (the input letter for letter) is valid, but scores one
hundredth of that: below every other valid answer, above every refused one. Distance alone is gamed at
once, since unrelated German stands at d = 0.59; the gate is what makes the score mean something.

Leaves out style, fluency and everything else that a rule cannot see.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xpo_jax.judges.contract import JudgeError
from xpo_jax.judges.paraphrase_gates import WORD, Gate, embedded, general, letters, similarity
from xpo_jax.values import Comparison, Message, Verdict

START_LETTERS = 20
COPY_FACTOR = 0.01
Parts = dict[str, float | str]


class ParaphraseJudge:
    """Compares two answers by their scores; the higher wins, equal ones tie."""

    def __init__(
        self, gate: Gate, weights: Mapping[str, float], softness: float, input_tag: str, output_tag: str
    ):
        """Take the parts that `paraphrase` has checked; weights are named distance, start and length."""
        self._gate = gate
        self._softness = softness
        self._weights = dict(weights)
        self._input_tag = input_tag
        # The last whole pair: instructions before it may name the tag.
        self._input = re.compile(rf"<{input_tag}>((?:(?!<{input_tag}>).)*?)</{input_tag}>", re.DOTALL)
        tag = f"</?{output_tag}>"
        self._output = re.compile(rf"\s*<{output_tag}>((?:(?!{tag}).)*)</{output_tag}>\s*", re.DOTALL)

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison; `scores` holds the parts of both answers under "a" and "b"."""
        return [self._compare(comparison) for comparison in comparisons]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Refuse a prompt that this judge cannot judge; a run asks for each before it begins.

        Raises:
            ValueError: the conversation has no input between tags.
        """
        self._source(messages)

    def parts(self, messages: Sequence[Message], text: str) -> Parts:
        """What the score of one answer is made of.

        Args:
            messages: the conversation; the last user turn holds the input between its tags.
            text: the answer, with its tags.

        Returns:
            score, distance, start, length in [0, 1]; valid, copy 0 or 1; reason, "" for a valid answer.

        Raises:
            ValueError: the conversation has no input between tags.
        """
        source = self._source(messages)
        found = self._output.fullmatch(text)
        if found is None:
            return _refused("output tags missing or broken")
        return self.score(source, found.group(1).strip())

    def score(self, source: str, answer: str) -> Parts:
        """The same for a bare input and a bare answer, without tags."""
        if not answer:
            return _refused("empty")
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

    def _compare(self, comparison: Comparison) -> Verdict:
        a = self.parts(comparison.messages, comparison.a)
        b = self.parts(comparison.messages, comparison.b)
        first, second = float(a["score"]), float(b["score"])
        if first == second:
            p = 0.5
        elif self._softness == 0:
            p = float(first > second)
        else:
            p = 0.5 + 0.5 * math.tanh((first - second) / self._softness / 2)  # the sigmoid, without overflow
        scores: dict[str, Any] = {"a": a, "b": b}
        return Verdict(p, f"A {_said(a)}; B {_said(b)}", scores)

    def _source(self, messages: Sequence[Message]) -> str:
        tag = self._input_tag
        user = next((message["content"] for message in reversed(messages) if message["role"] == "user"), None)
        found = self._input.findall(user) if user is not None else []
        if not found or not found[-1].strip():
            what = (
                "no user turn"
                if user is None
                else f"no text between <{tag}> and </{tag}> in its last user turn"
            )
            raise JudgeError(
                f"the paraphrase judge found {what}; put the text to paraphrase there with data.template,"
                f" for example '<{tag}>{{input}}</{tag}>'"
            )
        return str(found[-1]).strip()


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
        gate: "embedded" (the German grammar of the embedded world) or "general" (any other text).
        distance_weight, start_weight, length_weight: not negative, not all zero; divided by their sum.
        softness: the verdict is sigmoid(difference of the scores / softness), so that a narrow win teaches
            less than a clear one; 0 gives hard verdicts.
        input_tag, output_tag: names of the tags around the input and the answer, without brackets.
        min_kept, min_similarity, max_similarity, min_length_ratio, max_length_ratio: limits of the general
            gate, see `gates.general`; checked, but of no effect on the embedded one.

    Raises:
        ValueError: an unknown gate, weights or limits out of range, or a tag that is not a plain name.
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
            f"the judge's weights are {weights}; they must be finite, not negative and not all zero"
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


def _refused(reason: str) -> Parts:
    return {
        "score": 0.0,
        "valid": 0.0,
        "copy": 0.0,
        "distance": 0.0,
        "start": 0.0,
        "length": 0.0,
        "reason": reason,
    }


def _said(parts: Parts) -> str:
    return str(parts["reason"]) or f"{parts['score']:.3f}" + (" (copy)" if parts["copy"] else "")
