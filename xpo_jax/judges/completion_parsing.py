"""What a chat completion, as parsed JSON, says of two labels. Strict: what is not clear is no answer.

Nothing is trusted to be there or of its type: a server may send anything.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from typing import Any

# A label that is not among the alternatives counts as 0 if it can have at most this share of the other's mass.
NEGLIGIBLE = 0.01
_AROUND = (
    string.whitespace + string.punctuation + "\u201e\u201c\u201d\u2018\u2019\u00ab\u00bb\u2026\u3002\u00a0"
)

Masses = tuple[float, float]  # of the labels of the first and the second answer shown; not both 0


class Unreadable(ValueError):
    """An answer that says nothing; its text becomes the reason."""


class NoLogprobs(Unreadable):
    """An answer without any probabilities, as of a server that never gives them."""


def bare(text: str) -> str:
    """A text without the blanks and punctuation around it."""
    return text.strip(_AROUND)


def _choice(reply: Any) -> Mapping[str, Any]:
    try:
        choice = reply["choices"][0]
    except (TypeError, KeyError, IndexError):
        choice = None
    if not isinstance(choice, dict):
        raise Unreadable(f"the server's answer is no chat completion: {json.dumps(reply)}")
    return choice


def from_text(reply: Any, labels: tuple[str, str]) -> Masses:
    """1 for the label that is the whole answer, 0 for the other.

    Raises:
      Unreadable: any other answer.
    """
    message = _choice(reply).get("message")
    text = message.get("content") if isinstance(message, dict) else None
    said = bare(text) if isinstance(text, str) else None
    if said not in labels:
        raise Unreadable(f"the answer is neither {labels[0]} nor {labels[1]}: {text!r}")
    return (1.0, 0.0) if said == labels[0] else (0.0, 1.0)


def from_logprobs(reply: Any, labels: tuple[str, str]) -> Masses:
    """The labels' probabilities at the first token that is one of them; only punctuation may come before it.

    Raises:
      Unreadable: an answer that begins with something else, or without the probabilities that this needs; of
        these NoLogprobs, where there are none at all.
    """
    listed = _choice(reply).get("logprobs")
    tokens = listed.get("content") if isinstance(listed, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise NoLogprobs("the server gave no logprobs; if it never does, set judge.mode to 'text'")
    for token in tokens:
        text, _ = _token(token)
        if bare(text) in labels:
            return _masses(token, labels)
        if bare(text):  # "Not A" is no vote for A
            raise Unreadable(f"the answer begins with {text!r}, not with {labels[0]} or {labels[1]}")
    raise Unreadable(f"the answer has no {labels[0]} or {labels[1]}")


def _masses(token: Mapping[str, Any], labels: tuple[str, str]) -> Masses:
    """The labels' probabilities at a token, over its spellings (with a blank before it, in quotation marks)."""
    alternatives = token.get("top_logprobs")
    if not isinstance(alternatives, list):
        raise Unreadable("the server listed no alternatives (top_logprobs)")
    listed = [_token(each) for each in alternatives]
    if token["token"] not in {text for text, _ in listed}:
        listed.append(_token(token))
    masses = [sum(mass for text, mass in listed if bare(text) == label) for label in labels]
    total = sum(mass for _, mass in listed)
    if total > 1.01 or max(masses) <= 0:
        raise Unreadable(
            f"the alternatives' probabilities sum up to {total:.3g}, and the labels' to {sum(masses):.3g}"
        )
    if not min(masses):
        # it has no more than the least that is listed, nor than what all of these leave
        most = min(max(1 - total, 0.0), min(mass for _, mass in listed))
        if most > NEGLIGIBLE * max(masses):
            label = labels[masses.index(min(masses))]
            raise Unreadable(f"{label} is not among the {len(listed)} alternatives that the server listed")
    return masses[0], masses[1]


def _token(token: Any) -> tuple[str, float]:
    """A token's text and probability."""
    text, logp = (token.get("token"), token.get("logprob")) if isinstance(token, dict) else (None, None)
    if (
        isinstance(text, str)
        and isinstance(logp, int | float)
        and not isinstance(logp, bool)
        and logp <= 1e-3
    ):
        return text, math.exp(max(logp, -1e4))  # a server may say -9999, or less, for never
    raise Unreadable(f"the logprobs are not in OpenAI's form: {json.dumps(token)}")
