"""Measure where exploration pays: judge queries with and without XPO's bonus on a bandit with a known optimum.

    python -m tools.sample_efficiency [--quick | --rates | --factors] [--out=FOLDER]

Five arms are common in the reference, eight are rare, and one rare arm is by far the best. Loss and optimizer are
those of a training run (tools/research/bandit.py). It counts the verdicts until the policy's KL-regularised value is
90 % of the way from the reference's to the optimum's, for alpha / beta of 0, 0.02 and 0.1: until it first is, and until
it stays there to the end. It prints medians over seeds, the ratio of medians (alpha 0 on the same bandit over this arm:
above 1 the arm needs fewer), the regret per run, and 95 % percentile bootstrap intervals. Seeds are resampled jointly
for both parts of a ratio, because runs of one seed share their random numbers. A run that never reaches the goal is
censored at the verdicts that it used: a median or a ratio with it is "> n" or "< n", or "-" if nothing is known, and an
interval may end at inf.

docs/sample_efficiency.md shows the results beside what is known of the paper's statements.

Examples:
  python -m tools.sample_efficiency                        all settings, 32 seeds; two or three minutes on two cores
  python -m tools.sample_efficiency --quick                12 seeds, the settings that matter most
  python -m tools.sample_efficiency --out=build/bandit     also results.json and the figure (needs the extra "report")
  python -m tools.sample_efficiency --rates                compare learning rates
  python -m tools.sample_efficiency --factors              change one thing each, without and with junk arms

Exit status: 0 done, 2 invalid input (one line explains), 130 interrupted.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tools.cli import Parser, exit_status, path_argument
from tools.intervals import Censored, Estimate, median, ratio, reached
from tools.research import bandit, bandit_figure
from tools.research.bandit_cases import (
    BETA,
    CURVES,
    LEARNING_RATES,
    PAIRS,
    RATIOS,
    UPDATES,
    Case,
    cases,
    factor_cases,
    rate_cases,
    simulate,
)
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.reporting.console import console_width, text_table

GOAL = 0.9  # fraction of the way to the optimum

# ---- the figures --------------------------------------------------------------------------------


def evaluate(all_cases: Sequence[Case], curves: Sequence[bandit.Curve]) -> list[dict[str, Any]]:
    """Return a row for each case; ratios are those to the first case of its setting."""
    rows: list[dict[str, Any]] = []
    base: dict[str, tuple[Censored, Censored]] = {}
    for case, curve in zip(all_cases, curves, strict=True):
        problem = bandit.make_bandit(beta=BETA, **case.bandit)
        progressed = bandit.progress_to_optimum(problem, curve)
        both = [
            reached(progressed >= GOAL, curve.queries, sustained=sustained) for sustained in (False, True)
        ]
        regret = bandit.regret(problem, curve)
        first, last = base.setdefault(case.setting, (both[0], both[1]))
        rows.append(
            {
                "setting": case.setting,
                "arm": case.arm,
                "solved": float(np.isfinite(both[0].at_most).mean()),
                "solved_at_end": float(np.isfinite(both[1].at_most).mean()),
                "first": median(both[0]),
                "sustained": median(both[1]),
                "ratio_first": ratio(first, both[0]),
                "ratio_sustained": ratio(last, both[1]),
                "regret": median(Censored(regret, regret)),
                "final_share": float(np.median(progressed[:, -1])),
                "queries": float(np.median(curve.queries[:, -1])),
            }
        )
    return rows


# ---- what is printed ----------------------------------------------------------------------------------

SHOWN = {
    "setting": "setting",
    "arm": "arm",
    "solved": "solved",
    "solved_at_end": "at end",
    "first": "queries, first",
    "ratio_first": "ratio",
    "sustained": "queries, sustained",
    "ratio_sustained": "ratio",
    "regret": "regret",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    cells = [[str(v) if isinstance(v := row[name], Estimate) else v for name in SHOWN] for row in rows]
    return text_table(list(SHOWN.values()), cells, width=200)


def rates_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return sustained queries of alpha 0 and the ratio of the other alpha, by learning rate; the mean decides."""
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    settings = dict.fromkeys(row["setting"].split(", ")[1] for row in rows)
    for zero, other in zip(rows[::2], rows[1::2], strict=True):
        pairs.setdefault(zero["setting"].split(", ")[0], []).append((zero, other))
    cells = []
    for name, both in pairs.items():
        mean = float(np.exp(np.mean(np.log([zero["sustained"].at_most for zero, _ in both]))))
        cells.append([name, *(f"{z['sustained']}; {o['ratio_sustained']}" for z, o in both), mean])
    return text_table(["optimizer", *settings, "geometric mean"], cells, width=200)


