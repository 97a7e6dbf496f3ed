"""The runs of a sweep, and the value of the tuned field that each arm takes.

Nothing here starts a run; sweep.py does. Left out on purpose: any rule for the tuned value other than the best mean
held-out win rate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.config.evaluation import Evaluation
from xpo_jax.config.loss import make_loss
from xpo_jax.data.prompts import load_prompts
from xpo_jax.experiment import config_changes, judge_factory
from xpo_jax.models.lora import LoRA
from xpo_jax.reporting.run_reader import read as read_run

from .spec import Arm, Sweep

Result = Mapping[str, Any]
Ended = Mapping[Path, Result | None]  # by run_dir; None: failed


class Planned(NamedTuple):
    """One run: its arm, its value of the tuned field (None: not tuned), and the run that must finish before it."""

    arm: Arm
    value: float | None
    seed: int
    run_dir: Path
    after: Path | None
    overrides: tuple[str, ...]

    @property
    def log(self) -> Path:
        """The file of its output, beside the run directory, which holds only the run's own files."""
        return self.run_dir.with_name(self.run_dir.name + ".log")

    @property
    def arguments(self) -> list[str]:
        """The arguments of `python -m xpo_jax.main`."""
        return [f"--config={self.arm.config}", *(f"--config.{override}" for override in self.overrides)]


def check(sweep: Sweep) -> None:
    """Check each arm's config as far as possible without data, model or devices.

    Raises:
      ValueError: an invalid config; the message names the arm.
    """
    for arm in sweep.arms:
        for value in _values(sweep, arm) or (None,):
            try:
                _check(_run(sweep, arm, value, sweep.seeds[0], Path("a_run_before")))
            except ValueError as error:
                raise ValueError(f"arm {arm.name!r}: {error}") from None


def plan(sweep: Sweep, ended: Ended) -> list[Planned]:
    """Return the runs known so far, in the order of the file; an arm's final runs follow once its value is chosen."""
    planned = []
    for arm in sweep.arms:
        best, seeds = chosen(sweep, arm, ended), _tuning_seeds(sweep)
        runs: list[tuple[float | None, int]] = [(v, seed) for v in _values(sweep, arm) for seed in seeds]
        if _serves_tuning(sweep, arm):
            runs += [(None, seed) for seed in seeds]
        if best is not None or not arm.tuned:
            runs += [(best, seed) for seed in sweep.seeds]
        for value, seed in runs:
            if arm.after is None:
                planned.append(_run(sweep, arm, value, seed, None))
                continue
            before = sweep.arm(arm.after)
            value_before = chosen(sweep, before, ended)
            if not before.tuned or value_before is not None:
                planned.append(_run(sweep, arm, value, seed, run_dir(sweep, before, value_before, seed)))
    return planned


def total(sweep: Sweep) -> int:
    """Return the total number of runs."""
    count = 0
    for arm in sweep.arms:
        tuning = len(_values(sweep, arm)) or int(_serves_tuning(sweep, arm))
        count += len(sweep.seeds) + tuning * len(_tuning_seeds(sweep))
    return count


def tuning(sweep: Sweep, arm: Arm, ended: Ended) -> dict[float, list[float | None]]:
    """Return {value: held-out win rates on the tuning seeds}; None for a run that failed or has not ended."""
    rates = {}
    for value in _values(sweep, arm):
        results = [ended.get(run_dir(sweep, arm, value, seed)) for seed in _tuning_seeds(sweep)]
        rates[value] = [None if result is None else result["win_rate"] for result in results]
    return rates


def chosen(sweep: Sweep, arm: Arm, ended: Ended) -> float | None:
    """Return the value with the best mean held-out win rate on the tuning seeds; of equal ones, the smallest.

    A value with a failed run is never chosen. None: not tuned, not known yet, or all values failed.
    """
    tried = [
        run_dir(sweep, arm, value, seed) for value in _values(sweep, arm) for seed in _tuning_seeds(sweep)
    ]
    if not set(tried) <= ended.keys():
        return None
    rates = tuning(sweep, arm, ended)
    means = {v: sum(r) / len(r) for v, r in rates.items() if None not in r}  # type: ignore[arg-type]
    return max(sorted(means), key=means.__getitem__, default=None)


def run_dir(sweep: Sweep, arm: Arm, value: float | None, seed: int) -> Path:
    """Return the run directory of an arm's run; `value` is None where the arm is not tuned."""
    folder = sweep.folder / arm.slug
    if value is not None and sweep.tune:
        folder /= f"{sweep.tune.short}_{value!r}"
    return folder / f"seed_{seed}"


def read_result(run: Planned) -> Result | None:
    """Return the result of a run, or None if it is not finished.

    Raises:
      ValueError: the directory holds a run of another config, which must not be resumed.
    """
    config, result = run.run_dir / "config.json", run.run_dir / "result.json"
    if not config.is_file():
        return None
    here = json.loads(configs.serialize(configs.load(run.arm.config, run.overrides)))
    changes = config_changes.compare(json.loads(config.read_bytes()), here)
    if result.is_file() and changes:
        refused: str | None = next(iter(changes.values()))
    else:
        refusal = config_changes.refused(changes, finished=False, accept=False)
        refused = refusal and refusal[0]
    if refused:
        raise ValueError(
            f"{run.run_dir}: is a run of another config ({refused}); delete it or give another --runs"
        )
    return read_run(run.run_dir).result if result.is_file() else None


def _values(sweep: Sweep, arm: Arm) -> tuple[float, ...]:
    return sweep.tune.values if sweep.tune and arm.tuned else ()


def _tuning_seeds(sweep: Sweep) -> tuple[int, ...]:
    return sweep.tune.seeds if sweep.tune else ()


def _serves_tuning(sweep: Sweep, arm: Arm) -> bool:
    """Return whether an untuned arm must run on the tuning seeds, for a tuned arm that comes after it."""
    later = [other for other in sweep.arms if other.after == arm.name]
    return not arm.tuned and any(other.tuned or _serves_tuning(sweep, other) for other in later)


def _run(sweep: Sweep, arm: Arm, value: float | None, seed: int, after: Path | None) -> Planned:
    path = run_dir(sweep, arm, value, seed)
    fields = {**arm.overrides, "seed": seed, "run_dir": str(path)}
    if value is not None and sweep.tune:
        fields[sweep.tune.field] = value
    texts = []
    for field, setting in fields.items():
        text = setting if isinstance(setting, str) else "None" if setting is None else json.dumps(setting)
        texts.append(f"{field}={text.replace('{seed}', str(seed)).replace('{after}', str(after))}")
    return Planned(arm, value, seed, path, after, tuple(texts))


def _check(run: Planned) -> None:
    config = configs.load(run.arm.config, run.overrides)
    top = configs.build(settings.Experiment, config, "config")
    for name in ("model", "judging", "layout", "replay", "checkpoint", "logging"):
        configs.build(getattr(settings, name.capitalize()), config[name], name)
    configs.build(Evaluation, config.evaluation, "evaluation")
    configs.build(CandidateSampling, config.sampling, "sampling")
    configs.build(LoRA, config.lora, "lora")
    loss_settings, loss = make_loss(config.loss)
    loss_settings.coefficients(loss, top.steps)
    configs.build(make_optimizer, config.optimizer, "optimizer", steps=top.steps)
    configs.check(load_prompts, config.data, "data", provided=("tokenizer", "max_new_tokens", "check"))
    judge_factory.make_judge(config.judge, "judge")
