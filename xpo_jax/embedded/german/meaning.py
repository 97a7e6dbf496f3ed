"""The meaning of a sentence of the embedded world, apart from words and word order, and how to draw one.

Leaves out everything that two paraphrases may differ in: voice, order, synonyms, tense forms of the
same time, and how a cause is attached.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, dataclass
from typing import Any

from xpo_jax.embedded.german.causes import CAUSE_OBJECTS, CAUSES
from xpo_jax.embedded.german.lexicon import (
    FAR_TIMES,
    IMPOSSIBLE_PLACES,
    NEAR_TIMES,
    OBJECT_ADJECTIVES,
    OBJECTS,
    ORGANISATIONS,
    QUANTITIES,
    TIMES,
    UNIQUE_AGENTS,
)
from xpo_jax.embedded.german.valency import Verb
from xpo_jax.embedded.german.verbs import VERBS

HELD_OUT_SHARE = 10  # one meaning in ten


@dataclass(frozen=True)
class Participant:
    """A noun concept with its determiner ("definite", "indefinite", "bare" or a quantity) and number."""

    concept: str
    determiner: str
    plural: bool
    adjective: str | None = None


@dataclass(frozen=True)
class Meaning:
    """One proposition. tense: "past", "present" or "future"; modality: None, "must", "want" or "can"."""

    # long: the parts of a sentence

    verb: str
    agent: Participant
    object: Participant
    tense: str
    negated: bool = False
    modality: str | None = None
    time: str | None = None
    manner: str | None = None
    place: str | None = None
    cause: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the meaning as plain JSON values."""
        return asdict(self)


