"""Read a run directory: its metrics, evaluations and texts, and whether the run is healthy.

It reads config.json, metrics.jsonl, samples/held_out.jsonl, pairs*.jsonl and result.json, of a finished run or of one
under way; what is not there yet is empty.

Left out on purpose: all training pairs but the last ones (the whole log is pairs.jsonl), and thresholds in a config:
`findings` states what is worth a look.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xpo_jax.io.files import read_json
from xpo_jax.io.user_paths import expand
from xpo_jax.judges.outcomes import SAME_LETTER_PAIRS
from xpo_jax.reporting.charts import format_number

PAIRS = 200  # of the last ones judged
LAST_STEPS = 10  # in which there should be something to learn
RESTORE = "restore the file"


class Run(NamedTuple):
    """What a run directory holds.

    metrics: one mapping per step, ascending.
    evaluations: those of them that have one, with "queries", the training's comparisons up to that step.
    samples: of the last evaluation, empty before the end.
    pairs: the last `PAIRS`.
    result: None while the run is under way.
    """

    path: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    pairs: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None


def read(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
      ValueError: not a run, no evaluation yet, or a damaged file.
    """
    path = Path(expand(str(path)))
    if (path / "xpo_jax_run.json").is_file() and not (path / "metrics.jsonl").is_file():
        raise ValueError(
            f"{path}: this run has written no metrics yet; wait for its first evaluation, or resume it"
        )
    if not (path / "config.json").is_file() or not (path / "metrics.jsonl").is_file():
        raise ValueError(
            f"{path}: is no run directory with config.json and metrics.jsonl; name a run's run_dir"
        )
    by_step = {row["step"]: row for row in _lines(path / "metrics.jsonl")}  # a resumed run may repeat a step
    metrics = [by_step[step] for step in sorted(by_step)]
    evaluations: list[Mapping[str, Any]] = [
        {"queries": row.get("judge/queries", 0), **row} for row in metrics if "eval/kl" in row
    ]
    if not evaluations:
        raise ValueError(f"{path}: has no evaluation yet; wait for its first")
    samples = path / "samples" / "held_out.jsonl"
    logs = [_lines(log, last=PAIRS) for log in sorted(path.glob("pairs*.jsonl"))]
    judged = sorted((row for log in logs for row in log), key=lambda row: (row["step"], row["position"]))
    result = path / "result.json"
    return Run(
        path,
        read_json(path / "config.json", remedy=RESTORE),
        metrics,
        evaluations,
        _lines(samples) if samples.is_file() else [],
        judged[-PAIRS:],
        read_json(result, remedy=RESTORE) if result.is_file() else None,
    )


def findings(run: Run) -> list[tuple[str, str]]:
    """Return what a reader should know first, as ("good" | "look" | "bad", sentence)."""
    first, last = run.evaluations[0], run.evaluations[-1]
    return [
        *_verdict_findings(run),
        *_win_rate_findings(first, last, one_model=run.config["model"]["reference"] is None),
        *_answer_findings(first, last),
        *_step_findings(run.metrics),
    ]


def _verdict_findings(run: Run) -> list[tuple[str, str]]:
    """Return whether there was anything to learn from: a run can end well and have taught the policy nothing."""
    lines, metrics = [], run.metrics
    steps = [row["judge/decisive_rate"] for row in metrics if row.get("judge/decisive_rate") is not None]
    if steps and not any(steps):
        lines.append(("bad", f"no verdict in {len(steps)} steps preferred one response: nothing was learned"))
    elif steps and not any(steps[-LAST_STEPS:]) and len(steps) > LAST_STEPS:
        lines.append(("bad", f"no verdict in the last {LAST_STEPS} steps preferred one response"))
    trained = {row.get("judge/letter_a_rate") for row in metrics} - {None}
    evaluated = {row.get("eval/letter_a_rate") for row in run.evaluations} - {None}
    queries = sum(row.get("eval/queries", 0) for row in run.evaluations)
    known = [(trained, metrics[-1].get("judge/queries", 0) if metrics else 0), (evaluated, queries)]
    if (run.config.get("evaluation") or {}).get("judge") is None:  # one judge
        known.append((trained | evaluated, sum(number for _, number in known)))
    for letter_a, number in known:
        if letter_a in ({0}, {1}) and number >= SAME_LETTER_PAIRS:
            letter = "A" if letter_a == {1} else "B"
            return [*lines, ("bad", f"the judge always preferred the answer shown as {letter}")]
    return lines


