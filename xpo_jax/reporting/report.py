"""report.html of a run: what it learned, whether it is healthy, and its texts, in one file for a browser.

What it shows comes from run_reader.py; how it looks is in templates/.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpo_jax.io.files import atomic_write
from xpo_jax.reporting.charts import Chart, Line, chart, format_number
from xpo_jax.reporting.html import Cell, Table, render, table
from xpo_jax.reporting.run_reader import Run, findings, interval, read

QUERIES = "judge queries in training"
# eval/policy/... with a chart of their own; each other metric of a judge's parts gets one as well
_CHARTED = {"valid", "copy", "tokens", "unfinished", "distinct_1", "distinct_2"}


def write(path: str | Path) -> Path:
    """Write <path>/report.html, and return where it is.

    Raises:
      ValueError: as `read`; WriteError if the file cannot be written.
    """
    run = read(path)
    out = run.path / "report.html"
    atomic_write(out, html(run))
    return out


def html(run: Run) -> str:
    """Return the report's page."""
    name = run.path.absolute().name
    ended = "" if run.result is None else str(run.result.get("ended_by"))
    return render(
        "report.html.j2",
        title=f"{name}: xpo_jax",
        name=name,
        step=run.metrics[-1]["step"],
        state={"": "under way", "steps": "finished"}.get(ended, f"ended by {ended}"),
        config=run.config,
        config_json=json.dumps(run.config, indent=2, ensure_ascii=False),
        tiles=tiles(run),
        findings=findings(run),
        held_out=[*held_out_charts([run]), *answer_charts(run)],
        training=training_charts(run),
        samples=samples_table(run.samples),
        pairs=pairs_table(run.pairs, _second(run.config["loss"])),
        result={name: str(value) for name, value in (run.result or {}).items()},
    )


def _second(loss: Mapping[str, Any]) -> str:
    """Return who drew the second answer of a pair; with more candidates it may have been either model."""
    second = str(loss["second_candidate"])
    return second if loss.get("pairing") is None else f"{second}, or another of the policy"


def tiles(run: Run) -> dict[str, str]:
    """Return the main metrics of the last evaluation, by label; "-" for what it does not have."""
    last = run.evaluations[-1]
    return {
        "win rate": interval(last, "win_rate"),
        "at equal lengths": interval(last, "win_rate_controlled"),
        "against the answers": interval(last, "win_rate_answers"),
        "KL, nats per sequence": format_number(last["eval/kl"]),
        "valid": format_number(last.get("eval/policy/valid"), True),
        "copies": format_number(last.get("eval/policy/copy"), True),
        "tokens per answer": format_number(last["eval/policy/tokens"]),
        QUERIES: f"{last['queries']:,}",
    }


# ---- charts ---------------------------------------------------------------------------------------


def line(
    rows: Sequence[Mapping[str, Any]], metric: str, name: str, *, x: str = "step", bands: bool = False
) -> Line:
    """Return a metric over `x` as a line; with `bands` between the metrics of its name with _low and _high."""
    band = [(row.get(f"{metric}_low"), row.get(f"{metric}_high")) for row in rows] if bands else []
    return Line(name, [(row[x], row.get(metric)) for row in rows], band)


def held_out_charts(runs: Sequence[Run]) -> list[Chart | None]:
    """Chart win rate and validity over queries, and win rate over KL, of one run or of several to compare."""
    alone = len(runs) == 1
    rates, valid, kl = [], [], []
    for run in runs:
        rows, path = run.evaluations, str(run.path)
        rates.append(
            line(rows, "eval/win_rate", "all comparisons" if alone else path, x="queries", bands=True)
        )
        valid.append(line(rows, "eval/policy/valid", "policy" if alone else path, x="queries"))
        labels = [f"step {row['step']}" for row in rows]
        points = [(row["eval/kl"], row.get("eval/win_rate")) for row in rows if row["eval/kl"] is not None]
        labelled = alone and len(points) <= 12
        kl.append(Line("win rate" if alone else path, points, labels=labels, labelled=labelled))
        if alone:
            rates.append(line(rows, "eval/win_rate_controlled", "at equal lengths", x="queries"))
            rates.append(line(rows, "eval/win_rate_answers", "against the answers", x="queries"))
            valid.append(line(rows, "eval/reference/valid", "reference", x="queries"))
    return [
        chart("Win rate", rates, x=QUERIES, percent=True, level=0.5),
        chart("Valid answers", valid, x=QUERIES, percent=True),
        chart("Win rate against KL", kl, x="KL, nats per sequence", percent=True, level=0.5),
    ]


