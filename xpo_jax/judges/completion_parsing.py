"""Read the probabilities of two labels from a chat completion, as parsed JSON. Anything ambiguous is no answer.

No field is assumed to exist or to have the right type, since a server may send anything. The openai client's response
models would not do: they are built without validation, so a field may hold a value of any type.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from typing import Any

# A label that is not among the alternatives counts as 0 if it can have at most this fraction of the other's mass.
NEGLIGIBLE = 0.01
_STRIPPED = (
    string.whitespace + string.punctuation + "\u201e\u201c\u201d\u2018\u2019\u00ab\u00bb\u2026\u3002\u00a0"
)

Masses = tuple[float, float]  # probabilities of the labels of the first and second answer shown; not both 0


class Unreadable(ValueError):
    """The reply contains no usable answer; the message becomes the reason."""


class NoLogprobs(Unreadable):
    """The reply contains no probabilities at all; the server may never give them."""


def strip_punctuation(text: str) -> str:
    """Return the text without the white space and punctuation around it."""
    return text.strip(_STRIPPED)


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
