"""Answers of a model on disk, a file each, named by the hash of all that decides an answer.

Files are replaced whole, so several processes may share a folder; one that is damaged is known by its sum and not used.
Left out on purpose: the questions themselves, failures, and any limit of size or age.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xpo_jax.judges.completion_parsing import Masses
from xpo_jax.judges.contract import JudgeError


class AnswerCache:
    """Probabilities of two labels, by question; `damaged` counts the entries that could not be read."""

    def __init__(self, folder: str, **decides: Any):
        """Take a folder, which is made when it is needed, and what decides an answer besides the question.

        Raises:
          ValueError: it is there and no folder.
        """
        self._folder, self._decides, self.damaged = Path(folder), decides, 0
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"cache: {folder} is no folder; name another, or None")

    def get(self, question: Mapping[str, Any]) -> Masses | None:
        """The answer, if there is one that can be read."""
        name, path = self._place(question)
        try:
            entry = json.loads(path.read_bytes())
            a, b = map(float, entry["masses"])
            if entry == _entry(name, (a, b)):
                return a, b
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            pass
        self.damaged += 1
        return None

    def put(self, question: Mapping[str, Any], masses: Masses) -> None:
        """Keep an answer.

        Raises:
          ValueError: it cannot be written.
        """
        name, path = self._place(question)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(_entry(name, masses)))
            os.replace(temporary, path)  # without waiting for the disk: a torn entry is known by its sum
        except OSError as error:
            raise JudgeError(
                f"judge.cache: {path} cannot be written ({error.strerror}); free space, or set it to None"
            ) from None

    def _place(self, question: Mapping[str, Any]) -> tuple[str, Path]:
        name = _sum({**self._decides, "question": question})
        return name, self._folder / name[:2] / f"{name}.json"


def _entry(name: str, masses: Masses) -> dict[str, Any]:
    content = {"question": name, "masses": list(masses)}
    return {**content, "sha256": _sum(content)}


def _sum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
