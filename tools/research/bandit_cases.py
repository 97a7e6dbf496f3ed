"""What tools.sample_efficiency compares: bandits, and learners on them that differ in one thing; and their runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from tools.research import bandit
from xpo_jax.algorithm import losses
from xpo_jax.reporting.summary import progress

BETA = 0.2  # of the objective
PAIRS = UPDATES = 4  # per round
RATIOS = (0.0, 0.02, 0.1)  # alpha / beta
MASSES = (0.03, 0.01, 1e-3, 1e-4)  # of each rare arm
# The rates of the grid with which alpha 0 needs the fewest queries, see --rates.
LEARNING_RATES = {"adam": 0.3, "sgd": 100.0}
CURVES = "rare mass 0.001"  # the setting whose curves are plotted
GRID = {"adam": (0.01, 0.03, 0.1, 0.3, 1.0), "sgd": (3.0, 10.0, 30.0, 100.0, 300.0)}


class Case(NamedTuple):
    """A setting (the bandit) and an arm of the comparison (the learner)."""

    setting: str
    arm: str
    ratio: float  # alpha / beta
    bandit: Mapping[str, Any]  # arguments of make_bandit
    optimizer: str = "adam"
    learning_rate: float | None = None  # None: the optimizer's in LEARNING_RATES
    loss: str = "plain"  # of LOSSES
    run: Mapping[str, Any] = {}  # fields of bandit.Run that differ from PLAIN


PLAIN = {
    "temperature": 1.0,
    "second_temperature": 1.0,
    "on_policy": False,
    "fading": math.inf,
    "fresh": False,
}

# A pair's loss. The bounded bonus has four times alpha, so that its slope at pi = ref is the linear one's.
LOSSES = {
    "plain": bandit.XPO,
    "bounded": losses.Sigmoid(bonus_clip=bandit.CLIP, bonus="bounded"),
    "rejected": losses.Sigmoid(bonus_clip=bandit.CLIP, bonus_sample="rejected"),
}


def _arms(setting: str, ratios: Sequence[float] = RATIOS, **fields: Any) -> list[Case]:
    return [Case(setting, f"alpha/beta {ratio:g}", ratio, **fields) for ratio in ratios]


def cases(*, quick: bool) -> list[Case]:
    """Return all cases. The first case of a setting is the baseline of its ratios."""
    all_cases = []
    for mass in MASSES[2:3] if quick else MASSES:
        name, arguments = f"rare mass {mass:g}", {"mass": mass}
        all_cases += _arms(name, bandit=arguments)
        all_cases += [Case(name, f"wrong sign, {ratio:g}", ratio, arguments) for ratio in (-0.02, -0.1)]
        if mass in (0.03, 1e-3) and not quick:
            all_cases.append(
                Case(name, "online DPO: (policy, policy)", 0.0, arguments, run={"on_policy": True})
            )
            warm = {"temperature": 2.0, "second_temperature": 2.0}
            for ratio in (0.0, 0.02):
                all_cases.append(
                    Case(name, f"temperature 2, alpha/beta {ratio:g}", ratio, arguments, run=warm)
                )
    all_cases += _arms("uniform reference", bandit={"mass": 0.0, "uniform": True})
    if not quick:
        all_cases += _arms("best arm is common", bandit={"mass": 1e-3, "best": "common"})
        all_cases += _arms("50 junk arms", bandit={"mass": 1e-3, "junk": 50})
        for mass in (0.01, 1e-3):
            all_cases += _arms(f"plain SGD, {mass:g}", bandit={"mass": mass}, optimizer="sgd")
    return all_cases


def factor_cases() -> list[Case]:
    """Return the cases that change one thing each, as the arms of tools.rare_mode do."""
    all_cases = []
    for setting, arguments in (
        (CURVES, {"mass": 1e-3}),
        ("50 junk arms", {"mass": 1e-3, "junk": 50}),
    ):
        plain = _arms(setting, RATIOS[:2], bandit=arguments)
        all_cases += plain
        for name, fields in (
            ("fresh pairs", {"fresh": True}),
            ("two of the policy", {"on_policy": True}),
            ("second at temperature 2", {"second_temperature": 2.0}),
        ):
            all_cases += [case._replace(arm=f"{name}, {case.ratio:g}", run=fields) for case in plain]
        bonus = plain[1]
        all_cases += [
            bonus._replace(arm="bounded, 0.02", loss="bounded", ratio=4 * bonus.ratio),
            bonus._replace(
                arm="two of the policy, bounded, 0.02",
                loss="bounded",
                ratio=4 * bonus.ratio,
                run={"on_policy": True},
            ),
            bonus._replace(arm="on the rejected, 0.02", loss="rejected"),
            bonus._replace(arm="0.02 to 0 in 128 rounds", run={"fading": 128.0}),
        ]
        all_cases += _arms(f"{setting}, SGD", RATIOS[:2], bandit=arguments, optimizer="sgd")
    return all_cases


def rate_cases() -> list[Case]:
    """Return alpha 0 and one other alpha at each learning rate, in settings that alpha 0 solves within the budget."""
    return [
        case._replace(setting=f"{optimizer} {rate:g}, {setting}")
        for optimizer, rates in GRID.items()
        for rate in rates
        for setting, arguments in (
            *((f"{mass:g}", {"mass": mass}) for mass in MASSES[:3]),
            ("uniform", {"mass": 0.0, "uniform": True}),
        )
        for case in _arms(setting, RATIOS[:2], bandit=arguments, optimizer=optimizer, learning_rate=rate)
    ]


def simulate(all_cases: Sequence[Case], *, seeds: int, rounds: int) -> list[bandit.Curve]:
    """Return the curves [seeds rounds] of each case; with junk arms, only a quarter of the rounds, which cost 20 x."""
    groups: dict[tuple[str, float, str, int], list[int]] = {}
    for index, case in enumerate(all_cases):
        rate = case.learning_rate or LEARNING_RATES[case.optimizer]
        groups.setdefault((case.optimizer, rate, case.loss, case.bandit.get("junk", 0)), []).append(index)
    curves: dict[int, bandit.Curve] = {}
    for number, ((optimizer, rate, loss, junk), members) in enumerate(groups.items(), 1):
        label = (
            f"{number}/{len(groups)}: {len(members)} x {seeds} runs, {optimizer}{', junk' if junk else ''}"
        )
        curve = bandit.simulate(
            [_run(all_cases[index], seed) for index in members for seed in range(seeds)],
            {"adam": bandit.adam, "sgd": optax.sgd}[optimizer](rate),
            pairs=PAIRS,
            updates=UPDATES,
            rounds=rounds // 4 if junk else rounds,
            of_pairs=LOSSES[loss],
            progress=functools.partial(progress, label=label),
        )
        for position, index in enumerate(members):
            part = slice(position * seeds, (position + 1) * seeds)
            curves[index] = bandit.Curve(curve.value[part], curve.queries[part])
    return [curves[index] for index in range(len(all_cases))]


def _run(case: Case, seed: int) -> bandit.Run:
    fields = {name: jnp.asarray(value) for name, value in {**PLAIN, **case.run}.items()}
    return bandit.Run(
        bandit=bandit.make_bandit(beta=BETA, **case.bandit),
        alpha=jnp.float32(case.ratio * BETA),
        seed=jnp.int32(seed),
        **fields,
    )
