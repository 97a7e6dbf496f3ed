"""Where does exploration pay? Judge queries with and without XPO's bonus, on a bandit where the optimum is known.

    python -m tools.sample_efficiency [--quick] [--rates] [--out=FOLDER]

Five arms are common in the reference, eight are rare, and one rare arm is the best by far. Loss and optimizer are
those of a training run (tools/research/bandit.py). Counted are the verdicts until the policy has come 90 % of the way
from the reference's KL-regularised value to the optimum's, for alpha / beta of 0, 0.02 and 0.1: first, and from when on
it stays there to the end. Shown are medians over seeds, the ratio of medians (alpha 0 of the same bandit to this arm:
above 1 the arm needs fewer), the regret per run, and percentile bootstrap intervals of 95 %. Seeds are resampled
jointly for both parts of a ratio, since runs of one seed share their random numbers. A run that never gets there is
censored at the verdicts that it used up: a median or a ratio with it is "> n" or "< n", or "-" where nothing is known,
and an interval may end at inf.

docs/sample_efficiency.md shows the results with what the paper proves.

Examples:
  python -m tools.sample_efficiency                        all settings, 32 seeds; two or three minutes on two cores
  python -m tools.sample_efficiency --quick                12 seeds, the settings that matter most
  python -m tools.sample_efficiency --out=build/bandit     also results.json and the figure (needs the extra "report")
  python -m tools.sample_efficiency --rates                how the learning rates were chosen, and what others give

Exit status: 0, or 2 for invalid input (one line says what).
"""

from __future__ import annotations

import functools
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tools.cli import Parser, exit_status
from tools.intervals import Censored, Estimate, median, ratio, reached
from tools.research import bandit, bandit_figure
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.reporting.console import console_width, text_table
from xpo_jax.reporting.summary import progress

BETA, SHARE = 0.2, 0.9  # of the objective; of the way to the optimum
PAIRS = UPDATES = 4  # per round
STRENGTHS = (0.0, 0.02, 0.1)  # alpha / beta
MASSES = (0.03, 0.01, 1e-3, 1e-4)  # of each rare arm
# Of the grid those with which alpha 0 needs the fewest queries, see --rates.
LEARNING_RATES = {"adam": 0.3, "sgd": 100.0}
CURVES = "rare mass 0.001"  # the setting whose curves are drawn
GRID = {"adam": (0.01, 0.03, 0.1, 0.3, 1.0), "sgd": (3.0, 10.0, 30.0, 100.0, 300.0)}

# ---- the settings -----------------------------------------------------------------------------------


class Case(NamedTuple):
    """A setting (which bandit) and an arm of the comparison (which learner)."""

    setting: str
    arm: str
    ratio: float  # alpha / beta
    bandit: dict[str, Any]  # arguments of make_bandit
    optimizer: str = "adam"
    temperature: float = 1.0
    on_policy: bool = False
    learning_rate: float | None = None  # the optimizer's of LEARNING_RATES


def _arms(setting: str, strengths: Sequence[float] = STRENGTHS, **fields: Any) -> list[Case]:
    return [Case(setting, f"alpha/beta {ratio:g}", ratio, **fields) for ratio in strengths]


def cases(*, quick: bool) -> list[Case]:
    """All of them. The first case of a setting is the one that the others' ratios are to."""
    found = []
    for mass in MASSES[2:3] if quick else MASSES:
        name, own = f"rare mass {mass:g}", {"mass": mass}
        found += _arms(name, bandit=own)
        found += [Case(name, f"wrong sign, {ratio:g}", ratio, own) for ratio in (-0.02, -0.1)]
        if mass in (0.03, 1e-3) and not quick:
            found.append(Case(name, "online DPO: (policy, policy)", 0.0, own, on_policy=True))
            for ratio in (0.0, 0.02):
                found.append(Case(name, f"temperature 2, alpha/beta {ratio:g}", ratio, own, temperature=2.0))
    found += _arms("uniform reference", bandit={"mass": 0.0, "uniform": True})
    if not quick:
        found += _arms("best arm is common", bandit={"mass": 1e-3, "best": "common"})
        found += _arms("50 junk arms", bandit={"mass": 1e-3, "junk": 50})
        for mass in (0.01, 1e-3):
            found += _arms(f"plain SGD, {mass:g}", bandit={"mass": mass}, optimizer="sgd")
    return found


