"""The embedded German world: hand-written German, parsing and generating, and what the corpus guarantees."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter

import pytest

from xpo_jax.embedded.german import inflection, lexicon
from xpo_jax.embedded.german.causes import CAUSES
from xpo_jax.embedded.german.corpus import prompts, sft_pair
from xpo_jax.embedded.german.grammar import count, is_held_out, random_meaning, realise, variants
from xpo_jax.embedded.german.lexicon import AGENTS, MANNERS, OBJECTS, ORGANISATIONS, PLACES, TIMES
from xpo_jax.embedded.german.meaning import Meaning, is_coherent
from xpo_jax.embedded.german.parser import _candidates, _matches, _words, difference, parse, same_meaning
from xpo_jax.embedded.german.verbs import VERBS

# Written by hand, not by the grammar: all sentences of a group have the same meaning.
RIGHT = [
    [
        "Die Chefin lehnte das Angebot gestern höflich ab.",
        "Gestern wies die Chefin das Angebot höflich zurück.",
        "Das Angebot wurde am gestrigen Tag von der Chefin in höflicher Form abgelehnt.",
        "Die Offerte ist gestern von der Chefin auf höfliche Weise zurückgewiesen worden.",
        "Am gestrigen Tag hat die Chefin höflich die Offerte abgelehnt.",
        "Höflich lehnte die Chefin gestern das Angebot ab.",
    ],
    [
        "Der Mechaniker repariert morgen das kaputte Auto.",
        "Das kaputte Auto wird morgen vom Mechaniker repariert.",
        "Am morgigen Tag wird der Mechaniker den defekten Wagen instand setzen.",
        "Morgen setzt der Mechaniker den defekten Wagen instand.",
        "Die Reparatur des kaputten Autos wird morgen vom Mechaniker durchgeführt werden.",
        "Den defekten Wagen setzt der Mechaniker morgen instand.",
    ],
    [
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Wegen Krankheit hat der Kunde das Schreiben nicht gelesen.",
        "Der Kunde war krank, deshalb las er den Brief nicht durch.",
        "Weil der Kunde erkrankt war, hat er den Brief nicht gelesen.",
        "Vom Kunden ist der Brief krankheitsbedingt nicht gelesen worden.",
        "Der Kunde war erkrankt, sodass er das Schreiben nicht durchgelesen hat.",
    ],
    [
        "Die Ärzte kauften vor zwei Tagen kein Fahrrad.",
        "Vorgestern haben die Mediziner kein Rad erworben.",
        "Von den Ärzten wurde vorgestern kein Fahrrad gekauft.",
        "Vor zwei Tagen ist von den Medizinern kein Fahrrad gekauft worden.",
    ],
    [
        "Die Ingenieurin ist nicht in der Lage, die Tür zu öffnen.",
        "Die Ingenieurin kann die Tür nicht aufmachen.",
        "Die Ingenieurin ist außerstande, die Tür aufzumachen.",
        "Von der Ingenieurin kann die Tür nicht geöffnet werden.",
    ],
    [
        "Der Nachbar hat vor, bald einen alten Computer zu verkaufen.",
        "Der Nachbar will demnächst einen alten Rechner veräußern.",
        "Der Nachbar beabsichtigt, in Kürze einen alten Computer zu veräußern.",
        "Bald möchte der Nachbar einen alten Rechner verkaufen.",
    ],
    [
        "Die Köchin muss heute Abend den Vertrag prüfen.",
        "Am heutigen Abend hat die Köchin den Vertrag zu überprüfen.",
        "Der Vertrag muss heute Abend von der Köchin kontrolliert werden.",
    ],
    [
        "Es regnete stark, deshalb verschob die Bürgermeisterin das Fest.",
        "Die Bürgermeisterin hat die Feier wegen des heftigen Regens verlegt.",
        "Da es heftig regnete, wurde das Fest von der Bürgermeisterin verschoben.",
        "Die Feier verlegte die Bürgermeisterin, denn es hat stark geregnet.",
    ],
    [
        "Zwei Studenten putzen jeden Tag gemeinsam die Treppe.",
        "Täglich wird die Treppe von zwei Studenten zusammen gereinigt.",
        "Die Treppe säubern zwei Studenten Tag für Tag gemeinsam.",
    ],
    [
        "Das Unternehmen hat die Rechnungen pünktlich bezahlt.",
        "Die Rechnungen wurden von der Firma fristgerecht beglichen.",
        "Termingerecht zahlte die Firma die Rechnungen.",
    ],
]

# (source, an answer that is wrong, what is wrong with it)
WRONG = [
    ("Die Chefin lehnte das Angebot gestern ab.", "Die Chefin lehnte den Angebot gestern ab.", "gender"),
    ("Die Chefin lehnte das Angebot gestern ab.", "Die Chefin lehnte gestern das Angebot an.", "prefix"),
    ("Die Chefin lehnte das Angebot gestern ab.", "Die Chefin lehnte gestern das Angebot.", "prefix lost"),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin ablehnte gestern das Angebot.",
        "prefix not parted",
    ),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin wies gestern das Angebot ab.",
        "prefixes mixed",
    ),
    ("Die Chefin lehnte das Angebot gestern ab.", "Gestern die Chefin lehnte das Angebot ab.", "verb third"),
    ("Die Chefin lehnte das Angebot gestern ab.", "Die Chefin nahm das Angebot gestern an.", "other verb"),
    ("Die Chefin lehnte das Angebot gestern ab.", "Der Chef lehnte das Angebot gestern ab.", "other agent"),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin lehnte den Vorschlag gestern ab.",
        "other object",
    ),
    ("Die Chefin lehnte das Angebot gestern ab.", "Die Chefin lehnte die Angebote gestern ab.", "number"),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin lehnte gestern ein Angebot ab.",
        "definiteness",
    ),
    ("Die Chefin lehnte das Angebot gestern ab.", "Die Chefin lehnte das Angebot ab.", "time dropped"),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin lehnte das Angebot vorgestern ab.",
        "other time",
    ),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin lehnte das Angebot gestern nicht ab.",
        "negation added",
    ),
    ("Die Chefin lehnte das Angebot gestern ab.", "Die Chefin lehnt das Angebot ab.", "tense"),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin hat das Angebot gestern abgelehnt",
        "no full stop",
    ),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "die Chefin hat das Angebot gestern abgelehnt.",
        "no capital",
    ),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin hat das angebot gestern abgelehnt.",
        "noun's capital",
    ),
    ("Die Chefin lehnte das Angebot gestern ab.", "Die Chefin hat gestern abgelehnt das Angebot.", "bracket"),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin ist das Angebot gestern abgelehnt.",
        "auxiliary",
    ),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Das Angebot hat gestern von der Chefin abgelehnt worden.",
        "auxiliary",
    ),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Das Angebot wurde gestern von die Chefin abgelehnt.",
        "case after von",
    ),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Das Angebot wurde die Chefin gestern abgelehnt.",
        "von lost",
    ),
    ("Die Chefin lehnte das Angebot gestern ab.", "Das Angebot lehnte gestern ab.", "agent lost"),
    (
        "Die Chefin lehnte das Angebot gestern ab.",
        "Die Chefin wurde gestern vom Angebot abgelehnt.",
        "roles swapped",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Den Kunde las den Brief wegen Krankheit nicht.",
        "case",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Vom Kunde wurde der Brief wegen Krankheit nicht gelesen.",
        "weak noun",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Der Kunde las den Brief nicht, weil er war krank.",
        "verb last",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Der Kunde las den Brief nicht, denn er krank war.",
        "denn",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Der Kunde las den Brief nicht, weil sie krank war.",
        "pronoun",
    ),
    ("Der Kunde las den Brief nicht, weil er krank war.", "Der Kunde las den Brief nicht.", "cause dropped"),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Der Kunde las den Brief, weil er krank war.",
        "negation dropped",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Der Kunde las nicht keinen Brief, weil er krank war.",
        "double negation",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Der Kunde las den Brief nicht weil er krank war.",
        "comma",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Weil der Kunde krank war, er las den Brief nicht.",
        "verb second",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Der Kunde war krank, deshalb er las den Brief nicht.",
        "deshalb",
    ),
    (
        "Der Kunde las den Brief nicht, weil er krank war.",
        "Der Kunde las nicht den Brief, weil er krank war.",
        "nicht",
    ),
    ("Die Ärzte kauften kein Fahrrad.", "Die Ärzte kauften nicht ein Fahrrad.", "kein"),
    ("Die Ärzte kauften kein Fahrrad.", "Die Ärzte kaufte kein Fahrrad.", "agreement"),
    ("Die Ärzte kauften kein Fahrrad.", "Von den Ärzte wurde kein Fahrrad gekauft.", "dative plural"),
    (
        "Die Ärzte kauften kein Fahrrad.",
        "Von den Ärzten wurden kein Fahrrad gekauft.",
        "agreement in the passive",
    ),
    ("Die Ärzte kauften kein Fahrrad.", "Die Ärzte haben kein Fahrrad gekaufen.", "participle"),
    (
        "Es regnete stark, deshalb verschob der Chef das Fest.",
        "Der Chef verschob das Fest wegen dem starken Regen.",
        "genitive",
    ),
    (
        "Es regnete stark, deshalb verschob der Chef das Fest.",
        "Der Chef verschob das Fest wegen eines Streiks.",
        "other cause",
    ),
    (
        "Der Mechaniker repariert morgen das kaputte Auto.",
        "Morgen repariert der Mechaniker den kaputten Auto.",
        "gender",
    ),
    (
        "Der Mechaniker repariert morgen das kaputte Auto.",
        "Morgen repariert der Mechaniker das kaputten Auto.",
        "ending",
    ),
    (
        "Der Mechaniker repariert morgen das kaputte Auto.",
        "Morgen repariert der Mechaniker das Auto.",
        "adjective lost",
    ),
    (
        "Der Mechaniker repariert morgen das kaputte Auto.",
        "Der Mechaniker wird morgen das kaputte Auto repariert.",
        "future and passive mixed",
    ),
    (
        "Der Mechaniker repariert morgen das kaputte Auto.",
        "Der Mechaniker reparierte morgen das kaputte Auto.",
        "tense",
    ),
    (
        "Die Ingenieurin ist in der Lage, die Tür zu öffnen.",
        "Die Ingenieurin ist in der Lage, die Tür zu aufmachen.",
        "zu",
    ),
    (
        "Die Ingenieurin ist in der Lage, die Tür zu öffnen.",
        "Die Ingenieurin kann die Tür zu öffnen.",
        "zu after modal",
    ),
    (
        "Die Ingenieurin ist in der Lage, die Tür zu öffnen.",
        "Die Ingenieurin muss die Tür öffnen.",
        "other modal",
    ),
]


def random_meanings(seed: int, n: int) -> list[Meaning]:
    rng = random.Random(seed)
    return [random_meaning(rng) for _ in range(n)]


@pytest.mark.parametrize("group", RIGHT, ids=lambda group: group[0])
def test_hand_written_paraphrases_are_accepted(group: list[str]) -> None:
    refused = [
        (source, answer, difference(source, answer))
        for source in group
        for answer in group
        if not same_meaning(source, answer)
    ]
    assert not refused
    assert len({parse(sentence) for sentence in group}) == 1


@pytest.mark.parametrize(("source", "answer", "fault"), WRONG)
def test_hand_written_faults_are_refused(source: str, answer: str, fault: str) -> None:
    assert parse(source) is not None
    assert not same_meaning(source, answer), fault
    assert difference(source, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Gestern  lehnte die Chefin das Angebot ab.",
        "Gestern lehnte die Chefin das Angebot ab .",
        "Gestern lehnte die Chefin das Angebot ab..",
        " Gestern lehnte die Chefin das Angebot ab.",
        "Gestern lehnte die Chefin das Angebot ab. ",
        "Gestern, lehnte die Chefin das Angebot ab.",
        "Gestern lehnte die Chefin das Angebot ab!",
        "Gestern lehnte die Chefin das Angebot\nab.",
        "GESTERN lehnte die Chefin das Angebot ab.",
    ],
)
def test_badly_written_sentences_are_refused(answer: str) -> None:
    assert not same_meaning("Die Chefin lehnte das Angebot gestern ab.", answer)


def test_groups_do_not_mean_each_other() -> None:
    assert sum(len(group) for group in RIGHT) >= 40 and len(WRONG) >= 40
    meanings = [parse(group[0]) for group in RIGHT]
    assert len(set(meanings)) == len(RIGHT)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Die Chefin nahm das Angebot gestern an.", "other verb"),
        ("Der Chef lehnte das Angebot gestern ab.", "other agent"),
        ("Die Chefin lehnte die Angebote gestern ab.", "other determiner, number or adjective of the object"),
        ("Die Chefin lehnte das Angebot gestern nicht ab.", "other negation"),
        ("Die Chefin lehnte das Angebot ab.", "time dropped"),
        ("Die Chefin lehnte gestern das Angebot.", "not a sentence of the grammar"),
        ("", "not a sentence of the grammar"),
    ],
)
def test_the_reason_names_the_first_difference(answer: str, reason: str) -> None:
    assert difference("Die Chefin lehnte das Angebot gestern ab.", answer) == reason


@pytest.mark.parametrize(
    ("concept", "determiner", "plural", "case", "adjective", "expected"),
    [
        (
            "car",
            "definite",
            False,
            "acc",
            "expensive",
            {"das teure Auto ", "den teuren Wagen ", "das kostspielige Auto ", "den kostspieligen Wagen "},
        ),
        ("letter", "indefinite", False, "nom", "new", {"ein neuer Brief ", "ein neues Schreiben "}),
        ("letter", "indefinite", False, "gen", "new", {"eines neuen Briefes ", "eines neuen Schreibens "}),
        ("letter", "no", True, "acc", "new", {"keine neuen Briefe ", "keine neuen Schreiben "}),
        ("book", "bare", True, "nom", "old", {"alte Bücher "}),
        ("book", "all", True, "acc", "old", {"alle alten Bücher ", "sämtliche alten Bücher "}),
        ("book", "many", True, "acc", "old", {"viele alte Bücher ", "zahlreiche alte Bücher "}),
        ("result", "definite", False, "gen", None, {"des Ergebnisses ", "des Resultats "}),
    ],
)
def test_noun_phrases(
    concept: str, determiner: str, plural: bool, case: str, adjective: str | None, expected: set[str]
) -> None:
    assert set(inflection.object_phrases(concept, determiner, plural, case, adjective)) == expected


@pytest.mark.parametrize(
    ("concept", "determiner", "plural", "expected"),
    [
        ("customer_m", "definite", False, {"vom Kunden "}),
        ("farmer_m", "indefinite", False, {"von einem Landwirt ", "von einem Bauern "}),
        ("doctor_m", "two", True, {"von zwei Ärzten ", "von zwei Medizinern "}),
        ("club", "definite", True, {"von den Vereinen ", "von den Klubs "}),
        ("doctor_f", "indefinite", False, {"von einer Ärztin ", "von einer Medizinerin "}),
    ],
)
def test_agents_of_the_passive(concept: str, determiner: str, plural: bool, expected: set[str]) -> None:
    assert set(inflection.by_agent_phrases(concept, determiner, plural)) == expected


def test_there_and_back() -> None:
    rng = random.Random(1)
    for meaning in random_meanings(1, 2000):
        sentence = realise(meaning, rng)
        assert parse(sentence) == meaning, sentence


def test_no_sentence_has_two_meanings() -> None:
    rng = random.Random(2)
    meanings = random_meanings(2, 1000)
    assert all(map(is_coherent, meanings))
    # "die Zeit reichte nicht" denies nothing
    no_time = [m for m in meanings if m.cause == "no_time" and not m.negated]
    for meaning in [*meanings, *no_time * 20]:
        words = _words(realise(meaning, rng))
        assert words is not None
        assert [other for other in _candidates(words) if _matches(other, words)] == [meaning]


def test_all_sentences_of_small_meanings_differ_and_are_counted() -> None:
    checked = 0
    for meaning in random_meanings(3, 60):
        if count(meaning) > 400:
            continue
        sentences: list[str] = []
        for variant in (variant for group in variants(meaning) for voice in group for variant in voice):
            for pattern in variant.patterns:
                prefixes = [""]
                for letter in pattern:
                    prefixes = [start + phrase for start in prefixes for phrase in variant.phrases[letter]]
                sentences += prefixes
        assert len(sentences) == count(meaning)
        repeated = [s for s, times in Counter(sentences).items() if times > 1]
        assert len(set(sentences)) == len(sentences), repeated[:3]
        checked += 1
    assert checked > 15


def test_median_number_of_paraphrases_and_length() -> None:
    meanings = random_meanings(4, 2000)
    rng = random.Random(4)
    lengths = [len(realise(meaning, rng).split()) for meaning in meanings]
    assert statistics.median(map(count, meanings)) >= 450
    assert min(lengths) >= 4 and max(lengths) <= 21 and 8 <= statistics.median(lengths) <= 12


def test_size_of_the_world() -> None:
    assert len(VERBS) >= 28 and len(AGENTS) >= 35 and len(OBJECTS) >= 48
    assert sum(map(len, TIMES.values())) >= 17 and len(MANNERS) >= 8 and len(PLACES) >= 6
    drawn = random_meanings(5, 6000)
    assert {meaning.verb for meaning in drawn} == set(VERBS)
    assert {meaning.object.concept for meaning in drawn} == set(OBJECTS)
    assert {meaning.agent.concept for meaning in drawn} == set(AGENTS)
    assert {meaning.cause for meaning in drawn} == {None, *CAUSES}
    assert {meaning.place for meaning in drawn} == {None, *PLACES}
    assert {meaning.manner for meaning in drawn} == {None, *MANNERS}


def test_lexicon_refers_to_itself_only() -> None:
    for name, verb in VERBS.items():
        assert set(verb.agents) <= set(AGENTS), name
        assert set(verb.objects) <= set(OBJECTS), name
        assert set(verb.manners) <= set(MANNERS) and set(verb.places) <= set(PLACES), name
        assert set(verb.reasons + verb.obstacles) <= set(CAUSES), name
        assert set(verb.adjectives) <= set(lexicon.ADJECTIVES), name
        assert len(verb.forms) >= 2, name
    assert set(lexicon.OBJECT_ADJECTIVES) <= set(OBJECTS)
    for table in (AGENTS, OBJECTS):
        words = Counter(noun.singular for nouns in table.values() for noun in nouns)
        assert max(words.values()) == 1
    for nouns in (nouns for agent, nouns in AGENTS.items() if agent not in ORGANISATIONS):
        assert len({noun.gender for noun in nouns}) == 1  # one pronoun serves all synonyms


def test_a_heap_of_words_is_refused_at_once() -> None:
    rng = random.Random(6)
    words = [word for meaning in random_meanings(6, 300) for word in realise(meaning, rng)[:-1].split()]
    parse("Der Arzt liest das Buch.")  # builds the index
    start = time.perf_counter()
    for length in (10, 20, 29, 60, 400):
        for _ in range(20):
            heap = " ".join(rng.choices(words, k=length))
            assert parse(heap[:1].upper() + heap[1:] + ".") is None
    assert time.perf_counter() - start < 5  # seconds; it takes 0.03


def test_corpus_holds_out_meanings() -> None:
    train, held_out = prompts(7, 400, 100)
    assert (len(train), len(held_out)) == (400, 100)
    sentences = [row["input"] for row in train + held_out]
    assert len(set(sentences)) == 500
    held_out_flags = [is_held_out(meaning) for meaning in map(parse, sentences) if meaning is not None]
    assert held_out_flags == [False] * 400 + [True] * 100
    assert prompts(7, 400, 100) == (train, held_out)
    assert prompts(8, 400, 100) != (train, held_out)
    share = sum(map(is_held_out, random_meanings(8, 4000))) / 4000
    assert 0.08 < share < 0.12


def test_pairs_are_different_sentences_of_one_meaning_not_held_out() -> None:
    rng = random.Random(9)
    for _ in range(300):
        source, target = sft_pair(rng)
        meaning = parse(source)
        assert meaning is not None and parse(target) == meaning and source != target
        assert not is_held_out(meaning)


def test_a_meaning_is_hashable_and_json() -> None:
    meaning = random_meanings(10, 1)[0]
    assert meaning in {meaning}
    assert json.loads(json.dumps(meaning.as_json()))["agent"]["concept"] == meaning.agent.concept


def test_the_same_in_every_process() -> None:
    """Hash seeds must have no effect: the sentences and the held-out meanings are the same everywhere."""
    program = (
        "from xpo_jax.embedded.german.corpus import prompts; import hashlib;"
        "print(hashlib.sha256(repr(prompts(3, 60, 20)).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(digests) == 1