def is_held_out(meaning: Meaning) -> bool:
    """Return whether a meaning is held out for evaluation: about one in ten, by a hash that never changes."""
    digest = hashlib.blake2b(repr(meaning).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def is_coherent(meaning: Meaning) -> bool:
    """Return whether tense, modality, time, cause and negation agree, so that every sentence has one meaning.

    A future time makes the present tense future, or goes with a present modal; a future has such a time.
    """
    time = meaning.time
    if meaning.negated and meaning.object.determiner in QUANTITIES:
        return False  # "zwei Autos kaufte er nicht" may mean two things
    if meaning.tense == "future":
        return time in TIMES["future"] and meaning.modality is None and meaning.cause is None
    if meaning.modality is not None and (meaning.cause or (meaning.negated and meaning.modality != "can")):
        return False
    if meaning.tense == "past":
        return time is None or (time in TIMES["past"] and meaning.modality != "want")
    if meaning.modality is not None:
        return time is None or time in TIMES["future"]
    return time is None or time in TIMES["present"] or time in TIMES["frequency"]


def random_meaning(rng: random.Random) -> Meaning:
    """Draw a sensible meaning: agents, objects, adverbials and causes that fit the verb and each other."""
    name = rng.choice(_VERB_NAMES)
    verb = VERBS[name]
    concept = rng.choice(verb.objects)
    agent = _random_agent(verb, rng)
    tense = rng.choices(("past", "present", "future"), (55, 22, 23))[0] if verb.plans else "past"
    negated = rng.random() < 0.2
    if negated:  # "zwei Köche kauften kein Auto" may mean two things
        agent = Participant(agent.concept, "definite", agent.plural)
    modality = None
    if verb.plans and not verb.group and rng.random() < 0.2:
        modality = rng.choice(("must", "want", "can"))
        tense = rng.choice(("past", "present"))
        negated = negated and modality == "can"

    time = _random_time(verb, concept, tense, modality, negated, rng)
    manner = place = cause = None
    if negated:
        causes = _fitting_causes(verb.obstacles, concept, agent)
    else:
        causes = _fitting_causes(verb.reasons, concept, agent)
    if (
        causes
        and modality is None
        and tense != "future"
        and time not in TIMES["frequency"]
        and rng.random() < 0.5
    ):
        cause = rng.choice(causes)
    elif not negated:
        manners = [manner for manner in verb.manners if _manner_fits(manner, agent, time, modality)]
        chance = 0.7 if time is None else 0.4
        if manners and rng.random() < chance:
            manner = rng.choice(manners)
        places = [place for place in verb.places if (place, concept) not in IMPOSSIBLE_PLACES]
        if places and agent.concept not in ORGANISATIONS and rng.random() < (0.2 if manner else chance):
            place = rng.choice(places)
    bare = time is None and manner is None and place is None and cause is None
    if bare and _may_have_time(modality, tense) and (tense == "past" or modality is not None):
        time = rng.choice(_times(verb, "past" if tense == "past" else "future"))
    return Meaning(
        name,
        agent,
        _random_object(verb, concept, time, negated, rng),
        tense,
        negated,
        modality,
        time,
        manner,
        place,
        cause,
    )


def _random_agent(verb: Verb, rng: random.Random) -> Participant:
    concept = rng.choice(verb.agents)
    if verb.group:
        return Participant(concept, rng.choice(("definite", "definite", "two", "some")), True)
    if concept in UNIQUE_AGENTS:
        return Participant(concept, "definite", False)
    draw = rng.random()
    if draw < 0.62:
        return Participant(concept, "definite", False)
    if draw < 0.74:
        return Participant(concept, "indefinite", False)
    return Participant(concept, "definite" if draw < 0.92 else "two", True)


def _may_have_time(modality: str | None, tense: str) -> bool:
    # "beabsichtigte gestern, ..." would date the wish and "wollte gestern ..." the deed
    return not (modality == "want" and tense == "past")


def _times(verb: Verb, tense: str) -> list[str]:
    return [
        time
        for time in TIMES[tense]
        if not (verb.near and time in FAR_TIMES) and not (verb.slow and time in NEAR_TIMES)
    ]


def _random_time(
    verb: Verb, concept: str, tense: str, modality: str | None, negated: bool, rng: random.Random
) -> str | None:
    if not _may_have_time(modality, tense):
        return None
    if tense == "future":
        return rng.choice(_times(verb, "future"))  # the present tense says the same only with a time
    if rng.random() < 0.12:
        return None
    if tense == "past":
        return rng.choice(_times(verb, "past"))
    if modality is not None:
        return rng.choice(_times(verb, "future"))
    choices = list(TIMES["present"]) if verb.durative else []
    if verb.habit and not negated and (verb.habit_of_one or OBJECTS[concept][0].plural != "-"):
        choices += TIMES["frequency"] if verb.habit == "daily" else ("often", "sometimes", "rarely")
    return rng.choice(choices) if choices else None


def _fitting_causes(causes: tuple[str, ...], concept: str, agent: Participant) -> list[str]:
    return [
        cause
        for cause in causes
        if concept in CAUSE_OBJECTS.get(cause, (concept,))
        and not (CAUSES[cause].about_agent and agent.concept in ORGANISATIONS)
    ]


def _manner_fits(manner: str, agent: Participant, time: str | None, modality: str | None) -> bool:
    if manner == "together":
        return agent.plural
    if manner in ("unaided", "secretly") and agent.concept in ORGANISATIONS:
        return False
    if manner in ("secretly", "voluntarily", "without_reason", "at_once") and modality is not None:
        return False
    if manner == "quickly":
        return time not in FAR_TIMES and time not in TIMES["frequency"] and time != "soon"
    return time is None or manner not in ("at_once", "without_reason")


def _random_object(
    verb: Verb, concept: str, time: str | None, negated: bool, rng: random.Random
) -> Participant:
    has_plural = OBJECTS[concept][0].plural != "-"
    adjectives = [
        adjective
        for adjective in verb.adjectives + OBJECT_ADJECTIVES.get(concept, ())
        if not (verb.creates and adjective in ("old", "famous"))
    ]
    adjective = rng.choice(adjectives) if adjectives and rng.random() < 0.25 else None
    if time in TIMES["frequency"]:
        if (verb.habit_of_one and rng.random() < 0.7) or not has_plural:
            return Participant(concept, "definite", has_plural and rng.random() < 0.3, adjective)
        return Participant(concept, "bare", True, adjective)
    draw = rng.random()
    if not has_plural or draw < 0.48:
        return Participant(concept, "definite", False, adjective)
    if draw < 0.66:
        return Participant(concept, "indefinite", False, adjective)
    if draw < 0.80 or negated:
        return Participant(concept, "definite", True, adjective)
    return Participant(concept, rng.choice(("bare", "two", "some", "many", "all")), True, adjective)


_VERB_NAMES = tuple(VERBS)
