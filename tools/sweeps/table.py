"""The results of a sweep: a row per arm, how the tuned values were chosen, and the same as JSON.

Left out on purpose: a verdict on which arm is best. With several arms, one of the intervals of the differences may
exclude 0 by chance; docs/choosing.md explains how to read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xpo_jax.io.text import markdown_table
from xpo_jax.reporting.console import text_table

from ..intervals import Mean, t_interval
from .schedule import Ended, Result, chosen, run_dir, tuning
from .spec import Arm, Sweep

# columns of means without an interval: {column: name in result.json}
MEANS = {
    "valid": "valid",
    "copies": "copy_rate",
    "KL": "kl",
    "queries": "judge_queries",
    "updates": "updates",
    "seconds": "seconds",
}


def results(sweep: Sweep, arm: Arm, ended: Ended) -> dict[int, Result]:
    """Return {seed: result} of an arm's final runs that have a result."""
    value = chosen(sweep, arm, ended)
    if arm.tuned and value is None:
        return {}
    by_seed = {seed: ended.get(run_dir(sweep, arm, value, seed)) for seed in sweep.seeds}
    return {seed: result for seed, result in by_seed.items() if result is not None}


def difference(sweep: Sweep, arm: Arm, first: Arm, ended: Ended, name: str = "win_rate") -> dict[int, float]:
    """Return {seed: an arm's rate minus the first arm's}."""
    rates, first_rates = (_values(results(sweep, a, ended), name) for a in (arm, first))
    return {seed: rates[seed] - first_rates[seed] for seed in rates if seed in first_rates}


def summary(sweep: Sweep, ended: Ended) -> list[dict[str, Any]]:
    """Return for each arm its chosen value and the means over its seeds; None without a result."""
    rows = []
    for arm in sweep.arms:
        by_seed = results(sweep, arm, ended)
        differences = difference(sweep, arm, sweep.arms[0], ended)
        means = {name: _mean(_values(by_seed, name)) for name in MEANS.values()}
        rows.append(
            {
                "arm": arm.name,
                "chosen": chosen(sweep, arm, ended),
                "seeds": list(by_seed),
                "win_rate": _mean(_values(by_seed, "win_rate")),
                "win_rate_controlled": _mean(_values(by_seed, "win_rate_controlled")),
                "difference": None if arm == sweep.arms[0] else _mean(differences),
                **{name: mean and mean.mean for name, mean in means.items()},
            }
        )
    return rows


def tables(sweep: Sweep, ended: Ended, *, markdown: bool = False, width: int | None = None) -> str:
    """Return the table of arms, the table of how their values were chosen, and notes.

    Args:
      width: maximum characters of a line; the terminal's width by default.
    """
    rows: list[dict[str, Any]] = []
    for line in summary(sweep, ended):
        row = {"arm": line["arm"]}
        if sweep.tune:
            row[sweep.tune.short] = None if line["chosen"] is None else f"{line['chosen']:g}"
        row["seeds"] = len(line["seeds"])
        row["win rate, %"] = _percent(line["win_rate"])
        row["length-controlled, %"] = _percent(line["win_rate_controlled"])
        row["minus the first arm"] = _percent(line["difference"], sign="+")
        rows.append(row | {head: line[name] for head, name in MEANS.items()})
    parts = [_table(rows, markdown, width)]
    if sweep.tune and (tuned := [arm for arm in sweep.arms if arm.tuned]):
        tried = []
        for arm in tuned:
            line = {f"{sweep.tune.short}, mean win rate, %": arm.name}
            for value, rates in tuning(sweep, arm, ended).items():
                known = [rate for rate in rates if rate is not None]
                complete = len(known) == len(rates)
                line[f"{value:g}"] = f"{100 * sum(known) / len(known):.1f}" if complete else "failed"
            tried.append(line)
        parts.append(_table(tried, markdown, width))
    parts += ["\n".join(f"- {note}" for note in notes(sweep, ended))]
    return "\n\n".join(part.rstrip() for part in parts if part)


def notes(sweep: Sweep, ended: Ended) -> list[str]:
    """Return what a reader of the table should look at."""
    texts = []
    for arm in sweep.arms:
        value, missing = chosen(sweep, arm, ended), set(sweep.seeds) - results(sweep, arm, ended).keys()
        if missing:
            texts.append(f"{arm.name}: no result of seed {', '.join(map(str, sorted(missing)))}")
        if sweep.tune and value in (sweep.tune.values[0], sweep.tune.values[-1]):
            end, more = ("smallest", "smaller") if value == sweep.tune.values[0] else ("largest", "larger")
            texts.append(
                f"{arm.name}: the best {sweep.tune.short} is the {end} that was tried; try {more} values"
            )
    return texts


def as_json(sweep: Sweep, ended: Ended) -> dict[str, Any]:
    """Return the summary, the rates by which values were chosen, and the result of each run."""
    arms = []
    for arm, line in zip(sweep.arms, summary(sweep, ended), strict=True):
        shown = {name: value._asdict() if isinstance(value, Mean) else value for name, value in line.items()}
        tried = {f"{value!r}": rates for value, rates in tuning(sweep, arm, ended).items()}
        arms.append({**shown, "tuning": tried, "runs": list(results(sweep, arm, ended).values())})
    return {"first": sweep.arms[0].name, "tuned": sweep.tune and sweep.tune.field, "arms": arms}


def _values(by_seed: dict[int, Result], name: str) -> dict[int, float]:
    """Return {seed: value}, without seeds whose result lacks it."""
    return {seed: result[name] for seed, result in by_seed.items() if result.get(name) is not None}


def _mean(values: dict[int, float]) -> Mean | None:
    return t_interval(list(values.values())) if values else None


def _percent(mean: Mean | None, sign: str = "") -> str | None:
    if mean is None:
        return None
    text = f"{100 * mean.mean:{sign}.1f}"
    if mean.low is None or mean.high is None:
        return text
    return f"{text} [{100 * mean.low:{sign}.1f}, {100 * mean.high:{sign}.1f}]"


def _table(rows: Sequence[dict[str, Any]], markdown: bool, width: int | None) -> str:
    if markdown:
        return markdown_table(rows)
    return text_table(list(rows[0]), [list(row.values()) for row in rows], width)
