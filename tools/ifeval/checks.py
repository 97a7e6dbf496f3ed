"""Does an answer follow an instruction of IFEval? Strictly, by the package if-verifiable, and how nearly.

The strict checks are those of the benchmark (google-research, instruction_following_eval, Apache-2.0), as the package
`if-verifiable` has them. `nearness` is this project's own: where an instruction counts something, an answer that comes
closer to the count is nearer to it, so that two answers that both miss it can be compared.

Left out on purpose: the loose checks, and instructions that need what is not in the package: number_sentences and
capital_word_frequency need data that NLTK downloads, and response_language asks for languages that a small model does
not write (`UNCHECKED`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

Arguments = Mapping[str, Any]

UNCHECKED = frozenset(
    (
        "length_constraints:number_sentences",
        "change_case:capital_word_frequency",
        "language:response_language",
    )
)


class Graded(NamedTuple):
    """How an answer follows the instructions of its prompt, one entry for each.

    followed: strictly. nearness: from 0 to 1; 1 where it is followed.
    """

    followed: tuple[bool, ...]
    nearness: tuple[float, ...]


def grade(instructions: Sequence[str], arguments: Sequence[Arguments], answer: str) -> Graded:
    """Grade an answer; an empty one follows nothing, as in the benchmark.

    Args:
      instructions: names, such as "punctuation:no_comma".
      arguments: of each; None is left out, as the data set on the hub has all names everywhere.

    Raises:
      ValueError: the package is missing, or an instruction is unknown or one of `UNCHECKED`.
    """
    followed, near = [], []
    for name, given in zip(instructions, arguments, strict=True):
        values = {key: value for key, value in given.items() if value is not None}
        follows = bool(answer.strip() and _checker(name, json.dumps(values)).check_following(answer))
        followed.append(follows)
        near.append(1.0 if follows else nearness(name, values, answer) if answer.strip() else 0.0)
    return Graded(tuple(followed), tuple(near))


def score(graded: Graded, nearness_weight: float) -> float:
    """Return the mean over instructions of 1 where one is followed, else of `nearness_weight` times its nearness."""
    parts = [
        1.0 if follows else nearness_weight * near
        for follows, near in zip(graded.followed, graded.nearness, strict=True)
    ]
    return sum(parts) / len(parts)


@functools.cache
def _checker(name: str, arguments: str) -> Any:
    """Return the benchmark's checker of one instruction with its arguments, which are JSON."""
    registry = _registry()
    if name in UNCHECKED or name not in registry:
        raise ValueError(f"instruction {name!r} is not checked here; leave its prompts out")
    checker = registry[name](name)
    checker.build_description(**json.loads(arguments))
    return checker


@functools.cache
def _registry() -> Mapping[str, Any]:
    try:
        import langdetect
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise ValueError(
            f"the package {error.name} is missing; install the extra: python -m pip install"
            " 'xpo-jax[real]', or '.[real]' in a clone"
        ) from error
    langdetect.DetectorFactory.seed = 0  # or the same answer may be English once and not the next time
    registry: Mapping[str, Any] = INSTRUCTION_DICT
    return registry


# ---- how nearly ---------------------------------------------------------------------------------


def nearness(name: str, arguments: Arguments, answer: str) -> float:
    """Return how nearly an answer follows an instruction that it does not follow, from 0 to below 1.

    0 where the instruction has no degrees.
    """
    measure = _NEARNESS.get(name)
    return 0.0 if measure is None else min(float(measure(arguments, answer)), _BELOW_ONE)


_BELOW_ONE = 0.95


def _count(count: int, wanted: int, relation: str) -> float:
    """Return how near a count is to "at least", "less than" or exactly ("") what is wanted."""
    if relation == "at least":
        return count / wanted if wanted else 1.0
    if relation == "less than":
        return wanted / (count + 1)
    return max(0.0, 1 - abs(count - wanted) / wanted)


def _cased(answer: str, right: Callable[[str], bool]) -> float:
    letters = [character for character in answer if character.isalpha()]
    return sum(map(right, letters)) / len(letters) if letters else 0.0


def _words(arguments: Arguments, answer: str) -> float:
    count = len(re.findall(r"\w+", answer))
    return _count(count, arguments["num_words"], arguments["relation"])