def paragraph(rows: Sequence[dict[str, Any]], seeds: int) -> str:
    """Return the results in words, with intervals."""
    by = {(row["setting"], row["arm"]): row for row in rows}
    small, large = (f"alpha/beta {ratio:g}" for ratio in RATIOS[1:])
    ratios = [
        f"{setting}: {row['ratio_first']} at {small}, {by[setting, large]['ratio_first']} at {large}"
        for (setting, arm), row in by.items()
        if arm == small
    ]
    wrong = [f"{s}: {row['ratio_first']}" for (s, arm), row in by.items() if arm == "wrong sign, -0.02"]
    return textwrap.fill(
        f"Times fewer verdicts than alpha 0 until the policy is first {GOAL:.0%} of the way to the optimum (ratio of"
        f" medians over {seeds} seeds, 95 % bootstrap interval; below 1 the bonus costs verdicts). {'; '.join(ratios)}."
        f" With the sign of the bonus flipped (-0.02): {'; '.join(wrong)}.",
        console_width(),
    )


# ---- the command ------------------------------------------------------------------------------------


def run(argv: Sequence[str]) -> int:
    """Simulate, print and write the results; return the exit status.

    Raises:
      ValueError: an unknown argument, or a figure without matplotlib.
    """
    parser = Parser(prog="python -m tools.sample_efficiency", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="12 seeds, few settings, a quarter of the rounds"
    )
    parser.add_argument(
        "--rates", action="store_true", help="compare learning rates instead; not with --quick"
    )
    parser.add_argument(
        "--factors", action="store_true", help="one change per arm, instead of the main table"
    )
    parser.add_argument("--out", type=path_argument, help="folder for results.json and the figure")
    options = parser.parse_args(argv)
    instead = [f"--{name}" for name in ("rates", "factors") if getattr(options, name)]
    if instead and (options.quick or options.out or len(instead) > 1):
        raise ValueError(f"{instead[0]} cannot be combined with --quick, --out or another table")
    if options.out:
        bandit_figure.require()
        options.out.mkdir(parents=True, exist_ok=True)
    if options.rates or options.factors:
        all_cases = rate_cases() if options.rates else factor_cases()
    else:
        all_cases = cases(quick=options.quick)
    seeds, rounds = 12 if options.quick else 32, 1024 if options.quick or options.rates else 4096
    begun = time.monotonic()
    curves = simulate(all_cases, seeds=seeds, rounds=rounds)
    rows = evaluate(all_cases, curves)
    if options.rates or options.factors:
        print(rates_table(rows) if options.rates else table(rows))
        return 0
    about = {
        "beta": BETA,
        "goal": GOAL,
        "seeds": seeds,
        "rounds": rounds,
        "pairs_per_round": PAIRS,
        "updates_per_round": UPDATES,
        "learning_rates": LEARNING_RATES,
        "jax": jax.__version__,
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(table(rows), paragraph(rows, seeds), to_json(about), sep="\n\n")
    if options.out:
        plain = [{k: v._asdict() if isinstance(v, Estimate) else v for k, v in row.items()} for row in rows]
        text = to_json({"about": about, "rows": plain}, indent=1)
        atomic_write(options.out / "results.json", text + "\n")
        shares = {
            case.arm: (
                bandit.progress_to_optimum(bandit.make_bandit(beta=BETA, **case.bandit), curve),
                curve.queries,
            )
            for case, curve in zip(all_cases, curves, strict=True)
            if case.setting == CURVES and case.arm.startswith("alpha/beta")
        }
        bandit_figure.draw(rows, shares, CURVES, options.out / "sample_efficiency.svg")
        print(f"\nwritten: {options.out}/results.json and sample_efficiency.svg")
    return 0


def main(argv: Sequence[str]) -> int:
    """Measure sample efficiency; return the exit status."""
    return exit_status("sample_efficiency", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
