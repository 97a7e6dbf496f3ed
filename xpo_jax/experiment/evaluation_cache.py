"""The evaluations of a run on disk, evaluations/<step>.json: a resumed run reads them instead of repeating them.

Left out on purpose: the verdicts of an evaluation that was interrupted; the judge is queried for them again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xpo_jax.evaluation.evaluator import Evaluator
from xpo_jax.evaluation.result import Evaluation
from xpo_jax.evaluation.statistics import Rate, Reward
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.judges.limits import FailureTolerance
from xpo_jax.reporting import summary
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none, run_on_lead
from xpo_jax.values import Params


class _Cached(NamedTuple):
    """An evaluation, and the state of the judge's `FailureTolerance` after it."""

    evaluation: Evaluation
    failure_tolerance: Sequence[Any]


class Evaluated(NamedTuple):
    """An evaluation, and whether the run has yet to record its metrics and queries."""

    evaluation: Evaluation
    is_new: bool


class EvaluationCache:
    """Evaluations by step. All processes call its methods; process 0 reads and writes.

    Args:
      run_path: the run directory.
      identity: hash of the config fields that determine an evaluation's results, besides step and weights.
      devices: how arrays are split, which determines the last bits of all that comes after a restored step.
      restored_step: the step that the run resumes from; None for a new run.
    """

    def __init__(self, run_path: Path, *, identity: str, devices: str, restored_step: int | None):
        self._folder = run_path / "evaluations"
        self._key = {"identity": identity, "devices": devices}
        self.restored_step = restored_step

    def load(self, step: int) -> _Cached | None:
        """Return the evaluation after `step` steps, if there is one of this config.

        One of a step after the restored one counts only if it was made on the same split of devices: on another
        split, the steps up to it come out differently in their last bits.
        """
        entry = run_on_lead("reading an evaluation", _read_or_none, self._path(step))
        if not isinstance(entry, Mapping) or entry.get("identity") != self._key["identity"]:
            return None
        precedes = self.restored_step is not None and step <= self.restored_step
        if not precedes and entry.get("devices") != self._key["devices"]:
            return None
        if entry["evaluation"].keys() != {field.name for field in dataclasses.fields(Evaluation)}:
            return None  # written by another version
        return _Cached(_evaluation(entry["evaluation"]), entry["failure_tolerance"])

    def store(self, step: int, evaluation: Evaluation, failure_tolerance: Sequence[Any]) -> None:
        """Write an evaluation; arguments as `load` returns them."""
        with all_or_none("writing an evaluation"):
            if distributed.is_lead_process():
                self._folder.mkdir(exist_ok=True)
                entry = {"step": step, **self._key, "failure_tolerance": failure_tolerance}
                entry["evaluation"] = dataclasses.asdict(evaluation)
                atomic_write(self._path(step), to_json(entry, indent=1) + "\n")

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.json"


class CachedEvaluator:
    """Evaluates a run's policies, or reads an evaluation that the run made before it was interrupted.

    Args:
      evaluator, cache: of the run.
      failure_tolerance: the one that `evaluator` uses; a cached evaluation restores its state.
      heartbeat: called with a label before each batch, see `interruption.Watchdog`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        cache: EvaluationCache,
        failure_tolerance: FailureTolerance,
        heartbeat: Callable[[str], None],
    ):
        self._evaluator, self._cache, self._heartbeat = evaluator, cache, heartbeat
        self._failure_tolerance = failure_tolerance

    def __call__(self, weights: Params, step: int) -> Evaluated:
        """Evaluate the policy after `step` steps; a run that resumes from this very step has recorded it.

        Args:
          weights: as the policy is sampled from.
          step: see above.
        """
        cached = self._cache.load(step)
        if cached is not None:
            if self._cache.restored_step in (None, step):
                self._failure_tolerance.state = cached.failure_tolerance
            return Evaluated(cached.evaluation, step != self._cache.restored_step)
        label = f"evaluating step {step}" if step else "evaluating the start"

        def progress(batches: Iterable[Any]) -> Iterator[Any]:
            for batch in summary.progress(batches, label):
                self._heartbeat(label)
                yield batch

        evaluation = self._evaluator(weights, step, progress)
        self._cache.store(step, evaluation, self._failure_tolerance.state)
        return Evaluated(evaluation, True)


def _read_or_none(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # absent, or written by something else: evaluated again
        return None


def _evaluation(fields: Mapping[str, Any]) -> Evaluation:
    """Return the inverse of `dataclasses.asdict` and JSON, which turns numbers that are not finite into null."""

    def numbers(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: numbers(entry) for name, entry in value.items()}
        return math.nan if value is None else value

    def rate(value: Sequence[float | None] | None) -> Rate | None:
        return None if value is None else Rate(*map(numbers, value))

    def reward(value: Sequence[float | None]) -> Reward:
        return Reward(*map(numbers, value))

    def unchanged(value: Any) -> Any:
        return value

    decode: dict[str, Callable[[Any], Any]] = {
        "samples": unchanged,
        "outcomes": unchanged,
        "controlled": rate,
        "against_answers": rate,
        "reward": reward,
    }
    return Evaluation(**{name: decode.get(name, numbers)(value) for name, value in fields.items()})
