"""What a judge returned, read against its contract; and asking it in both orders.

A failure costs its own pair and no other: None, NaN, a number out of range, prose, a thing of the wrong type is
no verdict on that comparison. An exception or a wrong number of answers is none on all that were asked with it.
The reason is kept, in the judge's own words. Two things end a run at once, because asking again cannot help: a bare
integer or boolean, where nobody can know which side 1 means, and a `JudgeError`, which a judge raises for that.

Left out on purpose: deadlines and retries, which are the judge's business, and when failures are too many
(`ask.FailureTolerance`). No jax here: a judge that asks others reads their answers with this, too.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.io.files import to_json
from xpo_jax.io.text import one_line, shorten
from xpo_jax.values import Answer, Comparison, Judge, Verdict

REASON_LETTERS = 300  # of why there is no verdict


class JudgeError(ValueError):
    """Ends the run, whoever raises it: the judge cannot continue. Its message states why and how to fix it.

    Any other exception of a judge costs the verdicts of one call and nothing else.
    """


class Judged(NamedTuple):
    """What was found about one comparison.

    verdict: its p is None where there is no verdict; then the reason says why.
    flipped: whether the order shown made a difference: the two hard preferences differ. None where it was not
      asked in both orders, or one of them gave no verdict.
    """

    verdict: Verdict
    flipped: bool | None


def compare(judge: Judge, comparisons: Sequence[Comparison], *, both_orders: bool) -> list[Judged]:
    """One verdict for each comparison.

    Args:
      both_orders: ask twice, the second time with A and B exchanged, in one list, a comparison's two orders next
        to each other. Soft verdicts are averaged, hard ones that differ tie, and without one of them there is
        none: half an answer is the biased one.

    Raises:
      JudgeError: see `asked`.
    """
    if not both_orders:
        return [Judged(verdict, None) for verdict in asked(judge, comparisons)]
    both = [order for c in comparisons for order in (c, c._replace(a=c.b, b=c.a))]
    found = asked(judge, both)
    return [_joined(first, exchanged(second)) for first, second in zip(found[::2], found[1::2], strict=True)]


def exchanged(verdict: Verdict) -> Verdict:
    """The same verdict with A and B exchanged."""
    p = None if verdict.p is None else 1 - verdict.p
    return Verdict(p, verdict.reason, renamed(verdict.scores, {"a": "b", "b": "a"}))


def renamed(scores: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Scores with "a" and "b" under other names, those of the second order ("exchanged") as well."""
    return {
        names.get(name, name): renamed(value, names)
        if name == "exchanged" and isinstance(value, Mapping)
        else value
        for name, value in scores.items()
    }


def _joined(first: Verdict, second: Verdict) -> Judged:
    """Two verdicts on one comparison, both in the first one's order."""
    if first.p is None or second.p is None:
        which = "" if first.p is None else "exchanged: "
        return Judged(Verdict(None, which + (first if first.p is None else second).reason), None)
    p = (first.p + second.p) / 2
    if first.p != second.p and {first.p, second.p} <= {0.0, 0.5, 1.0}:
        p = 0.5
    reason = f"{first.p:.3f} for A, {second.p:.3f} when exchanged"
    reason += f"; {first.reason}" if first.reason else ""
    reason += f"; exchanged: {second.reason}" if second.reason else ""
    scores = {**first.scores, "exchanged": second.scores} if second.scores else first.scores
    flipped = np.sign(first.p - 0.5) != np.sign(second.p - 0.5)
    return Judged(Verdict(p, reason, scores), bool(flipped))


