"""A judge with a setting, as CONTRIBUTING.md shows it."""

from collections.abc import Sequence

from xpo_jax.values import Comparison, Verdict


class MostOften:
    """The answer that contains a text more often wins.

    Args:
      text: what to count.
    """

    def __init__(self, *, text: str):
        if not text:
            raise ValueError("text: at least one character is expected")
        self._text = text

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict for each comparison, in order."""
        return [self._verdict(c.a.count(self._text), c.b.count(self._text)) for c in comparisons]

    def _verdict(self, a: int, b: int) -> Verdict:
        p = 0.5 if a == b else float(a > b)
        return Verdict(p, f"{self._text!r} occurs {a} and {b} times", {"a": a, "b": b})
