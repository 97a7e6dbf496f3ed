"""From a sentence to its meaning: the hard gate of the embedded world.

Analysis by synthesis. The words of a sentence suggest candidates (which verb, agent, object, time ... it could mean);
a candidate is the meaning if one of the grammar's variants for it matches the sentence word by word, capitals, commas
and full stop included. Nothing outside the grammar is accepted, on purpose: a gate that guesses can be gamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import islice, product

from xpo_jax.embedded.german.causes import CAUSES
from xpo_jax.embedded.german.grammar import Variant, variants
from xpo_jax.embedded.german.inflection import agent_phrases, by_agent_phrases, object_phrases
from xpo_jax.embedded.german.lexicon import ADJECTIVES, AGENTS, MANNERS, OBJECTS, PLACES, QUANTITIES, TIMES
from xpo_jax.embedded.german.meaning import Meaning, Participant, is_coherent
from xpo_jax.embedded.german.orders import Node, trie
from xpo_jax.embedded.german.valency import Form
from xpo_jax.embedded.german.verbs import VERBS

LONGEST_PHRASE = 5  # words
LONGEST_SENTENCE = 30  # words and commas; a longer text is not in this grammar
MOST_CANDIDATES = 5000  # a sentence of the grammar has a few hundred; a heap of words could have millions
MODAL_WORDS = {
    "must": "muss müssen musste mussten hat haben hatte hatten",
    "want": "will wollen möchte möchten wollte wollten hat haben hatte "
    "hatten beabsichtigt beabsichtigen beabsichtigte beabsichtigten",
    "can": "kann können konnte konnten imstande außerstande Lage",
}
NEGATIONS = frozenset(("nicht", "kein", "keine", "keinen", "keines", "keiner", "außerstande"))


@lru_cache(maxsize=65536)
def parse(sentence: str) -> Meaning | None:
    """Return the meaning of a sentence, or None if the sentence is not in the grammar."""
    words = _words(sentence)
    if words is None:
        return None
    return next((meaning for meaning in _candidates(words) if _matches(meaning, words)), None)


def same_meaning(source: str, answer: str) -> bool:
    """Return whether `answer` is a sentence of the grammar with the meaning of `source`."""
    meaning = parse(source)
    words = _words(answer)
    return meaning is not None and words is not None and _matches(meaning, words)


def difference(source: str, answer: str) -> str:
    """Return why `same_meaning` is false, as one short phrase; "" if it is true."""
    meaning = parse(source)
    if meaning is None:
        return "the input is not a sentence of the grammar"
    words = _words(answer)
    if words is not None and _matches(meaning, words):
        return ""
    other = parse(answer)
    if other is None:
        return "not a sentence of the grammar"
    for field in (
        "verb",
        "agent",
        "object",
        "tense",
        "negated",
        "modality",
        "time",
        "manner",
        "place",
        "cause",
    ):
        wanted, actual = getattr(meaning, field), getattr(other, field)
        if wanted != actual:
            name = "negation" if field == "negated" else field
            if wanted is None or actual is None:
                return f"{name} {'added' if wanted is None else 'dropped'}"
            if isinstance(wanted, Participant) and wanted.concept == actual.concept:
                return f"other determiner, number or adjective of the {name}"
            return f"other {name}"
    raise AssertionError(f"ambiguous sentence: {answer}")


def _words(sentence: str) -> str | None:
    """Return the sentence as the grammar has it, each word followed by a space; None if it is not written as one."""
    if not sentence.endswith(".") or not sentence[:1].isupper():
        return None
    return sentence[:-1].replace(",", " ,") + " "


def _matches(meaning: Meaning, words: str) -> bool:
    # The first letter alone may be a capital because of its position.
    lowered = words[0].lower() + words[1:]
    return any(
        _match(trie(variant.patterns), variant, text, 0)
        for group in _variants(meaning)
        for voice in group
        for variant in voice
        for text in (lowered, words)
    )


@lru_cache(maxsize=8192)
def _variants(meaning: Meaning) -> list[list[list[Variant]]]:
    return variants(meaning)


def _match(node: Node, variant: Variant, text: str, start: int) -> bool:
    for letter, child in node.items():
        if not letter:
            if start == len(text):
                return True
            continue
        for phrase in variant.phrases[letter]:
            if text.startswith(phrase, start) and _match(child, variant, text, start + len(phrase)):
                return True
    return False


def _candidates(words: str) -> Iterator[Meaning]:
    """Yield every meaning whose parts the words name; they are few, because phrases show number and case."""
    tokens = words.split()
    if len(tokens) > LONGEST_SENTENCE:
        return
    named: dict[str, dict[object, None]] = {}
    first = tokens[0][0].lower() + tokens[0][1:]
    for variant in ([first, *tokens[1:]], tokens):
        for start in range(len(tokens)):
            for end in range(start + 1, min(start + LONGEST_PHRASE, len(tokens)) + 1):
                for kind, value in _index().get(" ".join(variant[start:end]), ()):
                    named.setdefault(kind, {})[value] = None
    adverbials = [[None, *named.get(kind, ())] for kind in ("modality", "time", "manner", "place", "cause")]
    negations = (False, True) if NEGATIONS.intersection(tokens) or first in NEGATIONS else (False,)
    combinations = product(
        named.get("verb", ()),
        named.get("agent", ()),
        named.get("object", ()),
        ("past", "present", "future"),
        negations,
        *adverbials,
    )
    for verb, agent, thing, tense, negated, *rest in islice(combinations, MOST_CANDIDATES):
        meaning = Meaning(verb, agent, thing, tense, negated, *rest)  # type: ignore[arg-type]
        if is_coherent(meaning):
            yield meaning


@cache
def _index() -> dict[str, tuple[tuple[str, object], ...]]:
    """Return what each phrase may name: {"vom Arzt": (("agent", Participant(...)),), ...}."""
    index: dict[str, dict[tuple[str, object], None]] = {}

    def add(phrase: str, kind: str, value: object) -> None:
        index.setdefault(phrase.strip(), {})[kind, value] = None

    for concept, entries in AGENTS.items():
        for determiner, plural in (
            ("definite", False),
            ("indefinite", False),
            ("definite", True),
            ("two", True),
            ("some", True),
        ):
            if plural and entries[0].plural == "-":
                continue
            for make in (agent_phrases, by_agent_phrases):
                for phrase in make(concept, determiner, plural):
                    add(phrase, "agent", Participant(concept, determiner, plural))
    determiners = [("definite", False), ("indefinite", False), ("definite", True), ("bare", True)]
    determiners += [(quantity, True) for quantity in QUANTITIES]
    for concept, entries in OBJECTS.items():
        for (determiner, plural), adjective in product(determiners, (None, *ADJECTIVES)):
            if plural and entries[0].plural == "-":
                continue
            thing = Participant(concept, determiner, plural, adjective)
            cases = ["nom", "acc"] + ["gen"] * (determiner in ("definite", "indefinite"))
            for case in cases:
                for phrase in object_phrases(concept, determiner, plural, case, adjective):
                    add(phrase, "object", thing)
                if determiner in ("indefinite", "bare") and case != "gen":
                    for phrase in object_phrases(concept, "no", plural, case, adjective):
                        add(phrase, "object", thing)
    for kind, table in (
        *(("time", times) for times in TIMES.values()),
        ("manner", MANNERS),
        ("place", PLACES),
    ):
        for concept, phrases in table.items():
            for phrase in phrases:
                add(phrase, kind, concept)
    for name, cause in CAUSES.items():
        for phrase in cause.phrases:
            add(phrase, "cause", name)
        for clause in (clause for pair in cause.past + cause.present for clause in pair):
            for plural in (False, True):
                words = [word.split("/")[plural] if "/" in word else word for word in clause.split()]
                # The clause's own words, without the agent, in runs that are short enough for the scan.
                for run in " ".join(words).split("{S}"):
                    add(" ".join(run.split()[:LONGEST_PHRASE]), "cause", name)
    for name, verb in VERBS.items():
        forms = verb.forms
        for form in forms:
            for word in _word_forms(form):
                add(word, "verb", name)
        if verb.nominal:
            for entry in verb.nominal.nouns:
                add(entry.singular, "verb", name)
                add(entry.genitive, "verb", name)
    for modality, text in MODAL_WORDS.items():
        for word in text.split():
            add(word, "modality", modality)
    return {phrase: tuple(values) for phrase, values in index.items() if phrase}


def _word_forms(form: Form) -> Iterator[str]:
    """Yield the single words that suggest this verb."""
    past_plural = form.past + ("n" if form.past.endswith("e") else "en")
    for word in (form.infinitive, form.present, form.past, past_plural):
        yield word
        if form.prefix and not form.apart:
            yield form.prefix + word
    yield form.participle.split()[-1]
    if form.prefix and not form.apart:
        yield form.prefix + "zu" + form.infinitive