def rate_cases() -> list[Case]:
    """Alpha 0, and one alpha beside it, where alpha 0 gets there within the budget, at each learning rate."""
    return [
        case._replace(setting=f"{optimizer} {rate:g}, {setting}")
        for optimizer, rates in GRID.items()
        for rate in rates
        for setting, own in (
            *((f"{mass:g}", {"mass": mass}) for mass in MASSES[:3]),
            ("uniform", {"mass": 0.0, "uniform": True}),
        )
        for case in _arms(setting, STRENGTHS[:2], bandit=own, optimizer=optimizer, learning_rate=rate)
    ]


def simulate(found: Sequence[Case], *, seeds: int, rounds: int) -> list[bandit.Curve]:
    """The curves [seeds rounds] of each case; with junk arms a quarter of the rounds, for each costs 20 times more."""
    groups: dict[tuple[str, float, int], list[int]] = {}
    for index, case in enumerate(found):
        rate = case.learning_rate or LEARNING_RATES[case.optimizer]
        groups.setdefault((case.optimizer, rate, case.bandit.get("junk", 0)), []).append(index)
    curves: dict[int, bandit.Curve] = {}
    for number, ((optimizer, rate, junk), members) in enumerate(groups.items(), 1):
        label = (
            f"{number}/{len(groups)}: {len(members)} x {seeds} runs, {optimizer}{', junk' if junk else ''}"
        )
        got = bandit.simulate(
            [_run(found[index], seed) for index in members for seed in range(seeds)],
            {"adam": bandit.adam, "sgd": optax.sgd}[optimizer](rate),
            pairs=PAIRS,
            updates=UPDATES,
            rounds=rounds // 4 if junk else rounds,
            progress=functools.partial(progress, label=label),
        )
        for place, index in enumerate(members):
            part = slice(place * seeds, (place + 1) * seeds)
            curves[index] = bandit.Curve(got.value[part], got.queries[part])
    return [curves[index] for index in range(len(found))]


def _run(case: Case, seed: int) -> bandit.Run:
    return bandit.Run(
        bandit.make_bandit(beta=BETA, **case.bandit),
        jnp.float32(case.ratio * BETA),
        jnp.float32(case.temperature),
        jnp.bool_(case.on_policy),
        jnp.int32(seed),
    )


# ---- what is counted --------------------------------------------------------------------------------


def evaluate(found: Sequence[Case], curves: Sequence[bandit.Curve]) -> list[dict[str, Any]]:
    """One row for each case; ratios are to the first case of its setting."""
    rows: list[dict[str, Any]] = []
    base: dict[str, tuple[Censored, Censored]] = {}
    for case, curve in zip(found, curves, strict=True):
        known = bandit.make_bandit(beta=BETA, **case.bandit)
        share = bandit.share(known, curve)
        both = [reached(share >= SHARE, curve.queries, sustained=each) for each in (False, True)]
        regret = bandit.regret(known, curve)
        first, sustained = base.setdefault(case.setting, (both[0], both[1]))
        rows.append(
            {
                "setting": case.setting,
                "arm": case.arm,
                "solved": float(np.isfinite(both[0].at_most).mean()),
                "solved_at_end": float(np.isfinite(both[1].at_most).mean()),
                "first": median(both[0]),
                "sustained": median(both[1]),
                "ratio_first": ratio(first, both[0]),
                "ratio_sustained": ratio(sustained, both[1]),
                "regret": median(Censored(regret, regret)),
                "final_share": float(np.median(share[:, -1])),
                "queries": float(np.median(curve.queries[:, -1])),
            }
        )
    return rows


