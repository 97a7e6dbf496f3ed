"""What the directory of a run tells: its metrics, evaluations and texts, and whether it is healthy.

It reads config.json, metrics.jsonl, samples/held_out.jsonl, pairs*.jsonl and result.json, of a finished run or of one
under way; what is not there yet is empty.

Left out on purpose: training pairs but the last ones (the whole log is pairs.jsonl), and thresholds in a config: what
counts as worth a look stands in `findings`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xpo_jax.io.files import read_json
from xpo_jax.reporting.html import number

PAIRS = 200  # of the last ones judged


class Run(NamedTuple):
    """What a run directory holds.

    metrics: one mapping per step, ascending; evaluations: those of them that have one, with "queries", the training's
      comparisons up to then. samples: of the last evaluation, empty before the end. pairs: the last `PAIRS`.
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
    path = Path(path)
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
        read_json(path / "config.json", remedy="restore the file"),
        metrics,
        evaluations,
        _lines(samples) if samples.is_file() else [],
        judged[-PAIRS:],
        read_json(result, remedy="restore the file") if result.is_file() else None,
    )


def findings(run: Run) -> list[tuple[str, str]]:
    """What a reader should know first, as ("good" | "look" | "bad", sentence)."""
    first, last = run.evaluations[0], run.evaluations[-1]
    found = []
    low, high = last.get("eval/win_rate_low"), last.get("eval/win_rate_high")
    won = f"win rate against the reference {interval(last, 'win_rate')}"
    if low is None or high is None:
        found.append(("bad", "there are too few verdicts for a win rate"))
    elif low > 0.5:
        found.append(("good", f"{won}: better"))
    else:
        found.append(("bad", f"{won}: worse") if high < 0.5 else ("look", f"{won}: cannot be told from even"))
    if run.config["model"]["reference"] is None and first["step"] == 0 and low is not None:
        control = f"before the first step, where both are the same model: {interval(first, 'win_rate')}"
        within = first["eval/win_rate_low"] <= 0.5 <= first["eval/win_rate_high"]
        found.append(("good" if within else "look", control + ("" if within else "; this should hold 50 %")))
    even = last.get("eval/win_rate_controlled_low")
    if low is not None and even is not None:
        gone = low > 0.5 >= even
        text = f"at equal lengths {interval(last, 'win_rate_controlled')}"
        found.append(("bad", f"{text}: lengths may be all of it") if gone else (found[0][0], text))

    def changed(name: str, what: str, by: float, rising: bool) -> None:
        """Told where a share moved the wrong way by more than `by`, and of validity always."""
        key = f"eval/policy/{name}"
        if first.get(key) is None or last.get(key) is None:
            return
        worse = (last[key] - first[key]) * (1 if rising else -1) > by
        if worse or name == "valid":
            text = f"{what} {number(first[key], True)} before, {number(last[key], True)} now"
            found.append(("look" if worse else "good", text))

    changed("valid", "valid answers", 0.02, rising=False)
    changed("copy", "copies", 0.02, rising=True)
    changed("unfinished", "unfinished answers", 0.02, rising=True)
    mine, theirs = last["eval/policy/tokens"], last["eval/reference/tokens"]  # at least one each
    if not 0.8 <= mine / theirs <= 1.25:
        found.append(("look", f"answers of {number(mine)} tokens, the reference's of {number(theirs)}"))
    for name, share, what in (
        ("judge/failed_rate", 0.0, "training pairs without a verdict"),
        ("judge/position_flip_rate", 0.3, "verdicts that change with the order shown"),
        ("loss/clipped_share", 0.0, "bonus at its limit"),
        ("skipped", 0.0, "updates skipped for numbers that were not finite"),
    ):
        values = [row[name] for row in run.metrics if row.get(name) is not None]
        if values and sum(values) / len(values) > share:
            found.append(("look", f"{what}: {number(sum(values) / len(values), True)}"))
    return found


def interval(row: Mapping[str, Any], name: str) -> str:
    """A rate with its interval, as text."""
    mean, low, high = (row.get(f"eval/{name}{end}") for end in ("", "_low", "_high"))
    if mean is None:
        return "-"
    ends = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * mean:.1f} %{ends}"


# ---- files ----------------------------------------------------------------------------------------


def _lines(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The objects of a file with one a line; a torn last line is one that is being written."""
    with open(path, "rb") as file:
        lines = deque(file, maxlen=last)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        return [json.loads(text) for text in lines]
    except ValueError as error:
        raise ValueError(
            f"{path}: a line is not JSON ({error}); restore the file or delete that line"
        ) from error
