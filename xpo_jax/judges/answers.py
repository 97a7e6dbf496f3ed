"""Call a judge, in one order or in both, and read what it returned as verdicts.

A failure costs its own pair and no other: None, nan, a number out of range, prose or an object of the wrong type is
no verdict on that comparison. An exception or a wrong number of answers is no verdict on any comparison of the call.
The reason is recorded in the judge's own words. Two things end the run, because asking again cannot help: a bare
integer or boolean, which could mean either side, and a `JudgeError`.

Left out on purpose: deadlines and retries, which every judge handles itself, and how many failures are too many
(`limits.FailureTolerance`). No jax here: a judge that asks others reads their answers with this module too.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xpo_jax.io.copies import copied
from xpo_jax.io.files import to_json
from xpo_jax.io.text import one_line, shorten
from xpo_jax.judges.contract import Judge, JudgeError
from xpo_jax.runtime.user_code import exit_line, is_own_error, surroundings_restored
from xpo_jax.values import Answer, Comparison, Verdict

MAX_REASON_CHARACTERS = 300  # of a failure's reason


class Judged(NamedTuple):
    """The result for one comparison.

    verdict: p is None where there is no verdict; the reason then states why.
    flipped: whether the two orders gave different hard preferences. None where only one order was asked, or where
      either gave no verdict.
    """

    verdict: Verdict
    flipped: bool | None


# ---- both orders ----------------------------------------------------------------------------------


def compare(judge: Judge, comparisons: Sequence[Comparison], *, both_orders: bool) -> list[Judged]:
    """Return one verdict for each comparison.

    Args:
      both_orders: ask in a single call about both orders of every comparison, next to each other. Soft verdicts are
        averaged, and differing hard ones tie. If either order has no verdict there is none, since the other one
        alone may be biased.

    Raises:
      JudgeError: see `call_judge`.
    """
    if not both_orders:
        return [Judged(verdict, None) for verdict in call_judge(judge, comparisons)]
    verdicts = call_judge(judge, [order for c in comparisons for order in (c, c._replace(a=c.b, b=c.a))])
    return [
        _merge_orders(first, swap_sides(second))
        for first, second in zip(verdicts[::2], verdicts[1::2], strict=True)
    ]


def swap_sides(verdict: Verdict) -> Verdict:
    """Return the same verdict with A and B swapped."""
    p = None if verdict.p is None else 1 - verdict.p
    return Verdict(p, verdict.reason, rename_sides(verdict.scores, {"a": "b", "b": "a"}))


def rename_sides(scores: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the scores with "a" and "b" renamed, also within those of the second order ("exchanged")."""
    return {
        names.get(name, name): rename_sides(value, names)
        if name == "exchanged" and isinstance(value, Mapping)
        else value
        for name, value in scores.items()
    }


def query_count(scores: Mapping[str, Any], *, otherwise: int) -> int:
    """Return how many queries a verdict took, as its scores state; `otherwise` if they do not."""
    stated = scores.get("queries")
    return stated if type(stated) is int and stated >= 0 else otherwise


def _merge_orders(first: Verdict, second: Verdict) -> Judged:
    """Merge the verdicts of the two orders; the second's sides are swapped back already."""
    queries = sum(query_count(verdict.scores, otherwise=1) for verdict in (first, second))
    stated = {"queries": queries} if queries != 2 else {}
    if first.p is None or second.p is None:
        which = "" if first.p is None else "exchanged: "
        return Judged(Verdict(None, which + (first if first.p is None else second).reason, stated), None)
    p = (first.p + second.p) / 2
    if first.p != second.p and {first.p, second.p} <= {0.0, 0.5, 1.0}:
        p = 0.5
    reason = f"{first.p:.3f} for A, {second.p:.3f} when exchanged"
    reason += f"; {first.reason}" if first.reason else ""
    reason += f"; exchanged: {second.reason}" if second.reason else ""
    scores = {**first.scores, "exchanged": second.scores} if second.scores else {**first.scores}
    flipped = np.sign(first.p - 0.5) != np.sign(second.p - 0.5)
    return Judged(Verdict(p, reason, {**scores, **stated}), bool(flipped))


# ---- one call -------------------------------------------------------------------------------------