def answer_charts(run: Run) -> list[Chart | None]:
    """Chart lengths, variety, and the other metrics of the judge's parts, policy beside reference."""
    rows = run.evaluations

    def both(metric: str, prefix: str = "") -> list[Line]:
        sides = ("policy", "reference")
        return [line(rows, f"eval/{side}/{metric}", f"{prefix}{side}", x="queries") for side in sides]

    policy = "eval/policy/"
    metrics = [name.removeprefix(policy) for name in rows[-1] if name.startswith(policy)]
    return [
        chart("Copies", both("copy"), x=QUERIES, percent=True, zero=True),
        chart("Unfinished answers", both("unfinished"), x=QUERIES, percent=True, zero=True),
        chart("Length of answers, tokens", both("tokens"), x=QUERIES),
        chart(
            "Different words and pairs of words",
            both("distinct_1", "words, ") + both("distinct_2", "pairs, "),
            x=QUERIES,
            percent=True,
        ),
        *(chart(f"The judge's {name}", both(name), x=QUERIES) for name in metrics if name not in _CHARTED),
    ]


def training_charts(run: Run) -> list[Chart | None]:
    """Chart the steps: verdicts, loss terms, KL, entropy, rewards, gradients, seconds."""
    rows, evaluations = [row for row in run.metrics if "loss/total" in row], run.evaluations

    def lines(**metrics: str) -> list[Line]:
        return [line(rows, metric, name) for name, metric in metrics.items()]

    verdicts = lines(won="judge/win_rate", ties="judge/tie_rate", failed="judge/failed_rate")
    rewards = lines(chosen="rewards/chosen", rejected="rewards/rejected", margin="rewards/margins")
    seconds = lines(sample="time/sample", judge="time/judge", score="time/score", update="time/update")
    kl = [line(rows, "objective/kl", "training"), line(evaluations, "eval/kl", "held out")]
    entropy = [line(rows, "objective/entropy", "training"), line(evaluations, "eval/entropy", "held out")]
    return [
        chart("Verdicts", verdicts, x="step", percent=True, zero=True),
        chart("Loss of the preferences", lines(preference="loss/dpo"), x="step"),
        chart("Loss of the exploration bonus", lines(bonus="loss/xpo"), x="step"),
        chart("KL, nats per sequence", kl, x="step"),
        chart("Entropy, nats per token", entropy, x="step", zero=True),
        chart("Implicit rewards", rewards, x="step"),
        chart("Gradient norm", lines(norm="grad_norm"), x="step", zero=True),
        chart("Seconds per step", seconds, x="step", zero=True),
    ]


# ---- texts ----------------------------------------------------------------------------------------


def samples_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate held-out prompts with the first answers of reference and policy, and the verdict on those two."""
    heads = ("prompt", "before (reference)", "after (policy)", "won of all", "verdict", "reason", "scores")
    body = [
        [
            _text(row["prompt"]),
            _text(row["reference"]),
            _text(row["policy"]),
            row["win_share"],
            _verdict(row["p_policy"]),
            _reason(row["reason"], row["shown"], "policy"),
            _scores(row["scores"]),
        ]
        for row in rows
    ]
    return table(heads, body, choice="verdict")


def pairs_table(rows: Sequence[Mapping[str, Any]], second: str) -> Table:
    """Tabulate training pairs, the newest first; `second` is the model that drew the second answer."""
    heads = ("step", "prompt", "first (policy)", f"second ({second})", "verdict", "reason", "scores")
    body = []
    for row in reversed(rows):
        shown = None if row["shown"] is None else "AB"[list(row["shown"]).index(0)]
        first, other = (response["text"] for response in row["responses"])
        body.append(
            [
                row["step"],
                _text(row["messages"][-1]["content"]),
                _text(first),
                _text(other),
                _verdict(row["p_first"]),
                _reason(row["failure"] or row["reason"], shown, "the first"),
                _scores(row["scores"]),
            ]
        )
    return table(heads, body, choice="verdict")


def _text(text: str) -> Cell:
    return Cell(text, text, "text")


def _verdict(p: float | None) -> Cell:
    if p is None:
        return Cell("none", -1.0, "failed")
    kind = "tied" if p == 0.5 else "won" if p > 0.5 else "lost"
    return Cell(f"{kind} ({p:.3f})", p, kind)


def _reason(text: str, shown: str | None, answer: str) -> Cell:
    return Cell(text, text, "reason", note="" if shown is None else f"{answer} was shown as {shown}")


def _scores(scores: Mapping[str, Any]) -> Cell:
    if not scores:
        return Cell("", "")

    def written(value: Any) -> str:
        return format_number(value) if isinstance(value, float) else str(value)

    lines = []
    for name, value in sorted(scores.items()):  # the policy's before the reference's
        inner = value if isinstance(value, Mapping) else {"": value}
        entries = ", ".join(f"{k} {written(v)}".strip() for k, v in inner.items() if v != "")
        lines.append(f"{name}: {entries}")
    return Cell("\n".join(lines), lines[0], folded=True)
