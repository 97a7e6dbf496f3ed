"""Fake judges. A config names one as "fakes:LongerText" and gives its arguments beside the name."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from xpo_jax.values import Answer, Candidate, Comparison, Message, Verdict


def comparisons(n: int = 3) -> list[Comparison]:
    """Return comparisons that differ in a number."""
    return [
        Comparison(({"role": "user", "content": f"prompt {i}"},), {"n": i}, f"left {i}", f"right {i}")
        for i in range(n)
    ]


class LongerText:
    """Prefer the longer text; equal lengths tie. `parts` counts characters and calls texts of more than three valid."""

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        return [Verdict(0.5 + 0.5 * np.sign(len(c.a) - len(c.b)), "length", _lengths(c)) for c in comparisons]

    def parts(self, messages: Any, text: str) -> dict[str, Any]:
        return {"letters": float(len(text)), "valid": float(len(text) > 3), "reason": "text is left out"}


def _lengths(comparison: Comparison) -> dict[str, int]:
    return {"a": len(comparison.a), "b": len(comparison.b)}


class Recording(LongerText):
    """Record the comparisons of every instance in `Recording.calls`, one list per call."""

    calls: ClassVar[list[list[Comparison]]] = []

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        Recording.calls.append(list(comparisons))
        return super().__call__(comparisons)


class Slow(LongerText):
    """Sleep for some seconds before each answer."""

    def __init__(self, *, seconds: float):
        self._seconds = seconds

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        time.sleep(self._seconds)
        return super().__call__(comparisons)


class Always:
    """Give the same answer to every comparison: "A", "tie", None, prose, an integer, ..."""

    def __init__(self, *, answer: Any):
        self._answer = answer

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Any]:
        return [self._answer] * len(comparisons)


def tied() -> Always:
    """Return a judge for which everything ties."""
    return Always(answer="tie")


def prose() -> Always:
    """Return a judge that answers in prose, as a chat model does without instructions on the format."""
    return Always(answer="Answer A is better because it is more polite.")


def silent() -> Always:
    """Return a judge that never has a verdict."""
    return Always(answer=None)


def lost() -> Always:
    """Return a judge that answers NaN."""
    return Always(answer=float("nan"))


class Patchy(Recording):
    """Act as `Recording`, but with no verdict where `Patchy.fails`: None where a is longer, otherwise NaN."""

    @staticmethod
    def fails(a: str, b: str) -> bool:
        return (len(a) + len(b)) % 3 == 0

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        return [
            (None if len(c.a) > len(c.b) else float("nan")) if self.fails(c.a, c.b) else answer
            for c, answer in zip(comparisons, super().__call__(comparisons), strict=True)
        ]


class Scored(LongerText):
    """Act as `LongerText`, and report the number of vowels as the score of an answer."""

    def parts(self, messages: Sequence[Message], text: str) -> dict[str, float]:
        return {"score": float(sum(text.count(vowel) for vowel in "aeiou"))}


class Miscounting:
    """Answer one comparison too few."""

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        return ["A"] * (len(comparisons) - 1)


class Broken:
    """Raise from call number `at` on, counted from 0; before it, everything ties."""

    def __init__(self, *, at: int):
        self._left = at

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        self._left -= 1
        if self._left < 0:
            raise KeyError("the\nserver is gone")
        return ["tie"] * len(comparisons)


class BrokenOn(LongerText):
    """Raise on one process of several at its call number `at`, counted from 0, and print the time."""

    def __init__(self, *, process: int, at: int):
        self._left = at if jax.process_index() == process else None

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                print(f"raised at {time.time()}", file=sys.stderr, flush=True)
                raise KeyError("the\nserver is gone")
        return super().__call__(comparisons)


class Turning(LongerText):
    """Keep the contract until call number `at`, counted from 0, and break it there with an integer."""

    def __init__(self, *, at: int):
        self._left = at

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Any]:
        self._left -= 1
        return [1] * len(comparisons) if self._left < 0 else super().__call__(comparisons)


class Counting:
    """Record all comparisons; raise at batch number `fail_at`, or signal this process at `signal_at`, from 1 on.

    All attributes belong to the class, because a run makes its own judge: before a test, call `reset` and set one.
    """

    comparisons: ClassVar[list[Comparison]] = []
    batches: ClassVar[int] = 0
    fail_at: ClassVar[int | None] = None
    signal_at: ClassVar[tuple[int, int] | None] = None  # batch and signal

    @classmethod
    def reset(cls) -> None:
        cls.comparisons, cls.batches, cls.fail_at, cls.signal_at = [], 0, None, None

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        cls = type(self)
        cls.batches += 1
        if cls.batches == cls.fail_at:
            raise RuntimeError("the judge is out")
        if cls.signal_at and cls.batches == cls.signal_at[0]:
            signal.raise_signal(cls.signal_at[1])
        cls.comparisons += comparisons
        return [1.0 if len(c.a) > len(c.b) else 0.25 if len(c.a) < len(c.b) else "tie" for c in comparisons]


def always_a() -> Always:
    """Return a judge that prefers the answer shown as A."""
    return Always(answer="A")


class Scoring(LongerText):
    """Score a text by its length, and prefer the higher score; record the texts of every call of `scores`."""

    calls: ClassVar[list[list[str]]] = []

    def scores(self, candidates: Sequence[Candidate]) -> list[float | None]:
        Scoring.calls.append([candidate.text for candidate in candidates])
        return [float(len(candidate.text)) for candidate in candidates]

    def compare_scores(self, a: float, b: float) -> float:
        return 0.5 + 0.5 * float(np.sign(a - b))
