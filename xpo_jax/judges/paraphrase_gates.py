"""Gates decide whether an answer may count as a paraphrase at all, before anything is measured.

A gate takes (source, answer), both plain text, and returns "" or the reason why it rejects the answer.

`embedded` is exact: it parses the embedded German grammar and accepts only sentences with the same meaning.
`general` approximates this for any other text. It checks what can be counted: numbers, acronyms, names of two or more
words, negations, brackets and quotation marks, repetition, the form of a sentence, the fraction of the source's content
words that recur, and whether length and similarity are within a band. It does not check grammar or meaning: it misses
reordered words, a swapped subject and object, a wrong ending and a synonym that does not fit, and it rejects a correct
paraphrase that has other content words than the source. Its list of negations is German only.
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
CONTENT_CHARACTERS = 6  # a lower-case word of at least this length is a content word
STEM_CHARACTERS = 5  # words with the same beginning count as the same word, so that endings may change
RUN_WORDS = 3  # no sequence of this many words may occur twice


def letters(text: str) -> str:
    """Return the letters of the text, case-folded; distances are measured on these."""
    return "".join(character for character in text.casefold() if character.isalpha())


def similarity(a: str, b: str) -> float:
    """Return the normalized Indel similarity: 1 for equal strings, 0 for strings without a common character."""
    return float(Indel.normalized_similarity(a, b))


def embedded(source: str, answer: str) -> str:
    """Reject any answer that is not a sentence of the embedded German grammar with the source's meaning.

    Raises:
        JudgeError: the source is not a sentence of that grammar, so nothing could pass.
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
        min_kept: minimum fraction of the source's content words that must recur, in [0, 1].
        min_similarity, max_similarity: band for the Indel similarity of the letters; a maximum of 1 lets copies pass.
        min_length_ratio, max_length_ratio: band for (words of the answer + 3) / (words of the source + 3).

    Raises:
        ValueError: limits out of range; the field comes first.
    """
    for name, low, high in (
        ("similarity", min_similarity, max_similarity),
        ("length_ratio", min_length_ratio, max_length_ratio),
    ):
        if not 0 <= low < high:
            raise ValueError(f"judge.min_{name} {low} and judge.max_{name} {high} must be 0 <= min < max")
    if not 0 <= min_kept <= 1:
        raise ValueError(f"judge.min_kept is {min_kept}; it must be a fraction from 0 to 1")

    def gate(source: str, answer: str) -> str:
        reason = _shape(source, answer) or _exact_content(source, answer) or _repetition(source, answer)
        if reason:
            return reason
        if _recurring_fraction(source, answer) < min_kept:
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


def _exact_content(source: str, answer: str) -> str:
    if Counter(NUMBER.findall(source)) != Counter(NUMBER.findall(answer)):
        return "numbers differ"
    words = [word.casefold() for word in WORD.findall(answer)]
    for name in _names(source):
        stem = name.casefold()[: max(3, len(name) - 2)]
        if not any(word.startswith(stem) for word in words):
            return "a name is missing"
    negated = [any(map(NEGATIONS.fullmatch, WORD.findall(text))) for text in (source, answer)]
    return "" if negated[0] == negated[1] else "negation differs"


def _names(text: str) -> list[str]:
    """Return the words of a German text that are certainly names, although every noun is capitalized.

    These are acronyms, words with an inner capital or digit, and two or more capitalized words in a row that do not
    begin a sentence. A single name ("Müller") looks like a noun, and counts as a content word.
    """
    names: list[str] = []
    run: list[str] = []
    starts_sentence = True
    previous_end = 0
    for match in WORD.finditer(text):
        word = match.group()
        between = text[previous_end : match.start()]
        starts_sentence = starts_sentence or bool(re.search(r"[.!?:;…\"„“»]", between))
        if run and (starts_sentence or between.strip() or not word[0].isupper()):
            names += run if len(run) > 1 else []
            run = []
        is_acronym = word.isupper() and 2 <= len(word) <= 5 and not text.isupper()
        has_inner_capital = (
            any(character.isupper() for character in word[1:]) and not word.isupper() and "-" not in word
        )
        has_digit = word[0].isalpha() and any(character.isdigit() for character in word)
        if is_acronym or has_inner_capital or has_digit:
            names.append(word)
        elif word[0].isupper() and not starts_sentence and len(word) > 1:
            run.append(word)
        starts_sentence, previous_end = False, match.end()
    return names + (run if len(run) > 1 else [])


def _repetition(source: str, answer: str) -> str:
    runs = [
        Counter(tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1))
        for words in ([word.casefold() for word in WORD.findall(text)] for text in (source, answer))
    ]
    if any(times > max(1, runs[0][run]) for run, times in runs[1].items()):
        return "repeats itself"
    words = [word.casefold() for word in WORD.findall(answer)]
    in_source = Counter(word.casefold() for word in WORD.findall(source))
    if any(a == b and in_source[a] < 2 for a, b in pairwise(words)):
        return "repeats a word"
    counts = Counter(words).items()
    if any(times > in_source[word] + 1 for word, times in counts if len(word) >= CONTENT_CHARACTERS):
        return "repeats a word"
    return ""


def _content(text: str) -> set[str]:
    """Return the stems of the content words: long ones, and capitalized ones inside a sentence."""
    stems = set()
    for index, word in enumerate(WORD.findall(text)):
        if word[0].isalpha() and (
            len(word) >= CONTENT_CHARACTERS or (index > 0 and word[0].isupper() and len(word) > 3)
        ):
            stems.add(word.casefold()[:STEM_CHARACTERS])
    return stems


def _recurring_fraction(source: str, answer: str) -> float:
    content = _content(source)
    stems = {word.casefold()[:STEM_CHARACTERS] for word in WORD.findall(answer)}
    return len(content & stems) / len(content) if content else 1.0