def _win_rate_findings(
    first: Mapping[str, Any], last: Mapping[str, Any], *, one_model: bool
) -> list[tuple[str, str]]:
    low, high = last.get("eval/win_rate_low"), last.get("eval/win_rate_high")
    if low is None or high is None:
        return [("bad", "there are too few verdicts for a win rate")]
    kind, comment = (
        ("bad", "no comparison was won or lost") if last.get("eval/decisive_rate") == 0
        else ("good", "better") if low > 0.5
        else ("bad", "worse") if high < 0.5
        else ("look", "cannot be distinguished from even")
    )  # fmt: skip
    lines = [(kind, f"win rate against the reference {interval(last, 'win_rate')}: {comment}")]
    if one_model and first["step"] == 0 and first.get("eval/decisive_rate") != 0:
        control = f"before the first step, where both are the same model: {interval(first, 'win_rate')}"
        within = first["eval/win_rate_low"] <= 0.5 <= first["eval/win_rate_high"]
        lines.append(("good", control) if within else ("look", f"{control}; this should include 50 %"))
    controlled_low = last.get("eval/win_rate_controlled_low")
    if controlled_low is not None:
        text = f"at equal lengths {interval(last, 'win_rate_controlled')}"
        lost = low > 0.5 >= controlled_low
        lines.append(("bad", f"{text}: lengths may explain all of it") if lost else (kind, text))
    return lines


def _answer_findings(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return whether fractions moved the wrong way by more than 2 points (of validity always), and lengths."""
    lines = []
    for name, label, sign in (
        ("valid", "valid answers", -1),
        ("copy", "copies", 1),
        ("unfinished", "unfinished answers", 1),
    ):
        before, now = first.get(f"eval/policy/{name}"), last.get(f"eval/policy/{name}")
        if before is None or now is None:
            continue
        worse = sign * (now - before) > 0.02 or (name == "valid" and now == 0)
        if worse or name == "valid":
            change = f"{format_number(before, True)} before, {format_number(now, True)} now"
            lines.append(("look" if worse else "good", f"{label} {change}"))
    policy, reference = last["eval/policy/tokens"], last["eval/reference/tokens"]  # at least one each
    if not 0.8 <= policy / reference <= 1.25:
        lengths = f"{format_number(policy)} tokens, the reference's of {format_number(reference)}"
        lines.append(("look", f"answers of {lengths}"))
    return lines


def _step_findings(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    lines = []
    for name, limit, label in (
        ("judge/failed_rate", 0.0, "training pairs without a verdict"),
        ("judge/position_flip_rate", 0.3, "verdicts that change with the order shown"),
        ("loss/clipped_share", 0.0, "bonus at its limit"),
        ("skipped", 0.0, "updates skipped for numbers that were not finite"),
    ):
        values = [row[name] for row in metrics if row.get(name) is not None]
        if values and sum(values) / len(values) > limit:
            lines.append(("look", f"{label}: {format_number(sum(values) / len(values), True)}"))
    return lines


def interval(row: Mapping[str, Any], name: str) -> str:
    """Return a rate with its interval, as text."""
    mean, low, high = (row.get(f"eval/{name}{end}") for end in ("", "_low", "_high"))
    if mean is None:
        return "-"
    ends = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * mean:.1f} %{ends}"


def _lines(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Return the objects of a file with one per line; a torn last line is one that is being written."""
    with open(path, "rb") as file:
        lines = deque(file, maxlen=last)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        return [json.loads(text) for text in lines]
    except ValueError as error:
        raise ValueError(f"{path}: a line is not JSON ({error}); {RESTORE} or delete that line") from error
