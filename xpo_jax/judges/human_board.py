"""The comparisons that people are judging: who has which one on the screen, what they chose, and the file of votes.

The judge's thread opens a round and waits for it; the server's threads hand out comparisons and take votes. A vote is
on disk before the browser learns that it was taken. A comparison that comes again, because the run was interrupted, is
answered from the file.

Left out on purpose: accounts. A browser is known by a random id that it makes itself.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from xpo_jax.data.pairs_log import content_hash
from xpo_jax.io.files import to_json
from xpo_jax.values import Comparison, Verdict

Choice = Literal["A", "B", "tie", "skip"]
CHOICES: tuple[str, ...] = get_args(Choice)
UNDO = "undo"
_P = {"A": 1.0, "B": 0.0, "tie": 0.5}
# A comparison that somebody has had on the screen for this time is shown to others as well: the browser may be closed.
SCREEN_SECONDS = 120.0


class NotTaken(ValueError):
    """A vote or an undo that cannot be taken; the message is for the person."""


class Vote(NamedTuple):
    """A line of the file: on which comparison, by which browser, what; UNDO takes the browser's vote back."""

    comparison: str
    by: str
    choice: str


class VoteFile:
    """An append-only file of votes, one JSON object per line, with the texts that were compared.

    Raises:
      ValueError: it cannot be read or written.
    """

    def __init__(self, path: Path):
        self._path, self._votes = path, dict[str, dict[str, str]]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            with open(path, "ab"):
                pass
        except OSError as error:
            raise ValueError(
                f"judge.votes_folder: {path} cannot be used ({error.strerror}); name another folder"
            ) from None
        self._torn = bool(content) and not content.endswith(b"\n")  # by a crash in the middle of a line
        for line in content.split(b"\n"):  # splitlines would divide texts that hold other separators
            try:
                record = json.loads(line)
                vote = Vote(*(record[name] for name in Vote._fields))
                self._count(vote)
            except (ValueError, TypeError, KeyError):  # torn, or not a vote
                continue

    def votes(self, comparison: str) -> dict[str, str]:
        """Return the choice of each browser that voted on a comparison."""
        return dict(self._votes.get(comparison, {}))

    def append(self, vote: Vote, of: Comparison) -> None:
        """Write a vote, and return once the disk has it.

        Raises:
          NotTaken: it cannot be written.
        """
        texts = {"time": time.strftime("%F %T"), "messages": of.messages, "a": of.a, "b": of.b}
        line = to_json({**vote._asdict(), **texts}).encode() + b"\n"
        try:
            with open(self._path, "ab", buffering=0) as file:
                if file.write(b"\n" * self._torn + line) < len(line) + self._torn:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
        except OSError as error:
            self._torn = True
            problem = f"{self._path}: a choice cannot be written ({error.strerror}); free space or restore the folder"
            print(f"xpo_jax: {problem}", file=sys.stderr, flush=True)
            raise NotTaken(f"Your choice was not taken. {problem}, then choose again.") from None
        self._torn = False
        self._count(vote)

    def _count(self, vote: Vote) -> None:
        choices = self._votes.setdefault(vote.comparison, {})
        if vote.choice == UNDO:
            choices.pop(vote.by, None)
        elif vote.choice in CHOICES:
            choices[vote.by] = vote.choice


@dataclasses.dataclass
class _Open:
    """A comparison of the round; since when each browser has it on the screen, by a monotonic clock."""

    id: str
    of: Comparison
    since: dict[str, float] = dataclasses.field(default_factory=dict)


class Shown(NamedTuple):
    """What a browser shows: a comparison, its id, its number in the round from 1 on, and how many the round has."""

    id: str
    comparison: Comparison
    number: int
    total: int