def asked(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Ask once; one Verdict for each comparison, p None and the reason why where there is none.

    Raises:
      JudgeError: raised by the judge, or a bare integer or boolean among the answers.
    """
    if not comparisons:
        return []
    try:
        answers = judge(comparisons)
    except JudgeError as error:
        raise JudgeError(_short(str(error))) from error
    except Exception as error:  # a judge is anybody's code and can fail in any way
        frames = traceback.extract_tb(error.__traceback__)[1:]
        own = [frame for frame in frames if frame.filename == frames[0].filename]  # not the libraries below
        place = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
        text = f"the judge failed: {type(error).__name__}: {_text(error)}"
        return [Verdict(None, _short(text, REASON_LETTERS - len(place)) + place)] * len(comparisons)
    try:
        listed = isinstance(answers, Sequence) and not isinstance(answers, (str, bytes, bytearray))
        listed |= isinstance(answers, np.ndarray) and answers.ndim == 1
        found = f"{len(answers)} answers" if listed else type(answers).__name__
        each = list(answers) if listed else []
    except Exception as error:  # a sequence of anybody's making
        found, each = f"a {type(answers).__name__} that cannot be read ({type(error).__name__})", []
    if len(each) != len(comparisons):
        wrong = (
            f"the judge was asked {len(comparisons)} comparisons and returned {found};"
            " return a list with one answer each, in order"
        )
        return [Verdict(None, wrong)] * len(comparisons)
    return [parse(answer) for answer in each]


def parse(answer: Answer) -> Verdict:
    """One answer as a Verdict; p is None, and the reason says why, where it is none of the contract's.

    Raises:
      JudgeError: a bare integer or boolean.
    """
    try:
        return _read(answer)
    except JudgeError:
        raise
    except Exception as error:  # an object of anybody's making, whose every method may raise
        name = type(answer).__name__
        return Verdict(None, f"the judge answered a {name} that cannot be read ({type(error).__name__})")


def _read(answer: Any) -> Verdict:
    if answer is None:
        return Verdict(None, "no verdict")
    if isinstance(answer, str):
        p = {"A": 1.0, "B": 0.0, "tie": 0.5}.get(str(answer))
        return Verdict(p, "" if p is not None else _wrong(answer, "a text answer is 'A', 'B' or 'tie'"))
    if not isinstance(answer, Verdict):
        return _probability(answer)
    if isinstance(answer.p, str):
        what = f"the judge answered a Verdict with p {_shown(answer.p)}; p is a float, the probability that"
        return Verdict(None, f"{what} A is better, or None")
    if not isinstance(answer.reason, str):
        what = f"the judge answered a Verdict with the reason {_shown(answer.reason)}"
        return Verdict(None, f"{what}; a reason is text")
    found = Verdict(None) if answer.p is None else _probability(answer.p)
    wrong = _unlike_scores(answer.scores)
    if wrong:
        return Verdict(None, f"the judge answered a Verdict with scores {_shown(answer.scores)}; {wrong}")
    if found.p is None:
        return Verdict(None, _short(answer.reason or found.reason or "no verdict"), answer.scores)
    return Verdict(found.p, str(answer.reason), answer.scores)


def _unlike_scores(scores: Any) -> str:
    """What scores must be and these are not; "" if all is well."""
    if not isinstance(scores, Mapping):
        return "scores are a mapping, such as {'a': 0.7}"
    try:
        to_json(scores)
    except Exception:  # whatever a user's object does
        return "scores are numbers, texts, lists and mappings, for they go into a log"
    return ""


def _probability(p: Any) -> Verdict:
    if isinstance(p, (bool, np.bool_, int, np.integer)):
        raise JudgeError(
            f"the judge answered the {type(p).__name__} {p!r}, which is refused because elsewhere 0 means"
            " that the first one won; answer 'A', 'B', 'tie' or a float, the probability that A is better"
        )
    if not isinstance(p, (float, np.floating)):
        return Verdict(None, _wrong(p, "answer 'A', 'B', 'tie', None, a float or a Verdict"))
    number = float(p)
    if math.isnan(number):
        return Verdict(None, "the judge answered nan")
    if not 0 <= number <= 1:
        return Verdict(None, _wrong(p, "a float is the probability that A is better, from 0 to 1"))
    return Verdict(number)


def _wrong(answer: Any, wanted: str) -> str:
    return f"the judge answered {_shown(answer)}; {wanted}"


def _shown(value: object) -> str:
    return _short(repr(value), 60)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an error of anybody's making
        return "(its text cannot be had)"


def _short(text: str, letters: int = REASON_LETTERS) -> str:
    """On one line that any terminal and file takes, and not too long."""
    return shorten(one_line(text.encode("utf-8", "backslashreplace").decode()), letters)