def call_judge(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Call the judge once; return a Verdict for each comparison, with p None and a reason where there is none.

    The judge gets copies, and its scores are copied, so it may edit and reuse all of them. Every judge, and every part
    of a combined one, is called here.

    Raises:
      JudgeError: raised by the judge, or a bare integer or boolean among the answers.
    """
    if not comparisons:
        return []
    try:
        with surroundings_restored():
            answers = judge([Comparison(copied(c.messages), copied(c.row), c.a, c.b) for c in comparisons])
    except JudgeError as error:
        raise JudgeError(_shorten(str(error))) from error
    except BaseException as error:  # a judge is arbitrary code and can fail in any way
        return [Verdict(None, failure_reason(error))] * len(comparisons)
    try:
        is_list = isinstance(answers, Sequence) and not isinstance(answers, (str, bytes, bytearray))
        is_list |= isinstance(answers, np.ndarray) and answers.ndim == 1
        returned = f"{len(answers)} answers" if is_list else type(answers).__name__
        items = list(answers) if is_list else []
    except Exception as error:  # a user-defined sequence can fail in any way
        returned, items = f"a {type(answers).__name__} that cannot be read ({type(error).__name__})", []
    if len(items) != len(comparisons):
        reason = (
            f"the judge was asked {len(comparisons)} comparisons and returned {returned};"
            " return a list with one answer each, in order"
        )
        return [Verdict(None, reason)] * len(comparisons)
    return [parse(answer) for answer in items]


def failure_reason(error: BaseException) -> str:
    """Return the reason why there is no verdict, where a judge raised `error`; call it in the handler.

    Raises:
      JudgeError: the judge ended the program.
      BaseException: the error itself, if it is not the judge's own, such as an interrupt.
    """
    if not is_own_error(error):
        raise error
    location = _location(error)
    if isinstance(error, SystemExit):
        raise JudgeError(f"the judge: {exit_line(error)}{location}") from error
    text = f"the judge failed: {type(error).__name__}: {_message(error)}"
    return _shorten(text, MAX_REASON_CHARACTERS - len(location)) + location


def parse(answer: Answer) -> Verdict:
    """Read one answer as a Verdict; where it is not one that the contract allows, p is None and the reason says why.

    Raises:
      JudgeError: a bare integer or boolean.
    """
    try:
        return _read(answer)
    except JudgeError:
        raise
    except Exception as error:  # any method of a user-defined object may raise
        name = type(answer).__name__
        return Verdict(None, f"the judge answered a {name} that cannot be read ({type(error).__name__})")


def _read(answer: Any) -> Verdict:
    if answer is None:
        return Verdict(None, "no verdict")
    if isinstance(answer, str):
        p = {"A": 1.0, "B": 0.0, "tie": 0.5}.get(str(answer))
        return Verdict(p, "" if p is not None else _invalid(answer, "a text answer is 'A', 'B' or 'tie'"))
    if not isinstance(answer, Verdict):
        return _probability(answer)
    if isinstance(answer.p, str):
        return Verdict(
            None,
            f"the judge answered a Verdict with p {_shown(answer.p)};"
            " p is a float, the probability that A is better, or None",
        )
    if not isinstance(answer.reason, str):
        return Verdict(
            None, f"the judge answered a Verdict with the reason {_shown(answer.reason)}; a reason is text"
        )
    probability = Verdict(None) if answer.p is None else _probability(answer.p)
    problem = _scores_problem(answer.scores)
    if problem:
        return Verdict(None, f"the judge answered a Verdict with scores {_shown(answer.scores)}; {problem}")
    if probability.p is None:
        return Verdict(
            None, _shorten(answer.reason or probability.reason or "no verdict"), copied(answer.scores)
        )
    return Verdict(probability.p, str(answer.reason), copied(answer.scores))


def _scores_problem(scores: Any) -> str:
    """Return what is wrong with the scores, or ""."""
    if not isinstance(scores, Mapping):
        return "scores are a mapping, such as {'a': 0.7}"
    try:
        to_json(scores)
    except Exception:  # a user-defined object can fail in any way
        return "scores are numbers, texts, lists and mappings, for they go into a log"
    return ""


def _probability(p: Any) -> Verdict:
    if isinstance(p, (bool, np.bool_, int, np.integer)):
        raise JudgeError(
            f"the judge answered the {type(p).__name__} {p!r}, which is refused because elsewhere 0 means"
            " that the first one won; answer 'A', 'B', 'tie' or a float, the probability that A is better"
        )
    if not isinstance(p, (float, np.floating)):
        return Verdict(None, _invalid(p, "answer 'A', 'B', 'tie', None, a float or a Verdict"))
    number = float(p)
    if math.isnan(number):
        return Verdict(None, "the judge answered nan")
    if not 0 <= number <= 1:
        return Verdict(None, _invalid(p, "a float is the probability that A is better, from 0 to 1"))
    return Verdict(number)


# ---- texts ----------------------------------------------------------------------------------------


def _invalid(answer: object, expected: str) -> str:
    return f"the judge answered {_shown(answer)}; {expected}"


def _shown(value: object) -> str:
    return _shorten(repr(value), 60)


def _location(error: BaseException) -> str:
    """Return the innermost file and line of the judge's own module, not of the libraries that it calls."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    in_judge = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({os.path.basename(in_judge[-1].filename)}, line {in_judge[-1].lineno})" if in_judge else ""


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # __str__ of a user-defined error may raise
        return "(its message cannot be read)"


def _shorten(text: str, limit: int = MAX_REASON_CHARACTERS) -> str:
    """Return the text on one line of at most `limit` characters, encodable as UTF-8."""
    return shorten(one_line(text.encode("utf-8", "backslashreplace").decode()), limit)
