"""The type of a verb of the embedded world: its forms, and what it combines with.

The types and a reader of their notation; the verbs themselves are in `verbs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from xpo_jax.embedded.german.lexicon import Noun


@dataclass(frozen=True)
class Form:
    """One verb. prefix: its separable part or ""; apart: the prefix is a word of its own throughout."""

    infinitive: str
    present: str
    past: str
    participle: str
    prefix: str
    apart: bool


@dataclass(frozen=True)
class Nominal:
    """A noun with a support verb: "die Prüfung des Berichts durchführen" instead of "den Bericht prüfen"."""

    nouns: tuple[Noun, ...]
    support: tuple[Form, ...]


@dataclass(frozen=True)
class Verb:
    """One verb concept.

    forms: synonyms. habit: "" no frequency adverbs, "rare" not daily or weekly, "daily" all of them.
    habit_of_one: "putzt täglich die Küche" is sensible, not only "putzt täglich Küchen".
    durative: fits "momentan". plans: fits the future and wollen, müssen, können.
    reasons: causes for doing it; obstacles: causes for not doing it. group: needs several agents.
    near: an everyday act; nobody dates it by month or year. slow: not done in a day or a week.
    creates: what is made cannot be old or famous yet.
    """

    # long: a row of the table in verbs.py

    forms: tuple[Form, ...]
    agents: tuple[str, ...]
    objects: tuple[str, ...]
    nominal: Nominal | None = None
    manners: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()
    adjectives: tuple[str, ...] = ()
    habit: str = ""
    habit_of_one: bool = False
    durative: bool = False
    plans: bool = True
    group: bool = False
    near: bool = False
    slow: bool = False
    creates: bool = False


def form(entry: str) -> Form:
    """Read "ab|lehnen lehnt lehnte abgelehnt"; "instand+setzen" is written apart throughout."""
    infinitive, present, past, participle = entry.split()
    for mark in "|+":
        if mark in infinitive:
            prefix, _, infinitive = infinitive.partition(mark)
            participle = participle.replace("+", " ")
            return Form(infinitive, present, past, participle, prefix, mark == "+")
    return Form(infinitive, present, past, participle, "", False)
