"""The sentence bracket of German: which finite verb goes with which end of the clause.

"Sentence bracket" is the linguistic term, in German "Satzklammer":
"lehnt ... ab", "hat ... abgelehnt", "muss ... abgelehnt werden". The two halves depend on each other, so they
are listed in pairs; within a pair every verb fits every end.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from xpo_jax.embedded.german.inflection import finite, finite_last, infinitive, zu_infinitive
from xpo_jax.embedded.german.valency import Form

Phrases = tuple[str, ...]

MODALS: dict[tuple[str, str], tuple[Phrases, Phrases]] = {
    ("must", "present"): (("muss ",), ("müssen ",)),
    ("must", "past"): (("musste ",), ("mussten ",)),
    ("want", "present"): (("will ", "möchte "), ("wollen ", "möchten ")),
    ("want", "past"): (("wollte ",), ("wollten ",)),
    ("can", "present"): (("kann ",), ("können ",)),
    ("can", "past"): (("konnte ",), ("konnten ",)),
}


class Bracket(NamedTuple):
    """A finite verb with the right bracket that fits it, and both in one at the end of a subordinate clause."""

    verb: Phrases
    right: Phrases
    last: Phrases


@cache
def active_brackets(
    forms: tuple[Form, ...], tense: str, modality: str | None, plural: bool
) -> tuple[Bracket, ...]:
    """Return the brackets of the active voice, for every form in this tense and modality."""
    infinitives = tuple(infinitive(form) for form in forms)
    if modality:
        brackets = [Bracket(MODALS[modality, tense][plural], infinitives, ())]
        if modality == "must":
            have = (("hat ", "haben "), ("hatte ", "hatten "))[tense == "past"][plural]
            brackets.append(Bracket((have,), tuple(zu_infinitive(form) for form in forms), ()))
        return tuple(brackets)
    brackets = []
    # "lehnt ... ab" and "weist ... zurück" must not mix: one entry per prefix
    for prefix in dict.fromkeys(form.prefix for form in forms):
        with_prefix = [form for form in forms if form.prefix == prefix]
        past = tense == "past"
        brackets.append(
            Bracket(
                tuple(finite(form, past, plural) for form in with_prefix),
                (prefix + " " if prefix else "",),
                tuple(finite_last(form, past, plural) for form in with_prefix),
            )
        )
    participles = tuple(form.participle + " " for form in forms)
    if tense == "past":
        have = "haben " if plural else "hat "
        brackets.append(Bracket((have,), participles, tuple(participle + have for participle in participles)))
    if tense == "future":
        will = "werden " if plural else "wird "
        brackets.append(Bracket((will,), infinitives, tuple(word + will for word in infinitives)))
    return tuple(brackets)


@cache
def passive_brackets(
    forms: tuple[Form, ...], tense: str, modality: str | None, plural: bool
) -> tuple[Bracket, ...]:
    """Return the brackets of the passive voice, whose verb agrees with the object: `plural` is the object's number."""
    participles = tuple(form.participle + " " for form in forms)
    to_be = tuple(participle + "werden " for participle in participles)
    if modality:
        return (Bracket(MODALS[modality, tense][plural], to_be, ()),)
    now = "werden " if plural else "wird "
    present = Bracket((now,), participles, tuple(participle + now for participle in participles))
    if tense == "present":
        return (present,)
    if tense == "future":
        return (present, Bracket((now,), to_be, ()))
    was, has = ("wurden ", "sind ") if plural else ("wurde ", "ist ")
    been = tuple(participle + "worden " for participle in participles)
    return (
        Bracket((was,), participles, tuple(participle + was for participle in participles)),
        Bracket((has,), been, tuple(phrase + has for phrase in been)),
    )
