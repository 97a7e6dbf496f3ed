"""German endings: noun phrases in their cases and numbers, and the forms of verbs.

Every phrase is a string that ends with a space, so that phrases are joined by concatenation and
matched with `str.startswith`. Covers the regular patterns that the lexicon needs and no others.
"""

from __future__ import annotations

from functools import cache

from xpo_jax.embedded.german.lexicon import ADJECTIVES, AGENTS, OBJECTS, QUANTITIES, Noun
from xpo_jax.embedded.german.valency import Form

DEFINITE = {
    "nom": {"m": "der", "f": "die", "n": "das", "p": "die"},
    "acc": {"m": "den", "f": "die", "n": "das", "p": "die"},
    "dat": {"m": "dem", "f": "der", "n": "dem", "p": "den"},
    "gen": {"m": "des", "f": "der", "n": "des", "p": "der"},
}
# ein, kein: the ending after "ein" or "kein"; only kein has a plural.
EIN = {
    "nom": {"m": "", "f": "e", "n": "", "p": "e"},
    "acc": {"m": "en", "f": "e", "n": "", "p": "e"},
    "dat": {"m": "em", "f": "er", "n": "em"},
    "gen": {"m": "es", "f": "er", "n": "es"},
}
# Adjective endings that are not "en": after der, after ein, and without an article.
WEAK = {"nom": {"m": "e", "f": "e", "n": "e"}, "acc": {"f": "e", "n": "e"}}
MIXED = {"nom": {"m": "er", "f": "e", "n": "es"}, "acc": {"f": "e", "n": "es"}}
STRONG_PLURAL = {"nom": {"p": "e"}, "acc": {"p": "e"}}
PRONOUNS = {"m": "er", "f": "sie", "n": "es", "p": "sie"}


def _noun_form(noun: Noun, case: str, plural: bool) -> str:
    if plural:
        return noun.plural + ("n" if case == "dat" and noun.plural[-1] not in "ns" else "")
    if case == "gen" or (noun.weak and case in ("acc", "dat")):
        return noun.genitive
    return noun.singular


def _phrase(noun: Noun, determiner: str, plural: bool, case: str, stem: str) -> list[str]:
    gender = "p" if plural else noun.gender
    head = _noun_form(noun, case, plural)
    if determiner == "definite":
        starts, endings = [DEFINITE[case][gender] + " "], WEAK
    elif determiner == "indefinite":
        starts, endings = ["ein" + EIN[case][gender] + " "], MIXED
    elif determiner == "no":
        starts, endings = ["kein" + EIN[case][gender] + " "], MIXED
    elif determiner == "bare":
        starts, endings = [""], STRONG_PLURAL
    else:
        starts = [word + " " for word in QUANTITIES[determiner]]
        endings = WEAK if determiner == "all" else STRONG_PLURAL
    adjective = stem + endings.get(case, {}).get(gender, "en") + " " if stem else ""
    return [f"{start}{adjective}{head} " for start in starts]


@cache
def object_phrases(
    concept: str, determiner: str, plural: bool, case: str, adjective: str | None
) -> tuple[str, ...]:
    """Return all ways to name an object, for example ("den alten Brief ", "das alte Schreiben ")."""
    stems = ADJECTIVES[adjective] if adjective else ("",)
    return tuple(
        phrase
        for noun in OBJECTS[concept]
        for stem in stems
        for phrase in _phrase(noun, determiner, plural, case, stem)
    )


@cache
def agent_phrases(concept: str, determiner: str, plural: bool) -> tuple[str, ...]:
    """Return all ways to name an agent as the subject."""
    return tuple(
        phrase for noun in AGENTS[concept] for phrase in _phrase(noun, determiner, plural, "nom", "")
    )


@cache
def by_agent_phrases(concept: str, determiner: str, plural: bool) -> tuple[str, ...]:
    """Return all ways to name an agent in the passive: "vom Arzt ", "von zwei Ärzten "."""
    phrases = (phrase for noun in AGENTS[concept] for phrase in _phrase(noun, determiner, plural, "dat", ""))
    return tuple("vom " + phrase[4:] if phrase.startswith("dem ") else "von " + phrase for phrase in phrases)


@cache
def pronoun(concept: str, plural: bool) -> str:
    """Return the agent's pronoun; all synonyms of a person have the same gender."""
    return PRONOUNS["p" if plural else AGENTS[concept][0].gender] + " "


@cache
def nominal_phrases(nouns: tuple[Noun, ...], genitives: tuple[str, ...], case: str) -> tuple[str, ...]:
    """Return "die Überprüfung des Berichts " for every noun and every genitive."""
    return tuple(
        start + genitive
        for noun in nouns
        for start in _phrase(noun, "definite", False, case, "")
        for genitive in genitives
    )


@cache
def finite(form: Form, past: bool, plural: bool) -> str:
    """Return the conjugated verb in the third person, without its prefix."""
    if past:
        return form.past + ("" if not plural else "n" if form.past.endswith("e") else "en") + " "
    return (form.infinitive if plural else form.present) + " "


@cache
def finite_last(form: Form, past: bool, plural: bool) -> str:
    """Return the conjugated verb at the end of a subordinate clause, joined to its prefix."""
    return _meet(form, finite(form, past, plural))


def infinitive(form: Form) -> str:
    """Return the infinitive: "ablehnen ", "instand setzen "."""
    return _meet(form, form.infinitive + " ")


def zu_infinitive(form: Form) -> str:
    """Return the infinitive with "zu": "zu prüfen ", "abzulehnen ", "instand zu setzen "."""
    if not form.prefix:
        return f"zu {form.infinitive} "
    return _meet(form, ("zu " if form.apart else "zu") + form.infinitive + " ")


def _meet(form: Form, verb: str) -> str:
    return (form.prefix + (" " if form.apart else "") if form.prefix else "") + verb
