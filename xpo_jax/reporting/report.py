"""report.html of a run: what was learned, whether it is healthy, and the texts, in one file for a browser.

What it shows comes from run_reader.py, how it looks from html.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpo_jax.io.files import atomic_write
from xpo_jax.reporting.html import Cell, Line, chart, escape, number, page, pairs, table
from xpo_jax.reporting.run_reader import Run, findings, interval, read

# eval/policy/... that have a chart of their own; what else a judge's parts tell is shown together
_KNOWN = {"valid", "copy", "tokens", "unfinished", "distinct_1", "distinct_2"}


def write(path: str | Path) -> Path:
    """Write <path>/report.html, and return where it is.

    Raises:
      ValueError: as `read`; WriteError where the disk refuses.
    """
    run = read(path)
    out = run.path / "report.html"
    atomic_write(out, html(run))
    return out


def html(run: Run) -> str:
    """The report."""
    name = run.path.absolute().name
    ended = "" if run.result is None else str(run.result.get("ended_by"))
    state = {"": "under way", "steps": "finished"}.get(ended, f"ended by {ended}")
    found = "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in findings(run))
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="quiet">{run.metrics[-1]["step"]} of {run.config["steps"]} steps, {escape(state)}; judge'
        f" {escape(run.config['judge']['name'])}, model {escape(run.config['model']['path'])}</p>",
        tiles(run),
        f'<ul class="findings">{found}</ul>',
        f'<h2>Held out</h2><div class="charts">{held_out_charts([run])}{parts_charts(run)}</div>',
        f'<h2>Training</h2><div class="charts">{training_charts(run)}</div>',
    ]
    if run.samples:
        parts += ["<h2>Held-out prompts, before and after</h2>", samples_table(run.samples)]
    if run.pairs:
        last = f"The last {len(run.pairs)} training pairs"
        parts += [f"<h2>{last}</h2>", pairs_table(run.pairs, run.config["loss"]["second_candidate"])]
    parts += [
        f"<details><summary>Result</summary>{pairs(run.result)}</details>" if run.result else "",
        f"<details><summary>Config</summary><pre>{escape(json.dumps(run.config, indent=2, ensure_ascii=False))}"
        "</pre></details>",
    ]
    return page(f"{name}: xpo_jax", parts)


def tiles(run: Run) -> str:
    """The figures of the last evaluation."""
    last = run.evaluations[-1]
    figures = {
        "win rate": interval(last, "win_rate"),
        "at equal lengths": interval(last, "win_rate_controlled"),
        "against the answers": interval(last, "win_rate_answers"),
        "KL, nats per answer": number(last["eval/kl"]),
        "valid": number(last.get("eval/policy/valid"), True),
        "copies": number(last.get("eval/policy/copy"), True),
        "tokens per answer": number(last["eval/policy/tokens"]),
        "judge queries in training": f"{last['queries']:,}",
    }
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><small>{escape(name)}</small></div>'
            for name, value in figures.items()
            if value != "-"
        )
        + "</div>"
    )


# ---- charts ---------------------------------------------------------------------------------------


def line(
    rows: Sequence[Mapping[str, Any]], name: str, said: str, *, x: str = "step", bands: bool = False
) -> Line:
    """A metric over `x`; with `bands` between the metrics of its name with _low and _high."""
    band = [(row.get(f"{name}_low"), row.get(f"{name}_high")) for row in rows] if bands else []
    return Line(said, [(row[x], row.get(name)) for row in rows], band)


def held_out_charts(runs: Sequence[Run]) -> str:
    """Win rate and validity against queries, and win rate against KL; of one run, or of several to compare."""
    alone = len(runs) == 1
    of = lambda run, what: what if alone else str(run.path)  # noqa: E731
    rates, valid, kl = [], [], []
    for run in runs:
        found = run.evaluations
        rates.append(line(found, "eval/win_rate", of(run, "all comparisons"), x="queries", bands=True))
        valid.append(line(found, "eval/policy/valid", of(run, "policy"), x="queries"))
        labels = [f"step {row['step']}" for row in found]
        points = [(row["eval/kl"], row.get("eval/win_rate")) for row in found if row["eval/kl"] is not None]
        kl.append(Line(of(run, "win rate"), points, labels=labels, marked=alone and len(points) <= 12))
        if alone:
            rates.append(line(found, "eval/win_rate_controlled", "at equal lengths", x="queries"))
            rates.append(line(found, "eval/win_rate_answers", "against the answers", x="queries"))
            valid.append(line(found, "eval/reference/valid", "reference", x="queries"))
    return (
        chart("Win rate", rates, x="judge queries in training", percent=True, level=0.5)
        + chart("Valid answers", valid, x="judge queries in training", percent=True)
        + chart("Win rate against KL", kl, x="KL, nats per answer", percent=True, level=0.5)
    )


def parts_charts(run: Run) -> str:
    """Lengths, variety, and what else the judge's parts tell, policy beside reference."""
    found, x = run.evaluations, "judge queries in training"

    def both(name: str, said: str) -> list[Line]:
        return [
            line(found, f"eval/{side}/{name}", f"{said}{side}", x="queries")
            for side in ("policy", "reference")
        ]

    prefix = "eval/policy/"
    others = [name.removeprefix(prefix) for name in found[-1] if name.startswith(prefix)]
    return (
        chart("Copies", both("copy", ""), x=x, percent=True, zero=True)
        + chart("Unfinished answers", both("unfinished", ""), x=x, percent=True, zero=True)
        + chart("Length of answers, tokens", both("tokens", ""), x=x)
        + chart(
            "Different words and pairs of words",
            both("distinct_1", "words, ") + both("distinct_2", "pairs, "),
            x=x,
            percent=True,
        )
        + "".join(chart(f"The judge's {name}", both(name, ""), x=x) for name in others if name not in _KNOWN)
    )


