"""From a meaning to its sentences.

The sentences of a meaning are a list of variants: word-order patterns (`orders.py`) together with the phrases that
may replace each of their letters. `realise` draws from it, and the recogniser in `parser.py` matches against the same
variants, so that exactly what can be generated is accepted.

Paraphrases of each other are: active and passive; Präteritum and Perfekt; present and future where a
time adverb names the future; every word order; synonyms; "die Prüfung des Berichts durchführen" for
"den Bericht prüfen"; "hat ... zu prüfen" for "muss prüfen"; and six ways to attach a cause. Left out:
Plusquamperfekt and Konjunktiv, pronouns other than in cause clauses, relative and cleft sentences.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from xpo_jax.embedded.german import orders
from xpo_jax.embedded.german.brackets import Bracket, Phrases, active_brackets, passive_brackets
from xpo_jax.embedded.german.causes import CAUSES, Cause
from xpo_jax.embedded.german.inflection import (
    agent_phrases,
    by_agent_phrases,
    nominal_phrases,
    object_phrases,
    pronoun,
    zu_infinitive,
)
from xpo_jax.embedded.german.lexicon import MANNERS, PLACES, TIMES
from xpo_jax.embedded.german.meaning import Meaning, Participant, is_held_out, random_meaning
from xpo_jax.embedded.german.valency import Form
from xpo_jax.embedded.german.verbs import VERBS

__all__ = [
    "Meaning",
    "Participant",
    "Variant",
    "count",
    "is_held_out",
    "random_meaning",
    "realise",
    "render",
    "variants",
]


class Variant(NamedTuple):
    """Word-order patterns, and the phrases that may replace each of their letters."""

    patterns: tuple[str, ...]
    phrases: dict[str, Phrases]


def _spaced(table: dict[str, tuple[str, ...]]) -> dict[str, Phrases]:
    return {concept: tuple(phrase + " " for phrase in phrases) for concept, phrases in table.items()}


_TIME_PHRASES = {concept: phrases for times in TIMES.values() for concept, phrases in _spaced(times).items()}
_MANNER_PHRASES = _spaced(MANNERS)
_PLACE_PHRASES = _spaced(PLACES)
_CAUSE_PHRASES = {name: tuple(phrase + " " for phrase in cause.phrases) for name, cause in CAUSES.items()}


def realise(meaning: Meaning, rng: random.Random) -> str:
    """Draw one sentence: first the way a cause is attached, then the voice, then words and order, all uniformly."""
    groups = variants(meaning)
    variant = rng.choice(rng.choice(rng.choice(groups)))
    return render("".join(rng.choice(variant.phrases[letter]) for letter in rng.choice(variant.patterns)))


def render(words: str) -> str:
    """Turn words separated by spaces, commas included, into a written sentence."""
    text = words.strip().replace(" ,", ",")
    return text[:1].upper() + text[1:] + "."


def count(meaning: Meaning) -> int:
    """Count the sentences that the grammar has for a meaning."""
    total = 0
    for group in variants(meaning):
        for variant in (variant for voice in group for variant in voice):
            for pattern in variant.patterns:
                product = 1
                for letter in pattern:
                    product *= len(variant.phrases[letter])
                total += product
    return total


def variants(meaning: Meaning) -> list[list[list[Variant]]]:
    """Return all variants of a meaning, grouped by the way a cause is attached and then by voice."""
    cause = CAUSES[meaning.cause] if meaning.cause else None
    if cause is None:
        return [_voices(meaning, "plain", {})]
    agent = meaning.agent
    clauses = cause.past if meaning.tense == "past" else cause.present
    groups = [_voices(meaning, "phrase", {"C": _CAUSE_PHRASES[meaning.cause or ""]})]
    after, before, so = _cause_clauses(cause, clauses, agent)
    groups.append(_voices(meaning, "after", {"W": after}))
    groups.append(_voices(meaning, "before", {"F": before}))
    groups.append(_voices(meaning, "so", {"X": so}))
    return groups


def _cause_clauses(
    cause: Cause, clauses: tuple[tuple[str, str], ...], agent: Participant
) -> tuple[Phrases, Phrases, Phrases]:
    """Return the cause clauses that follow the main clause, that precede it, and that precede "sodass"."""
    if cause.about_agent:
        return _agent_cause_clauses(clauses, agent)
    return _join_clauses(clauses, clauses)


@lru_cache(maxsize=4096)
def _agent_cause_clauses(
    clauses: tuple[tuple[str, str], ...], agent: Participant
) -> tuple[Phrases, Phrases, Phrases]:
    """Return the same; a clause that follows refers to the agent by a pronoun, one that precedes names it."""
    names = agent_phrases(agent.concept, agent.determiner, agent.plural)
    named = tuple(
        (_fill(second, subject, agent.plural), _fill(last, subject, agent.plural))
        for second, last in clauses
        for subject in names
    )
    subject = pronoun(agent.concept, agent.plural)
    referred = tuple(
        (_fill(second, subject, agent.plural), _fill(last, subject, agent.plural)) for second, last in clauses
    )
    return _join_clauses(named, referred)


def _fill(clause: str, subject: str, plural: bool) -> str:
    words = [word.split("/")[plural] if "/" in word else word for word in clause.split()]
    return " ".join(words).replace("{S}", subject.strip())


@lru_cache(maxsize=4096)
def _join_clauses(
    first: tuple[tuple[str, str], ...], second: tuple[tuple[str, str], ...]
) -> tuple[Phrases, Phrases, Phrases]:
    after = [f", {word} {last} " for word in ("weil", "da") for _, last in second]
    after += [f", denn {middle} " for middle, _ in second]
    before = [f"{word} {last} , " for word in ("weil", "da") for _, last in first]
    before += [f"{middle} , {word} " for word in ("deshalb", "daher", "deswegen") for middle, _ in first]
    return tuple(after), tuple(before), tuple(f"{middle} , sodass " for middle, _ in first)


def _voices(meaning: Meaning, attach: str, extra: dict[str, Phrases]) -> list[list[Variant]]:
    """Return the active variants and, where the language allows, the passive ones, for one way to attach a cause."""
    refers = meaning.cause is not None and CAUSES[meaning.cause].about_agent and attach != "phrase"
    phrases = {"N": ("nicht ",), **extra}
    parts = "SO"
    if meaning.time:
        parts += "T"
        phrases["T"] = _TIME_PHRASES[meaning.time]
    if "C" in extra:
        parts += "C"
    if meaning.place:
        parts += "P"
        phrases["P"] = _PLACE_PHRASES[meaning.place]
    if meaning.manner:
        parts += "M"
        phrases["M"] = _MANNER_PHRASES[meaning.manner]
    agent, thing = meaning.agent, meaning.object
    definite = thing.determiner in ("definite", "all")
    if meaning.negated and definite:
        parts += "N"
    named = agent_phrases(agent.concept, agent.determiner, agent.plural)
    phrases["S"] = (pronoun(agent.concept, agent.plural),) if refers and attach in ("before", "so") else named

    active = _active_variants(meaning, parts, definite, attach, phrases)
    if refers or meaning.modality == "want":
        return [active]  # "von ihr" and a wish in the passive would be awkward
    phrases = {**phrases, "A": by_agent_phrases(agent.concept, agent.determiner, agent.plural)}
    return [active, _passive_variants(meaning, parts.replace("S", "A"), definite, attach, phrases)]


def _object(meaning: Meaning, case: str, negated: bool) -> Phrases:
    thing = meaning.object
    determiner = "no" if negated and thing.determiner in ("indefinite", "bare") else thing.determiner
    return object_phrases(thing.concept, determiner, thing.plural, case, thing.adjective)


def _nominal_object(meaning: Meaning, case: str) -> Phrases | None:
    """ "die Prüfung des Berichts ", if the verb has it and the object has a genitive that sounds well."""
    nominal = VERBS[meaning.verb].nominal
    thing = meaning.object
    if nominal is None or thing.determiner not in ("definite", "indefinite"):
        return None
    if meaning.negated and thing.determiner != "definite":
        return None
    return nominal_phrases(nominal.nouns, _object(meaning, "gen", False), case)


def _clauses(
    attach: str, parts: str, definite: bool, passive: bool, front_object: bool, modal: bool
) -> tuple[str, ...]:
    if attach == "so":
        return orders.subordinate_clauses(parts, definite, passive)
    if attach == "before":
        return orders.main_clauses(parts, definite, passive, "F")
    may_front = ("O" if front_object else "") + ("ATCP" if passive else "STCP" if modal else "STCPM")
    patterns = orders.main_clauses(parts, definite, passive, may_front)
    return orders.with_clause_after(patterns) if attach == "after" else patterns


def _active_variants(
    meaning: Meaning, parts: str, definite: bool, attach: str, phrases: dict[str, Phrases]
) -> list[Variant]:
    verb = VERBS[meaning.verb]
    plural = meaning.agent.plural
    patterns = _clauses(attach, parts, definite, False, definite, meaning.modality is not None)
    alternatives = []

    def add(brackets: Iterable[Bracket], objects: Phrases) -> None:
        for verb_phrases, right, last in brackets:
            if attach != "so" or last:
                alternatives.append(
                    Variant(patterns, {**phrases, "O": objects, "V": verb_phrases, "R": right, "E": last})
                )

    objects = _object(meaning, "acc", meaning.negated)
    add(active_brackets(verb.forms, meaning.tense, meaning.modality, plural), objects)
    nominal = _nominal_object(meaning, "acc")
    if nominal and verb.nominal:
        add(active_brackets(verb.nominal.support, meaning.tense, meaning.modality, plural), nominal)
    if meaning.modality in ("want", "can"):
        alternatives += _infinitive_variants(meaning, parts.replace("N", ""), definite, phrases)
    return alternatives


def _passive_variants(
    meaning: Meaning, parts: str, definite: bool, attach: str, phrases: dict[str, Phrases]
) -> list[Variant]:
    verb = VERBS[meaning.verb]
    front_object = not meaning.negated or definite
    patterns = _clauses(attach, parts, definite, True, front_object, False)
    alternatives = []

    def add(forms: tuple[Form, ...], objects: Phrases, plural: bool) -> None:
        for verb_phrases, right, last in passive_brackets(forms, meaning.tense, meaning.modality, plural):
            if attach != "so" or last:
                alternatives.append(
                    Variant(patterns, {**phrases, "O": objects, "V": verb_phrases, "R": right, "E": last})
                )

    add(verb.forms, _object(meaning, "nom", meaning.negated), meaning.object.plural)
    nominal = _nominal_object(meaning, "nom")
    if nominal and verb.nominal:
        add(verb.nominal.support, nominal, False)
    return alternatives


def _infinitive_variants(
    meaning: Meaning, parts: str, definite: bool, phrases: dict[str, Phrases]
) -> list[Variant]:
    """ "beabsichtigt, den Bericht zu prüfen", "ist nicht in der Lage, den Bericht zu prüfen"."""
    plural = meaning.agent.plural
    past = meaning.tense == "past"
    patterns = orders.infinitive_clauses(parts, definite, meaning.modality == "want")
    heads: list[tuple[Phrases, Phrases]]
    if meaning.modality == "want":
        intend = (("beabsichtigt ", "beabsichtigen "), ("beabsichtigte ", "beabsichtigten "))[past][plural]
        have = (("hat ", "haben "), ("hatte ", "hatten "))[past][plural]
        heads = [((intend,), (", ",)), ((have,), ("vor , ", "die Absicht , "))]
    else:
        able = (("ist ", "sind "), ("war ", "waren "))[past][plural]
        not_able = ("nicht in der Lage , ", "nicht imstande , ", "außerstande , ")
        heads = [((able,), not_able if meaning.negated else ("in der Lage , ", "imstande , "))]
    verbs = tuple(zu_infinitive(form) for form in VERBS[meaning.verb].forms)
    return [
        Variant(patterns, {**phrases, "O": _object(meaning, "acc", False), "V": verb, "K": rest, "Z": verbs})
        for verb, rest in heads
    ]