# ---- what is shown ----------------------------------------------------------------------------------

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
    """The rows for a console."""
    cells = [[str(v) if isinstance(v := row[name], Estimate) else v for name in SHOWN] for row in rows]
    return text_table(list(SHOWN.values()), cells, width=200)


def rates_table(rows: Sequence[dict[str, Any]]) -> str:
    """Sustained queries of alpha 0 and of the alpha beside it by learning rate; the mean chooses the rate."""
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    settings = dict.fromkeys(row["setting"].split(", ")[1] for row in rows)
    for zero, other in zip(rows[::2], rows[1::2], strict=True):
        pairs.setdefault(zero["setting"].split(", ")[0], []).append((zero, other))
    mean = lambda found: float(np.exp(np.mean(np.log([zero["sustained"].at_most for zero, _ in found]))))  # noqa: E731
    cells = [
        [name, *(f"{z['sustained']}; {o['ratio_sustained']}" for z, o in found), mean(found)]
        for name, found in pairs.items()
    ]
    return text_table(["optimizer", *settings, "geometric mean"], cells, width=200)


def paragraph(rows: Sequence[dict[str, Any]], seeds: int) -> str:
    """What came out, in words and intervals."""
    by = {(row["setting"], row["arm"]): row for row in rows}
    small, large = (f"alpha/beta {ratio:g}" for ratio in STRENGTHS[1:])
    told = [
        f"{setting}: {row['ratio_first']} at {small}, {by[setting, large]['ratio_first']} at {large}"
        for (setting, arm), row in by.items()
        if arm == small
    ]
    wrong = [f"{s}: {row['ratio_first']}" for (s, arm), row in by.items() if arm == "wrong sign, -0.02"]
    return textwrap.fill(
        f"Times fewer verdicts than alpha 0 until the policy first is {SHARE:.0%} of the way to the optimum (ratio of"
        f" medians over {seeds} seeds, 95 % bootstrap interval; below 1 the bonus costs verdicts). {'; '.join(told)}."
        f" With the sign of the bonus turned round (-0.02): {'; '.join(wrong)}.",
        console_width(),
    )


# ---- the command ------------------------------------------------------------------------------------


def run(argv: Sequence[str]) -> int:
    """Simulate, print, write.

    Raises:
      ValueError: an argument that is not understood, or a figure without the library that draws it.
    """
    parser = Parser(prog="python -m tools.sample_efficiency", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="12 seeds, few settings, a quarter of the rounds"
    )
    parser.add_argument("--rates", action="store_true", help="compare learning rates instead; never quick")
    parser.add_argument(
        "--out", type=Path, help="an existing or a new folder for results.json and the figure"
    )
    options = parser.parse_args(argv)
    if options.rates and (options.quick or options.out):
        raise ValueError("--rates goes with neither --quick nor --out")
    if options.out:
        bandit_figure.require()
        options.out.mkdir(parents=True, exist_ok=True)
    found = rate_cases() if options.rates else cases(quick=options.quick)
    seeds, rounds = 12 if options.quick else 32, 1024 if options.quick or options.rates else 4096
    begun = time.monotonic()
    curves = simulate(found, seeds=seeds, rounds=rounds)
    rows = evaluate(found, curves)
    if options.rates:
        print(rates_table(rows))
        return 0
    about = {
        "beta": BETA,
        "share": SHARE,
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
            case.arm: (bandit.share(bandit.make_bandit(beta=BETA, **case.bandit), curve), curve.queries)
            for case, curve in zip(found, curves, strict=True)
            if case.setting == CURVES and case.arm.startswith("alpha/beta")
        }
        bandit_figure.draw(rows, shares, CURVES, options.out / "sample_efficiency.svg")
        print(f"\nwritten: {options.out}/results.json and sample_efficiency.svg")
    return 0


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    return exit_status("sample_efficiency", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
