"""A source of prompts, as CONTRIBUTING.md shows it."""


def sums() -> list[dict[str, object]]:
    """Return the rows, which a real source would read or compute here."""
    return [{"text": f"{a}+{b}=", "sum": a + b} for a in range(5) for b in range(5)]
