"""Where a fault strikes: in which step of the run and at which named point, and the line that proves that it did.

A plan counts no calls over a run: such a number points elsewhere as soon as a step makes one call more. A case whose
fault was not struck where its plan names it fails (`NotStruck`).

Left out on purpose: how a fault is injected, see inject.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

START, END = "start", "end"  # before the first step, after the last
Step = int | str
_WHEN = {START: "before the first step", END: "after the last step"}
# Files that a thread writes while later steps run; their path has the step.
_NAMES_ITS_STEP = re.compile(r"(open|rename|remove) .*checkpoints/\d")


class NotStruck(AssertionError):
    """A fault was not struck, so that its case shows nothing."""


def struck(proven: bool, what: str) -> None:
    """Raise NotStruck, which names the fault, unless it is proven that it was struck."""
    if not proven:
        raise NotStruck(f"the fault was not struck: {what}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A fault in one process of a run.

    Args:
      at: the point, and the name of what is struck there; see inject.py.
      step: in which it is struck: N from 1 on (from the beginning of the N-th step to that of the next one, which
        includes the evaluation and the checkpoint between them), START, END, or several of these. None only for a
        file of a checkpoint, whose path has the step.
      do: the action; see inject.py.
      call: which call of the point in that step; None for all of them.

    Raises:
      ValueError: there is no such step, or the plan names none.
    """

    at: str
    step: Step | tuple[Step, ...] | None
    do: str
    call: int | None = 1

    def __post_init__(self) -> None:
        if self.step == () or (self.step is None and not _NAMES_ITS_STEP.match(self.at)):
            raise ValueError(f"{self.at}: name the step in which this is struck")
        for step in self.steps or ():
            if not (step in _WHEN or (type(step) is int and step > 0)):
                raise ValueError(f"step {step!r}: expected a number from 1 on, {START!r} or {END!r}")

    @property
    def steps(self) -> tuple[Step, ...] | None:
        """The steps in which the fault is struck; None for any."""
        return self.step if self.step is None or isinstance(self.step, tuple) else (self.step,)

    def line(self, step: Step) -> str:
        """Return what stderr shows of a strike in this step."""
        return self._strike + _WHEN.get(step, f"in step {step}")

    @property
    def _strike(self) -> str:
        return f"injected: {self.do} at {self.at} "

    def require_struck(self, err: str) -> None:
        """Raise NotStruck unless stderr shows a strike at the plan's point in each of its steps."""
        shown = re.findall("injected: .*", err)
        if self.steps is None:
            missing = (
                [] if any(line.startswith(self._strike) for line in shown) else [self._strike + "in any step"]
            )
        else:
            missing = [self.line(step) for step in self.steps if self.line(step) not in shown]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        seen = f"stderr shows {shown} and ends with {err[-300:]!r}"
        struck(not missing, f"no {missing[:1]}{more}; {seen}")

    def to_json(self) -> str:
        """Return the plan as inject.py takes it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan of a command line."""
        fields: dict[str, Any] = json.loads(text)
        step = fields["step"]
        return cls(**{**fields, "step": tuple(step) if isinstance(step, list) else step})
