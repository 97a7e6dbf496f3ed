"""A judge made of others: what each says goes into one verdict by weight, and all of it into the log.

"mean" is the weighted mean of the parts' probabilities that A is better; where a part has no verdict the others'
weights are taken as all there is. "sum" adds the parts' weighted log-odds, log(p / (1 - p)); for reward models,
whose log-odds are the difference of two rewards over a temperature, that is the verdict of the weighted sum of
rewards. A part without verdict then adds nothing. No part with a verdict is no verdict.

Left out on purpose: parts that are asked only if others disagree, and weights that are learned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xpo_jax.judges.contract import JudgeError, asked
from xpo_jax.values import Comparison, DeviceJudge, Judge, Message, Params, Verdict

CERTAIN = 14.0  # log-odds; in a sum no part is surer (p 0.9999992), for those of hard verdicts are infinite


class Combination:
    """Asks all its parts and weighs what they say; a `values.DeviceJudge` on behalf of those that are."""

    def __init__(self, parts: Mapping[str, tuple[float, Judge]], kind: Literal["mean", "sum"]):
        """Take what `combine` has built: weight and judge by name."""
        self._parts, self._kind = dict(parts), kind
        self._devices = [judge for _, judge in parts.values() if isinstance(judge, DeviceJudge)]
        # where one part runs on all processes' devices, all of them must be asked the whole batch
        self.collective = any(getattr(judge, "collective", False) for _, judge in parts.values())

    # ---- before the run: handed on to the parts

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Let the parts that run on devices learn on what the run computes."""
        for judge in self._devices:
            judge.attach(
                mesh=mesh, folder=folder, model_config=model_config, tokenizer=tokenizer, dtype=dtype
            )

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """The compilations of all parts."""
        return list(itertools.chain.from_iterable(judge.declared_programs() for judge in self._devices))

    def load(self, starting: Params | None) -> None:
        """Let the parts that run on devices take their weights."""
        for judge in self._devices:
            judge.load(starting)

    def models(self) -> list[dict[str, str | None]]:
        """The models of all parts, for environment.json."""
        return [model for _, judge in self._parts.values() for model in getattr(judge, "models", list)()]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Refuse a prompt that one of the parts cannot judge.

        Raises:
          ValueError: as the part does.
        """
        for _, judge in self._parts.values():
            check = getattr(judge, "check", None)
            if check is not None:
                check(messages, row)

    def probe(self) -> None:
        """Let the parts that need something from outside see that it is there.

        Raises:
          ValueError: as the part does, with its name.
        """
        for name, (_, judge) in self._parts.items():
            try:
                getattr(judge, "probe", lambda: None)()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def stats(self) -> dict[str, float]:
        """What the parts count, by part."""
        return {
            f"{name}/{counted}": number
            for name, (_, judge) in self._parts.items()
            for counted, number in getattr(judge, "stats", dict)().items()
        }

    def parts(self, messages: Sequence[Message], text: str) -> dict[str, Any]:
        """What the parts measure in one answer, for the evaluation's tables; the first to name a figure names it."""
        out: dict[str, Any] = {}
        for name, (_, judge) in self._parts.items():
            describe = getattr(judge, "parts", None)
            for figure, value in describe(messages, text).items() if describe else ():
                out[f"{name}/{figure}" if figure in out else figure] = value
        return out

    # ---- judging

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison.

        Returns:
          Verdicts. Their scores: under "a" and "b", by part, the probability "p" that this answer is the better
          one and what the part scored it ("score"); under "else", by part, whatever else it scored.

        Raises:
          JudgeError: a part's answer that ends the run, with the part's name.
        """
        found = {}
        for name, (_, judge) in self._parts.items():
            try:
                found[name] = asked(judge, comparisons)
            except JudgeError as error:
                raise JudgeError(f"{name}: {error}") from error
        return [
            self._verdict(dict(zip(found, each, strict=True))) for each in zip(*found.values(), strict=True)
        ]

    def _verdict(self, told: Mapping[str, Verdict]) -> Verdict:
        there = {name: verdict.p for name, verdict in told.items() if verdict.p is not None}
        weights = {name: self._parts[name][0] for name in there}
        p = None
        if there and self._kind == "mean":
            p = math.fsum(weights[name] * p for name, p in there.items()) / math.fsum(weights.values())
            p = min(max(p, 0.0), 1.0)  # rounding
        elif there:
            odds = math.fsum(weights[name] * _log_odds(p) for name, p in there.items())
            p = 0.5 + 0.5 * math.tanh(odds / 2)  # the sigmoid, without overflow
        reason = "; ".join(
            f"{name}: {'no verdict' if v.p is None else f'{v.p:.3f} for A'}{f', {v.reason}' if v.reason else ''}"
            for name, v in told.items()
        )
        scores: dict[str, Any] = {"a": {}, "b": {}}
        for name, verdict in told.items():
            rest = dict(verdict.scores)
            for side, own in (("a", verdict.p), ("b", None if verdict.p is None else 1 - verdict.p)):
                scores[side][name] = {"p": own} | ({"score": rest.pop(side)} if side in rest else {})
            if rest:
                scores.setdefault("else", {})[name] = rest
        return Verdict(p, reason, scores)


def _log_odds(p: float) -> float:
    if p in (0.0, 1.0):
        return math.copysign(CERTAIN, p - 0.5)
    return min(max(math.log(p) - math.log1p(-p), -CERTAIN), CERTAIN)


def combine(
    *,
    judges: Sequence[Mapping[str, Any]],
    kind: Literal["mean", "sum"],
    make_judge: Callable[[Mapping[str, Any], str], Judge],
) -> Combination:
    """Build the judge.

    Args:
      judges: the parts, each the group that would stand under `judge`, with "weight", a number above 0; for a mean
        only their ratios count.
      kind: "mean" of probabilities, or "sum" of log-odds.
      make_judge: builds the judge of a group, given the group's place in the config.

    Raises:
      ValueError: no part, a part without name or with a weight that is none, whatever a part's factory refuses.
    """
    if not judges:
        raise ValueError("judges: give at least one, each with its name, its weight and its fields")
    parts: dict[str, tuple[float, Judge]] = {}
    for number, group in enumerate(judges):
        where = f"judge.judges[{number}]"
        name, weight = group.get("name"), group.get("weight")
        if not isinstance(name, str):
            raise ValueError(f"{where}.name is missing: one of ours or 'package.module:Name'")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{where}.weight must be a number above 0, found {weight!r}")
        rest = {field: value for field, value in group.items() if field != "weight"}
        short = name.rpartition(":")[2]
        label = short if short not in parts else f"{short}_{number}"
        parts[label] = (float(weight), make_judge(rest, where))
    return Combination(parts, kind)
