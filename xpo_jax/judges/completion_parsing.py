"""Read the probabilities of two labels from a completion. Anything ambiguous is no answer.

A chat completion is a server's, as parsed JSON; `from_last_line` reads the text of any model that reasons first.

No field is assumed to exist or to have the right type, since a server may send anything. The openai client's response
models would not do: they are built without validation, so a field may hold a value of any type.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import string
from collections.abc import Mapping
from typing import Any

# A label that is not among the alternatives counts as 0 if it can have at most this fraction of the other's mass.
NEGLIGIBLE = 0.01
_STRIPPED = (
    string.whitespace + string.punctuation + "\u201e\u201c\u201d\u2018\u2019\u00ab\u00bb\u2026\u3002\u00a0"
)

# emphasis, headings and a full stop may surround a verdict; quotation marks and ">" may not: they mark a quotation
_VERDICT_LINE = re.compile(r"[*_#\s]*(?i:verdict)[*_\s]*:[*_\s]*(.*?)[*_.\s]*")
_LONGEST_VERDICT_LINE = 200  # characters; a longer line is prose, and the pattern takes quadratic time
TIE = "tie"  # in any case, beside the two labels

Masses = tuple[float, float]  # probabilities of the labels of the first and second answer shown; not both 0


class Unreadable(ValueError):
    """The reply contains no usable answer; the message becomes the reason."""


class NoLogprobs(Unreadable):
    """The reply contains no probabilities at all; the server may never give them."""


def strip_punctuation(text: str) -> str:
    """Return the text without the white space and punctuation around it."""
    return text.strip(_STRIPPED)


def check_labels(labels: tuple[str, str]) -> None:
    """Check the labels of a verdict in the last line.

    Raises:
      ValueError: they are equal, empty, more than a line, or "tie".
    """
    for label in labels:
        match = _VERDICT_LINE.fullmatch(f"Verdict: {label}")
        if not match or match[1] != label or not label or label.casefold() == TIE or "\n" in label:
            raise ValueError(
                f"labels: {label!r} cannot be the end of a line 'Verdict: ...'; use a letter or a digit"
            )
    if labels[0] == labels[1]:
        raise ValueError(f"labels: both are {labels[0]!r}")


def from_last_line(text: str, labels: tuple[str, str]) -> Masses:
    """Return the verdict in the last line of a complete answer: "Verdict: A", with a label or "tie" in place of A.

    Only the last line counts. What stands above it is reasoning, and may quote anything, verdicts that an answer
    contains among it. Only where the lines right above it are verdicts, too, must they be the same.

    Args:
      text: the answer of the judge's model, which ended it by itself.
      labels: see `check_labels`.

    Raises:
      Unreadable: the last line is no verdict, or the verdicts at the end contradict each other.
    """
    masses: dict[str, Masses] = {labels[0]: (1.0, 0.0), labels[1]: (0.0, 1.0), TIE: (0.5, 0.5)}
    lines = [line for line in text.splitlines() if line.strip()]

    def stated(line: str) -> str | None:
        match = _VERDICT_LINE.fullmatch(line) if len(line) <= _LONGEST_VERDICT_LINE else None
        label = None if match is None else TIE if match[1].casefold() == TIE else match[1]
        return label if label in masses else None

    verdicts = list(itertools.takewhile(bool, map(stated, reversed(lines))))
    if not verdicts:
        last = repr(lines[-1]) if lines else "missing"
        raise Unreadable(f"the last line is no verdict, such as 'Verdict: {labels[0]}': {last}")
    if len(set(verdicts)) > 1:
        raise Unreadable(
            f"the verdicts at the end contradict each other: {', '.join(map(str, verdicts[::-1]))}"
        )
    return masses[str(verdicts[0])]


def _choice(reply: Any) -> Mapping[str, Any]:
    try:
        choice = reply["choices"][0]
    except (TypeError, KeyError, IndexError):
        choice = None
    if not isinstance(choice, dict):
        raise Unreadable(f"the server's answer is no chat completion: {json.dumps(reply)}")
    return choice


def from_text(reply: Any, labels: tuple[str, str]) -> Masses:
    """Return 1 for the label that is the whole answer, and 0 for the other one.

    Raises:
      Unreadable: the answer is neither label.
    """
    message = _choice(reply).get("message")
    text = message.get("content") if isinstance(message, dict) else None
    label = strip_punctuation(text) if isinstance(text, str) else None
    if label not in labels:
        raise Unreadable(f"the answer is neither {labels[0]} nor {labels[1]}: {text!r}")
    return (1.0, 0.0) if label == labels[0] else (0.0, 1.0)


def reasoned_text(reply: Any) -> str:
    """Return the text of an answer that the model ended by itself.

    Raises:
      Unreadable: there is no text, or it was cut off: its last line is then not the last that was meant.
    """
    choice = _choice(reply)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise Unreadable(f"the answer has no text: {text!r}")
    if choice.get("finish_reason") != "stop":
        raise Unreadable(
            f"the answer was cut off (finish_reason {choice.get('finish_reason')!r}); allow longer ones with"
            " judge.max_tokens or judge.max_completion_tokens"
        )
    return text


def from_reasoning(reply: Any, labels: tuple[str, str]) -> Masses:
    """Return the verdict in the last line of an answer, see `from_last_line`.

    Raises:
      Unreadable: see there and `reasoned_text`.
    """
    return from_last_line(reasoned_text(reply), labels)


def from_logprobs(reply: Any, labels: tuple[str, str]) -> Masses:
    """Return the labels' probabilities at the first token that is one of them; only punctuation may precede it.

    Raises:
      NoLogprobs: there are no probabilities at all.
      Unreadable: the answer begins with something else, or the probabilities are incomplete.
    """
    listed = _choice(reply).get("logprobs")
    tokens = listed.get("content") if isinstance(listed, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise NoLogprobs("the server gave no logprobs; if it never does, set judge.mode to 'text'")
    for token in tokens:
        text, _ = _token(token)
        if strip_punctuation(text) in labels:
            return _masses(token, labels)
        if strip_punctuation(text):  # "Not A" is no vote for A
            raise Unreadable(f"the answer begins with {text!r}, not with {labels[0]} or {labels[1]}")
    raise Unreadable(f"the answer has no {labels[0]} or {labels[1]}")


def _masses(token: Mapping[str, Any], labels: tuple[str, str]) -> Masses:
    """Return the labels' probabilities at a token, summed over spellings (with a leading space, in quotation marks)."""
    alternatives = token.get("top_logprobs")
    if not isinstance(alternatives, list):
        raise Unreadable("the server listed no alternatives (top_logprobs)")
    listed = [_token(alternative) for alternative in alternatives]
    if token["token"] not in {text for text, _ in listed}:
        listed.append(_token(token))
    masses = [sum(mass for text, mass in listed if strip_punctuation(text) == label) for label in labels]
    total = sum(mass for _, mass in listed)
    if total > 1.01 or max(masses) <= 0:
        raise Unreadable(
            f"the alternatives' probabilities sum up to {total:.3g}, and the labels' to {sum(masses):.3g}"
        )
    if not min(masses):
        # its probability is at most that of the least likely alternative, and at most the rest
        bound = min(max(1 - total, 0.0), min(mass for _, mass in listed))
        if bound > NEGLIGIBLE * max(masses):
            label = labels[masses.index(min(masses))]
            raise Unreadable(f"{label} is not among the {len(listed)} alternatives that the server listed")
    return masses[0], masses[1]


def _token(token: Any) -> tuple[str, float]:
    """Return the text and probability of a token."""
    text, logp = (token.get("token"), token.get("logprob")) if isinstance(token, dict) else (None, None)
    if (
        isinstance(text, str)
        and isinstance(logp, int | float)
        and not isinstance(logp, bool)
        and logp <= 1e-3
    ):
        return text, math.exp(max(logp, -1e4))  # some servers write -9999 or less for zero
    raise Unreadable(f"the logprobs are not in OpenAI's form: {json.dumps(token)}")