def training_charts(run: Run) -> str:
    """The steps: verdicts, loss parts, KL, entropy, rewards, gradients, seconds."""
    rows, found = [row for row in run.metrics if "loss/total" in row], run.evaluations
    some = lambda **names: [line(rows, name, said) for said, name in names.items()]  # noqa: E731
    return "".join(
        [
            chart(
                "Verdicts",
                some(won="judge/win_rate", ties="judge/tie_rate", failed="judge/failed_rate"),
                x="step",
                percent=True,
                zero=True,
            ),
            chart("Loss of the preferences", some(preference="loss/dpo"), x="step"),
            chart("Loss of the exploration bonus", some(bonus="loss/xpo"), x="step"),
            chart(
                "KL, nats per answer",
                [line(rows, "objective/kl", "training"), line(found, "eval/kl", "held out")],
                x="step",
            ),
            chart(
                "Entropy, nats per token",
                [line(rows, "objective/entropy", "training"), line(found, "eval/entropy", "held out")],
                x="step",
                zero=True,
            ),
            chart(
                "Implicit rewards",
                some(chosen="rewards/chosen", rejected="rewards/rejected", margin="rewards/margins"),
                x="step",
            ),
            chart("Gradient norm", some(norm="grad_norm"), x="step", zero=True),
            chart(
                "Seconds per step",
                some(sample="time/sample", judge="time/judge", score="time/score", update="time/update"),
                x="step",
                zero=True,
            ),
        ]
    )


# ---- texts ----------------------------------------------------------------------------------------


def samples_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Held-out prompts with the first answers of reference and policy, and what the judge said of those two."""
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
    return table(heads, body, choices="verdict")


def pairs_table(rows: Sequence[Mapping[str, Any]], second: str) -> str:
    """Training pairs; `second` says who drew the second answer."""
    heads = ("step", "prompt", "first (policy)", f"second ({second})", "verdict", "reason", "scores")
    body = []
    for row in reversed(rows):  # the newest first
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
    return table(heads, body, choices="verdict")


def _text(text: str) -> Cell:
    return Cell(escape(text), text, "text")


def _verdict(p: float | None) -> Cell:
    if p is None:
        return Cell("none", -1.0, "failed")
    kind = "tied" if p == 0.5 else "won" if p > 0.5 else "lost"
    return Cell(f"{kind} ({p:.3f})", p, kind)


def _reason(text: str, shown: str | None, who: str) -> Cell:
    told = "" if shown is None else f'<br><span class="quiet">{who} was shown as {shown}</span>'
    return Cell(escape(text) + told, text, "reason")


def _scores(scores: Mapping[str, Any]) -> Cell:
    if not scores:
        return Cell("", "")

    def said(value: Any) -> str:
        return number(value) if isinstance(value, float) else str(value)

    lines = []
    for name, value in sorted(scores.items()):  # the policy's before the reference's
        inner = value if isinstance(value, Mapping) else {"": value}
        lines.append(f"{name}: " + ", ".join(f"{k} {said(v)}".strip() for k, v in inner.items() if v != ""))
    return Cell(f"<details><summary>show</summary>{escape(chr(10).join(lines))}</details>", lines[0])
