"""A cache on disk of a model's answers: one file each, named by the hash of everything that determines the answer.

Files are replaced atomically, so several processes and machines may share a folder, network folders included; the
SQLite file that diskcache keeps is unsafe there, and diskcache unpickles what it reads. A damaged file is recognized by
its checksum and ignored. `experiment/verdict_journal.py` has another purpose: it recalls an interrupted run's verdicts.

An answer may have a text, the reasoning before a verdict, which is kept for the log.

Left out on purpose: the questions themselves, failures, and any limit on size or age.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xpo_jax.io.user_paths import expand
from xpo_jax.judges.completion_parsing import Masses
from xpo_jax.judges.contract import JudgeError


class CachedAnswer(NamedTuple):
    """The probabilities of two labels, and the text of the answer where it is kept, else ""."""

    masses: Masses
    text: str = ""


class AnswerCache:
    """Answers by question; `damaged` counts the entries that could not be read."""

    def __init__(self, folder: str, **context: Any):
        """Take the folder, which is created on the first write, and what determines an answer besides the question.

        Raises:
          ValueError: the path exists but is not a folder.
        """
        self._folder, self._context, self.damaged = Path(expand(folder)), context, 0
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"cache: {folder} is not a folder; name another one, or None")

    def get(self, question: Mapping[str, Any]) -> CachedAnswer | None:
        """Return the answer, or None if there is no readable one."""
        key, path = self._key_and_path(question)
        try:
            entry = json.loads(path.read_bytes())
            a, b = map(float, entry["masses"])
            answer = CachedAnswer((a, b), entry.get("text", ""))
            if entry == _entry(key, answer):
                return answer
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            pass
        self.damaged += 1
        return None

    def put(self, question: Mapping[str, Any], answer: CachedAnswer) -> None:
        """Store an answer.

        Raises:
          JudgeError: it cannot be written.
        """
        key, path = self._key_and_path(question)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(_entry(key, answer)))
            os.replace(temporary, path)  # without fsync: the checksum detects a torn entry
        except OSError as error:
            raise JudgeError(
                f"judge.cache: {path} cannot be written ({error.strerror}); free space, or set it to None"
            ) from None

    def _key_and_path(self, question: Mapping[str, Any]) -> tuple[str, Path]:
        key = _sha256({**self._context, "question": question})
        return key, self._folder / key[:2] / f"{key}.json"


def _entry(key: str, answer: CachedAnswer) -> dict[str, Any]:
    content = {
        "question": key,
        "masses": list(answer.masses),
        **({"text": answer.text} if answer.text else {}),
    }
    return {**content, "sha256": _sha256(content)}


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
