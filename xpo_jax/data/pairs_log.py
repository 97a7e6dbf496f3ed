"""The pairs log: every pair that was sampled and judged, on disk before the update learns from it.

One JSON object per line and pair. It is the journal of verdicts, the replay data and a DPO data set:

    step, position      the update, and the row's position in its global batch
    hash                `content_hash` of everything the judge receives: messages, row and both texts
    row, messages       the raw row, and the conversation that was the prompt
    prompt_tokens       the same as the policy saw it, chat template included
    responses           two of {tokens, text, finished}, tokens cut to their length; candidate 0 is
                        the policy's, candidate 1 the reference's (in online DPO, and in some pairs
                        of more than two candidates, also the policy's)
    shown               the candidates in the order in which the judge saw them as A and B: [0, 1] or
                        [1, 0]; null if the judge was not asked
    flipped             1 if the judge preferred the other candidate in the other order, 0 if not, null if it
                        judged one order only
    p_first, weight     the verdict: probability that candidate 0 is better; null and 0 for none
    ref_logps           the reference's log-probability of each response, in nats
    reason, scores      the judge's reason and scores
    failure             why there is no verdict; null if there is one
    candidates          only where pairs are chosen by scores, and there at a prompt's first pair: the text that the
                        judge read and its score, of all the prompt's candidates

With several pairs a prompt (algorithm/pairing.py), position is that of the pair: the row's, times their number, plus
the pair's number.

Each process logs the rows that it judges in its own file: pairs.jsonl, pairs-1.jsonl, and so on.

Left out on purpose: how a resumed run uses the log, see experiment/resume.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from xpo_jax.io.files import append_whole, to_json
from xpo_jax.values import Message, Prompts, Samples, Verdicts

_log = logging.getLogger(__name__)
_FIELDS = ("step", "position", "hash", "row", "messages", "responses", "shown", "p_first", "weight")


def content_hash(messages: Sequence[Message], row: Mapping[str, Any], first: str, second: str) -> str:
    """Return the SHA-256 of everything a verdict depends on: messages, row (a judge may read any column), both texts.

    The hash is stable: it covers the values as the log stores them, as ASCII JSON with sorted keys and no spaces.

    Args:
      first, second: the texts of candidate 0 and 1.
    """
    content = json.loads(to_json([messages, row, first, second]))
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def pair_records(
    step: int,
    prompts: Prompts,
    samples: tuple[Samples, Samples],
    texts: tuple[Sequence[str], Sequence[str]],
    verdicts: Verdicts,
    shown: Sequence[Sequence[int] | None],
    ref_logps: np.ndarray,
) -> list[dict[str, Any]]:
    """Return the log records of one batch, valid rows only, with values on the host.

    Args:
      step: updates completed before this one.
      prompts, verdicts: B rows.
      samples, texts: of candidate 0 and 1, B rows each.
      shown: for each row the candidates shown as A and B, or None if the judge was not asked.
      ref_logps: f32[S B].
    """
    records = []
    for i in map(int, np.flatnonzero(prompts.valid)):
        responses = [
            {"tokens": np.asarray(s.tokens[i][: s.lengths[i]]), "text": t[i], "finished": bool(s.finished[i])}
            for s, t in zip(samples, texts, strict=True)
        ]
        judged = float(verdicts.weight[i]) > 0
        records.append(
            {
                "step": step,
                "position": int(prompts.position[i]),
                "hash": content_hash(prompts.messages[i], prompts.rows[i], texts[0][i], texts[1][i]),
                "row": prompts.rows[i],
                "messages": prompts.messages[i],
                "prompt_tokens": np.asarray(prompts.tokens[i][: prompts.lengths[i]]),
                "responses": responses,
                "shown": shown[i],
                "flipped": np.float32(verdicts.flipped[i]),
                "p_first": np.float32(verdicts.p_first[i]) if judged else None,
                "weight": np.float32(verdicts.weight[i]),
                "ref_logps": np.asarray(ref_logps[:, i], np.float32),
                "reason": verdicts.reasons[i] if judged else "",
                "scores": verdicts.scores[i],
                "failure": None if judged else verdicts.reasons[i] or "no verdict",
            }
        )
    return records


class PairsLog:
    """An open log; `offset` is the length in bytes of its complete records."""

    def __init__(self, path: str | Path):
        """Open or create the log; cut off an incomplete last line, which a killed process left."""
        self.path = Path(path)
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115, closed by close()
        size = self._file.seek(0, os.SEEK_END)
        self.offset = _end_of_last_line(self._file, size)
        if self.offset < size:
            _log.warning("%s: an incomplete last line of %d bytes is cut off", self.path, size - self.offset)
            self._file.truncate(self.offset)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the records and wait until they are on disk; on an error, write none of them.

        Raises:
          ValueError: a record does not fit the format, or the disk is full or unwritable.
        """
        lines = []
        for record in records:
            where = f"{self.path}: step {record.get('step')}, position {record.get('position')}"
            missing = [name for name in _FIELDS if name not in record]
            if missing:
                raise ValueError(f"{where}: the record lacks {', '.join(missing)}; see pair_records")
            p, weight = record["p_first"], record["weight"]
            if not (0 <= weight < float("inf")) or not (weight == 0 if p is None else 0 <= p <= 1):
                raise ValueError(f"{where}: p_first {p} with weight {weight} is not a verdict; fix the judge")
            try:
                lines.append(to_json(record) + "\n")
            except TypeError as error:
                raise ValueError(f"{where}: {error}; use only text, numbers and lists in rows") from error
        data = "".join(lines).encode()
        try:
            append_whole(self._file, data)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror}); free space") from error
        self.offset += len(data)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_pairs(
    path: str | Path, warn: Callable[[str], object] = _log.warning, *, offset: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, oldest first.

    Args:
      path: the file.
      warn: receives one line if the last line is incomplete, because its process was killed; that line is ignored.
      offset: bytes to skip, up to the beginning of a line.

    Raises:
      ValueError: a damaged record, with file and line, or a missing file.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115, closed below
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); give the path of a pairs log"
        ) from error
    with file:
        skipped = file.read(offset).count(b"\n")
        for number, line in enumerate(file, skipped + 1):
            if not line.endswith(b"\n"):
                warn(f"{path}, line {number}: incomplete, {len(line)} bytes are ignored")
                return
            problem = "is not JSON"
            try:
                record = json.loads(line)
                problem = "is not a pair record"
                first, second = (response["text"] for response in record["responses"])
                problem = "does not match its hash"
                intact = record["hash"] == content_hash(record["messages"], record["row"], first, second)
            except (ValueError, TypeError, KeyError):
                intact = False
            if not intact:
                raise ValueError(f"{path}, line {number}: {problem}; restore the file, or delete that line")
            yield record


def _end_of_last_line(file: Any, size: int) -> int:
    block = 1 << 16
    for start in range(max(0, size - block), -block, -block):
        file.seek(max(start, 0))
        newline = file.read(block).rfind(b"\n")
        if newline >= 0:
            return max(start, 0) + newline + 1
    return 0