def _keyword(arguments: Arguments, answer: str) -> float:
    count = len(re.findall(arguments["keyword"], answer, flags=re.IGNORECASE))
    return _count(count, arguments["frequency"], arguments["relation"])


def _letter(arguments: Arguments, answer: str) -> float:
    count = answer.lower().count(arguments["letter"].lower())
    return _count(count, arguments["let_frequency"], arguments["let_relation"])


def _existing(arguments: Arguments, answer: str) -> float:
    words = arguments["keywords"]
    return sum(bool(re.search(word, answer, re.IGNORECASE)) for word in words) / len(words)


def _forbidden(arguments: Arguments, answer: str) -> float:
    words = arguments["forbidden_words"]
    count = sum(len(re.findall(rf"\b{word}\b", answer, re.IGNORECASE)) for word in words)
    return 1 / (1 + count)


def _bullets(arguments: Arguments, answer: str) -> float:
    count = len(re.findall(r"^\s*(?:\*[^\*].*|-.*)$", answer, re.MULTILINE))
    return _count(count, arguments["num_bullets"], "")


def _highlights(arguments: Arguments, answer: str) -> float:
    return _count(len(re.findall(r"\*[^\n\*]+\*", answer)), arguments["num_highlights"], "at least")


def _placeholders(arguments: Arguments, answer: str) -> float:
    return _count(len(re.findall(r"\[.*?\]", answer)), arguments["num_placeholders"], "at least")


def _sections(arguments: Arguments, answer: str) -> float:
    count = len(re.findall(rf"\s?{arguments['section_spliter']}\s?\d+\s?", answer))
    return _count(count, arguments["num_sections"], "at least")


def _paragraphs(arguments: Arguments, answer: str) -> float:
    return _count(
        len([part for part in answer.split("***") if part.strip()]), arguments["num_paragraphs"], ""
    )


def _first_word(arguments: Arguments, answer: str) -> float:
    paragraphs = [part.strip() for part in answer.split("\n\n") if part.strip()]
    near = _count(len(paragraphs), arguments["num_paragraphs"], "")
    nth = paragraphs[arguments["nth_paragraph"] - 1 : arguments["nth_paragraph"]]
    begins = bool(nth) and nth[0].lower().lstrip("'\"").startswith(arguments["first_word"].lower())
    return (near + begins) / 2


def _repeated(arguments: Arguments, answer: str) -> float:
    prompt = arguments["prompt_to_repeat"].strip().lower()
    return Levenshtein.normalized_similarity(prompt, answer.strip().lower()[: len(prompt)])


def _ended(arguments: Arguments, answer: str) -> float:
    phrase = arguments["end_phrase"].strip().lower()
    text = answer.strip().strip('"').lower()
    return max(0.5 * (phrase in text), Levenshtein.normalized_similarity(phrase, text[-len(phrase) :]))


def _quoted(_: Arguments, answer: str) -> float:
    text = answer.strip()
    return (text.startswith('"') + text.endswith('"')) / 2 if len(text) > 1 else 0.0


def _title(_: Arguments, answer: str) -> float:
    return ("<<" in answer) / 2


def _two(_: Arguments, answer: str) -> float:
    longest = max((len(run) for run in re.findall(r"\*+", answer)), default=0)
    return min(longest, 6) / 12


def _json(_: Arguments, answer: str) -> float:
    text = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    return (text.startswith(("{", "[")) + text.endswith(("}", "]"))) / 2


_NEARNESS: Mapping[str, Callable[[Arguments, str], float]] = {
    "length_constraints:number_words": _words,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "keywords:existence": _existing,
    "keywords:frequency": _keyword,
    "keywords:letter_frequency": _letter,
    "keywords:forbidden_words": _forbidden,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:title": _title,
    "detectable_format:json_format": _json,
    "detectable_content:number_placeholders": _placeholders,
    "combination:repeat_prompt": _repeated,
    "combination:two_responses": _two,
    "startend:end_checker": _ended,
    "startend:quotation": _quoted,
    "change_case:english_lowercase": lambda _, answer: _cased(answer, str.islower),
    "change_case:english_capital": lambda _, answer: _cased(answer, str.isupper),
    "punctuation:no_comma": lambda _, answer: 1 / (1 + answer.count(",")),
}
