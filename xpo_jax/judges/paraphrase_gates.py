"""Gates: whether an answer may count as a paraphrase at all, before anything is measured.

A gate takes (source, answer), both plain text, and returns "" or the reason why it refuses.

`embedded` is hard and exact: it knows the embedded German grammar and accepts only its sentences.
`general` stands in for any other text. It sees what can be counted: numbers, acronyms, names in two or
more parts, negating words, brackets and quotes, repetition, the shape of a sentence, the share of the
source's content words that come back, and whether length and letters stay within a band. It does not see
grammar or meaning: reordered words, a swapped subject and object, a wrong ending, a synonym that does not
fit, and an honest paraphrase with other content words than the source are all beyond it. For other
languages than German its lists (negations) are only part of the truth.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

from rapidfuzz.distance import Indel

from xpo_jax.embedded.german import parser
from xpo_jax.io.text import shorten
from xpo_jax.judges.contract import JudgeError

Gate = Callable[[str, str], str]

WORD = re.compile(r"\w+(?:[-'’]\w+)*")
NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
MARKUP = re.compile(r"<[/|a-zA-Z]|\|>|```")
SENTENCE_END = re.compile(r"[.!?…:;]+[\"'“”»«)\]]*$")
NEGATIONS = re.compile(
    r"(?:nicht|nichts|nie|niemals|niemand(?:en|em|es)?|nirgends|weder|kein(?:e[nmrs]?)?)", re.IGNORECASE
)
BRACKETS = "()[]{}"
QUOTES = re.compile('["„“”»«]')
CONTENT_LETTERS = 6  # a lower-case word this long carries content
STEM_LETTERS = 5  # words that begin alike count as one word, so that endings may change
RUN_WORDS = 3  # no run of so many words may come twice


def letters(text: str) -> str:
    """Only the letters, without case: what distances are measured on."""
    return "".join(character for character in text.casefold() if character.isalpha())


def similarity(a: str, b: str) -> float:
    """Normalised Indel similarity: 1 for equal strings, 0 for strings without a common letter."""
    return float(Indel.normalized_similarity(a, b))


def embedded(source: str, answer: str) -> str:
    """The hard gate of the embedded German world.

    Raises:
        JudgeError: the source is not a sentence of that world, so nothing could pass.
    """
    if parser.parse(source) is None:
        raise JudgeError(
            f"the prompt's input {shorten(source, 60)!r} is not a sentence of the embedded German grammar;"
            " set judge.gate to 'general' for other text"
        )
    return parser.difference(source, answer)


def general(
    *,
    min_kept: float,
    min_similarity: float,
    max_similarity: float,
    min_length_ratio: float,
    max_length_ratio: float,
) -> Gate:
    """Build the gate for any text.

    Args:
        min_kept: least share of the source's content words that must come back, in [0, 1].
        min_similarity, max_similarity: band for the Indel similarity of the letters; 1 lets copies pass.
        min_length_ratio, max_length_ratio: band for (words out + 3) / (words in + 3).
    """
    for name, low, high in (
        ("similarity", min_similarity, max_similarity),
        ("length_ratio", min_length_ratio, max_length_ratio),
    ):
        if not 0 <= low < high:
            raise ValueError(f"judge.min_{name} {low} and judge.max_{name} {high} must be 0 <= min < max")
    if not 0 <= min_kept <= 1:
        raise ValueError(f"judge.min_kept is {min_kept}; it must be a share from 0 to 1")

    def gate(source: str, answer: str) -> str:
        reason = _shape(source, answer) or _kept_exactly(source, answer) or _repeats(source, answer)
        if reason:
            return reason
        if _kept_share(source, answer) < min_kept:
            return "too few of the input's content words"
        ratio = (len(WORD.findall(answer)) + 3) / (len(WORD.findall(source)) + 3)
        if not min_length_ratio <= ratio <= max_length_ratio:
            return "too short" if ratio < min_length_ratio else "too long"
        alike = similarity(letters(source), letters(answer))
        if not min_similarity <= alike <= max_similarity:
            return "too far from the input" if alike < min_similarity else "too close to the input"
        return ""

    return gate


def _shape(source: str, answer: str) -> str:
    if not letters(answer) and letters(source):
        return "no words"
    if "\n" in answer.strip() and "\n" not in source.strip():
        return "several lines"
    if MARKUP.search(answer) and not MARKUP.search(source):
        return "markup"
    if SENTENCE_END.search(source) and not SENTENCE_END.search(answer):
        return "does not end as a sentence"
    if source[:1].isupper() and answer[:1].islower():
        return "does not begin as a sentence"
    if any(source.count(mark) != answer.count(mark) for mark in BRACKETS):
        return "brackets differ"
    if len(QUOTES.findall(source)) != len(QUOTES.findall(answer)):
        return "quotation marks differ"
    return ""


def _kept_exactly(source: str, answer: str) -> str:
    if Counter(NUMBER.findall(source)) != Counter(NUMBER.findall(answer)):
        return "numbers differ"
    said = [word.casefold() for word in WORD.findall(answer)]
    for name in _names(source):
        stem = name.casefold()[: max(3, len(name) - 2)]
        if not any(word.startswith(stem) for word in said):
            return "a name is missing"
    denies, said_no = (any(map(NEGATIONS.fullmatch, WORD.findall(text))) for text in (source, answer))
    return "" if denies == said_no else "negation differs"


def _names(text: str) -> list[str]:
    """What is surely a name in German text, where every noun has a capital.

    Acronyms, words with a capital or a digit inside, and two or more words with capitals in a row that are
    not the start of a sentence. A single name ("Müller") looks like any noun and counts as a content word.
    """
    names: list[str] = []
    run: list[str] = []
    start = True
    previous_end = 0
    for match in WORD.finditer(text):
        word = match.group()
        between = text[previous_end : match.start()]
        start = start or bool(re.search(r"[.!?:;…\"„“»]", between))
        if run and (start or between.strip() or not word[0].isupper()):
            names += run if len(run) > 1 else []
            run = []
        shouted = word.isupper() and 2 <= len(word) <= 5 and not text.isupper()
        odd = any(character.isupper() for character in word[1:]) and not word.isupper() and "-" not in word
        if shouted or odd or (word[0].isalpha() and any(character.isdigit() for character in word)):
            names.append(word)
        elif word[0].isupper() and not start and len(word) > 1:
            run.append(word)
        start, previous_end = False, match.end()
    return names + (run if len(run) > 1 else [])


def _repeats(source: str, answer: str) -> str:
    runs = [
        Counter(tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1))
        for words in ([word.casefold() for word in WORD.findall(text)] for text in (source, answer))
    ]
    if any(times > max(1, runs[0][run]) for run, times in runs[1].items()):
        return "repeats itself"
    said = [word.casefold() for word in WORD.findall(answer)]
    given = Counter(word.casefold() for word in WORD.findall(source))
    if any(a == b and given[a] < 2 for a, b in pairwise(said)):
        return "repeats a word"
    if any(times > given[word] + 1 for word, times in Counter(said).items() if len(word) >= CONTENT_LETTERS):
        return "repeats a word"
    return ""


def _content(text: str) -> set[str]:
    """Stems of the words that carry content: long ones, and capitals inside a sentence."""
    stems = set()
    for index, word in enumerate(WORD.findall(text)):
        if word[0].isalpha() and (
            len(word) >= CONTENT_LETTERS or (index > 0 and word[0].isupper() and len(word) > 3)
        ):
            stems.add(word.casefold()[:STEM_LETTERS])
    return stems


def _kept_share(source: str, answer: str) -> float:
    wanted = _content(source)
    said = {word.casefold()[:STEM_LETTERS] for word in WORD.findall(answer)}
    return len(wanted & said) / len(wanted) if wanted else 1.0
