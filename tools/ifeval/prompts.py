"""The prompts of IFEval that a short answer can meet, split into those to train on and those held out.

prompts.jsonl holds 300 of the benchmark's 541 prompts as they are. A prompt is chosen if a short answer can meet every
one of its instructions (`is_short`); the limits suit answers of some 50 words. The split is drawn once with a fixed
seed, the same for every run, so that no run is evaluated on what another was trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checks import UNCHECKED

FILE = Path(__file__).with_name("prompts.jsonl")
HELD_OUT = 91
SPLIT_SEED = 0

# The most of each that a short answer can hold; "less than" is no limit.
_AT_MOST: Mapping[str, tuple[str, int]] = {
    "length_constraints:number_words": ("num_words", 40),
    "length_constraints:number_paragraphs": ("num_paragraphs", 3),
    "length_constraints:nth_paragraph_first_word": ("num_paragraphs", 3),
    "keywords:frequency": ("frequency", 3),
    "keywords:letter_frequency": ("let_frequency", 10),
    "detectable_format:number_bullet_lists": ("num_bullets", 4),
    "detectable_format:number_highlighted_sections": ("num_highlights", 4),
    "detectable_format:multiple_sections": ("num_sections", 2),
    "detectable_content:number_placeholders": ("num_placeholders", 4),
}
_AT_MOST_WORDS: Mapping[str, tuple[str, int]] = {
    "combination:repeat_prompt": ("prompt_to_repeat", 30),
    "startend:end_checker": ("end_phrase", 12),
}


def is_short(instruction: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether an answer of some 50 words can follow an instruction, and it can be checked."""
    if instruction in UNCHECKED:
        return False
    if "less than" in (arguments.get("relation"), arguments.get("let_relation")):
        return True
    if instruction in _AT_MOST:
        name, most = _AT_MOST[instruction]
        return bool(arguments[name] <= most)
    if instruction in _AT_MOST_WORDS:
        name, most = _AT_MOST_WORDS[instruction]
        return len(arguments[name].split()) <= most
    return True


def chosen() -> list[dict[str, Any]]:
    """Return the rows whose every instruction is short, in the order of the file."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if all(map(is_short, row["instruction_id_list"], row["kwargs"]))]


def split() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows to train on and those held out, which have no prompt in common."""
    rows = chosen()
    random.Random(SPLIT_SEED).shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def train() -> list[dict[str, Any]]:
    """Return the rows to train on: a source, as `config.data.train` names it."""
    return split()[0]


def held_out() -> list[dict[str, Any]]:
    """Return the held-out rows: a source, as `config.data.held_out` names it."""
    return split()[1]
