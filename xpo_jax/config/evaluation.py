"""The group `evaluation` of a config: see `Evaluation`, whose fields are its schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out evaluation, always before the first and after the last step.

    Args:
      prompts: how many held-out prompts, the first ones.
      reference_samples: samples of the reference that each of the policy's two meets, per prompt.
      every_steps: also after every multiple of this; 0 is off.
      answers: a file with an answer to each of these prompts, which the policy's samples meet too, see
        data/answer_files.py; or None.
      judge: the group of another judge, which is queried here instead and does not run on the devices; its queries do
        not count towards judging.max_queries. None is the run's.
      stop_kl: the run ends at an evaluation with at least this KL, nats per sequence; None is off, as below.
      stop_win_rate: the same, if the lower end of the win rate's interval is at least this.
      stop_validity_drop: the same, if the fraction of valid answers is lower by this than before the first step.
    """

    prompts: int
    reference_samples: int
    every_steps: int
    answers: str | None
    judge: Mapping[str, Any] | None
    stop_kl: float | None
    stop_win_rate: float | None
    stop_validity_drop: float | None

    @property
    def stops(self) -> dict[str, float | None]:
        """Return the limits that end a run, by field."""
        return {name: getattr(self, name) for name in ("stop_kl", "stop_win_rate", "stop_validity_drop")}

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("reference_samples", 1), ("every_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.judge is not None and "name" not in self.judge:
            raise ValueError("judge.name is missing: name a judge, or set judge to None")
        for name, limit in self.stops.items():
            if limit is None:
                continue
            if limit <= 0 or (name != "stop_kl" and limit > 1):
                raise ValueError(
                    f"{name} is {limit}, must be positive"
                    + ("" if name == "stop_kl" else " and at most 1")
                    + ", or None to disable it"
                )
            if not self.every_steps:
                raise ValueError(
                    f"{name} is {limit}, but every_steps is 0, so no evaluation checks it; set every_steps, or None"
                )