class Board:
    """The round under way.

    Args:
      votes: browsers that must vote on each comparison.
      file: keeps the votes.
      clock: monotonic seconds.
    """

    def __init__(self, votes: int, file: VoteFile, clock: Callable[[], float] = time.monotonic):
        self._needed, self._file, self._clock = votes, file, clock
        self._round: dict[str, _Open] = {}
        self._latest: dict[str, list[str]] = {}  # by browser, the comparisons of this round it voted on
        self._changed = threading.Condition()
        # of the rounds before: comparisons on which all of several votes agree, and those with several
        self._agreed, self._several = 0, 0
        # votes since the program began, and those that the file had for its rounds; none that was taken back
        self.taken = 0

    # ---- the judge's side ----

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Open a round, wait until people have judged all of it, and return their verdicts."""
        ids = [content_hash(c.messages, c.row, c.a, c.b) for c in comparisons]
        with self._changed:
            self._round = {id: _Open(id, c) for id, c in zip(ids, comparisons, strict=True)}
            self._latest.clear()
            self.taken += sum(len(self._file.votes(id)) for id in self._round)
            try:
                while any(map(self._missing, self._round)):
                    self._changed.wait(1)  # a signal is handled between two waits
                return [_verdict(self._file.votes(id)) for id in ids]
            finally:
                self._agreed, self._several = self._agreements()
                self._round = {}

    def _missing(self, id: str) -> int:
        return max(0, self._needed - len(self._file.votes(id)))

    # ---- the browsers' side ----

    def next(self, by: str) -> Shown | None:
        """Return what a browser is to show, None where there is nothing for it now."""
        with self._changed:
            now = self._clock()
            free, taken = list[tuple[float, str]](), list[tuple[float, str]]()
            for id, pair in self._round.items():
                if not self._missing(id) or by in self._file.votes(id):
                    continue
                if by in pair.since:
                    return self._show(id, by, now)
                others = sorted(since for since in pair.since.values() if now - since < SCREEN_SECONDS)
                queue = free if len(others) < self._missing(id) else taken
                queue.append((others[0] if others else 0.0, id))
            # Where all are on the screens of others, the one that has been there longest.
            return self._show((free or sorted(taken))[0][1], by, now) if free or taken else None

    def vote(self, by: str, id: str, choice: str) -> None:
        """Take a vote.

        Raises:
          NotTaken: the comparison is not open, or this browser has voted on it.
        """
        with self._changed:
            if id not in self._round or not self._missing(id):
                raise NotTaken("This comparison has been decided already; your choice was not counted.")
            if by in self._file.votes(id):
                raise NotTaken("You have judged this comparison already; undo takes your choice back.")
            self._file.append(Vote(id, by, choice), self._round[id].of)
            self._round[id].since.pop(by, None)
            self._latest.setdefault(by, []).append(id)
            self.taken += 1
            self._changed.notify_all()

    def undo(self, by: str) -> None:
        """Take back a browser's latest vote.

        Raises:
          NotTaken: there is none in this round.
        """
        with self._changed:
            ids = self._latest.get(by, [])
            if not ids or ids[-1] not in self._round:
                raise NotTaken("There is no choice of yours in this round to take back.")
            id = ids[-1]
            self._file.append(Vote(id, by, UNDO), self._round[id].of)
            ids.pop()
            for pair in self._round.values():
                pair.since.pop(by, None)
            self._round[id].since[by] = self._clock()
            self.taken -= 1

    def agreement(self) -> float | None:
        """Return the fraction of the comparisons with several votes on which all agree; None without any."""
        with self._changed:
            agreed, several = self._agreements()
        return agreed / several if several else None

    def _agreements(self) -> tuple[int, int]:
        several = [v for v in map(self._choices, self._round) if len(v) > 1]
        return self._agreed + sum(len(set(choices)) == 1 for choices in several), self._several + len(several)

    def _choices(self, id: str) -> list[str]:
        return [choice for choice in self._file.votes(id).values() if choice in _P]

    def _show(self, id: str, by: str, now: float) -> Shown:
        self._round[id].since[by] = now
        return Shown(id, self._round[id].of, 1 + list(self._round).index(id), len(self._round))


def _verdict(votes: Mapping[str, str]) -> Verdict:
    """Return the mean of the votes; skipped ones do not count."""
    values = [_P[choice] for choice in votes.values() if choice in _P]
    if not values:
        return Verdict(None, "skipped")
    counts: dict[str, Any] = {choice: list(votes.values()).count(choice) for choice in CHOICES}
    listed = ", ".join(f"{choice} {count}" for choice, count in counts.items() if count)
    return Verdict(sum(values) / len(values), listed)
