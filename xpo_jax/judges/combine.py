"""A judge made of several: their verdicts are combined by weight, and all of them are logged.

"mean" is the weighted mean of the parts' probabilities that A is better; a part without a verdict is left out of it.
"majority" prefers the answer that the parts of more weight prefer, however certain each is; one that ties, or has no
verdict, counts for neither. "sum" adds the parts' weighted log-odds, log(p / (1 - p)); a part without a verdict adds
nothing. For reward models, whose log-odds are the difference of two rewards over a temperature, the sum is the verdict
of the weighted sum of rewards. If no part has a verdict there is none.

Every part that is asked counts as a query of its own (`judging.max_queries`).

Where there are several processes and a part runs on their devices, that part is asked about the whole batch by all of
them. Every other part is asked by each process about its own share, so that nothing is paid for twice.

Left out on purpose: parts that are asked only if others disagree, and weights that are learned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xpo_jax.judges import voting
from xpo_jax.judges.answers import call_judge, query_count
from xpo_jax.judges.contract import (
    DeviceJudge,
    HasModels,
    HasOneProcess,
    HasProbe,
    HasProgress,
    HasStats,
    Judge,
    JudgeError,
    Progress,
    check,
    doubt,
    is_collective,
    measure,
    queries_per_comparison,
)
from xpo_jax.judges.scores import sigmoid
from xpo_jax.values import Comparison, Message, Params, Verdict

CallJudge = Callable[[Judge, Sequence[Comparison]], list[Verdict]]
Kind = Literal["mean", "majority", "sum"]

MAX_LOG_ODDS = 14.0  # of a part in a sum (p 0.9999992); those of a hard verdict would be infinite


class Combination:
    """Asks all its parts and combines their verdicts; a `contract.DeviceJudge` for the parts that are."""

    def __init__(
        self,
        parts: Mapping[str, tuple[float, Judge]],
        kind: Kind,
        call_by_shares: CallJudge = call_judge,
    ):
        """Take what `combine` has built, weight and judge by name; the last argument is as there."""
        self._judges = {name: judge for name, (_, judge) in parts.items()}
        self._weights = {name: weight for name, (weight, _) in parts.items()}
        self._kind, self._call_by_shares = kind, call_by_shares
        self._asked = 0  # comparisons
        self._silent = dict.fromkeys(self._judges, 0)  # on how many of them a part had no verdict
        self._doubted = (0, dict(self._silent))  # both, when they were last looked at
        self._device_judges = [judge for judge in self._judges.values() if isinstance(judge, DeviceJudge)]
        # if any part needs the whole batch on every process, this judge gets it there and shares out what others need
        self.collective = any(map(is_collective, self._judges.values()))
        self.one_process = any(isinstance(j, HasOneProcess) and j.one_process for j in self._judges.values())
        self.queries_per_comparison = sum(map(queries_per_comparison, self._judges.values()))
        if any(isinstance(judge, HasProgress) for judge in self._judges.values()):
            self.progress = self._progress  # only then, because a run takes samples for it

    # ---- before the run: passed to the parts

    def attach(self, *, mesh: Any, folder: Path, model_config: Any, tokenizer: Any, dtype: Any) -> None:
        """Attach the parts that run on devices."""
        for judge in self._device_judges:
            judge.attach(
                mesh=mesh, folder=folder, model_config=model_config, tokenizer=tokenizer, dtype=dtype
            )

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """Return the programs of all parts."""
        programs = (judge.declared_programs() for judge in self._device_judges)
        return list(itertools.chain.from_iterable(programs))

    def load(self, starting: Params | None) -> None:
        """Load the weights of the parts that run on devices."""
        for judge in self._device_judges:
            judge.load(starting)

    def models(self) -> list[Mapping[str, str | None]]:
        """Return the models of all parts, for environment.json."""
        judges = self._judges.values()
        return [model for judge in judges if isinstance(judge, HasModels) for model in judge.models()]

    def check(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        """Check a prompt with every part.

        Raises:
          ValueError: raised by a part.
        """
        for judge in self._judges.values():
            check(judge, messages, row)

    def probe(self) -> None:
        """Probe every part.

        Raises:
          ValueError: raised by a part, with the part's name added.
        """
        for name, judge in self._judges.items():
            try:
                if isinstance(judge, HasProbe):
                    judge.probe()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def _progress(self, progress: Progress) -> None:
        """Pass the progress to the parts that show it."""
        for judge in self._judges.values():
            if isinstance(judge, HasProgress):
                judge.progress(progress)

    def stats(self) -> dict[str, float]:
        """Return the counts of all parts, as "<part>/<name>"."""
        return {
            f"{part}/{name}": number
            for part, judge in self._judges.items()
            if isinstance(judge, HasStats)
            for name, number in judge.stats().items()
        }

    def doubt(self) -> str:
        """Return what makes the parts' verdicts doubtful, with the part's name; also a part that rarely has one."""
        doubts = {name: doubt(judge) for name, judge in self._judges.items()}
        (before, silent), self._doubted = self._doubted, (self._asked, dict(self._silent))
        for name, number in self._silent.items():
            missing, of = number - silent[name], self._asked - before
            if missing > of / 2 and not doubts[name]:
                doubts[name] = (
                    f"no verdict on {missing} of the latest {of} comparisons, so the other judges decide alone; its"
                    " reasons are in pairs.jsonl"
                )
        return "; ".join(f"{name}: {line}" for name, line in doubts.items() if line)

    def parts(self, messages: Sequence[Message], text: str) -> dict[str, Any]:
        """Return the measures of all parts; a name that an earlier part has taken gets the part's name added."""
        measures: dict[str, Any] = {}
        for part, judge in self._judges.items():
            for name, value in measure(judge, messages, text).items():
                measures[f"{part}/{name}" if name in measures else name] = value
        return measures

    # ---- judging

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judge each comparison.

        Returns:
          Verdicts. Their scores hold, under "a" and "b" and then by part, the probability "p" that this answer is
          the better one and the part's "score" for it; under "else", by part, the part's other scores. Where several
          parts have a verdict, "disagreement" is how far they differ (`voting.disagreement`). "queries" is their sum.

        Raises:
          JudgeError: a part raised one; the part's name is added.
        """
        by_part = {}
        for name, judge in self._judges.items():
            every_process_asks = is_collective(judge) or not self.collective
            call = call_judge if every_process_asks else self._call_by_shares
            try:
                by_part[name] = call(judge, comparisons)
            except JudgeError as error:
                raise JudgeError(f"{name}: {error}") from error
        self._asked += len(comparisons)
        for name, verdicts in by_part.items():
            self._silent[name] += sum(verdict.p is None for verdict in verdicts)
        rows = zip(*by_part.values(), strict=True)
        return [self._combine(dict(zip(by_part, verdicts, strict=True))) for verdicts in rows]

    def _combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        """Combine the parts' verdicts on one comparison."""
        ps = {name: v.p for name, v in verdicts.items() if v.p is not None}
        reason = "; ".join(
            f"{name}: {'no verdict' if v.p is None else f'{v.p:.3f} for A'}{f', {v.reason}' if v.reason else ''}"
            for name, v in verdicts.items()
        )
        scores: dict[str, Any] = {"a": {}, "b": {}}
        for name, verdict in verdicts.items():
            rest = dict(verdict.scores)
            for side, side_p in (("a", verdict.p), ("b", None if verdict.p is None else 1 - verdict.p)):
                scores[side][name] = {"p": side_p} | ({"score": rest.pop(side)} if side in rest else {})
            if rest:
                scores.setdefault("else", {})[name] = rest
        if len(ps) > 1:
            weights = [self._weights[name] for name in ps]
            scores["disagreement"] = voting.disagreement(list(ps.values()), weights)
        scores["queries"] = sum(query_count(verdict.scores, otherwise=1) for verdict in verdicts.values())
        return Verdict(self._probability(ps), reason, scores)

    def _probability(self, ps: Mapping[str, float]) -> float | None:
        """Combine the probabilities of the parts that gave a verdict."""
        if not ps:
            return None
        weights = [self._weights[name] for name in ps]
        if self._kind != "sum":
            pool = voting.mean if self._kind == "mean" else voting.majority
            return pool(list(ps.values()), weights)
        return sigmoid(math.fsum(w * _log_odds(p) for w, p in zip(weights, ps.values(), strict=True)))


def _log_odds(p: float) -> float:
    if p in (0.0, 1.0):
        return math.copysign(MAX_LOG_ODDS, p - 0.5)
    return min(max(math.log(p) - math.log1p(-p), -MAX_LOG_ODDS), MAX_LOG_ODDS)


def combine(
    *,
    judges: Sequence[Mapping[str, Any]],
    kind: Kind,
    make_judge: Callable[[Mapping[str, Any], str], Judge],
    call_by_shares: CallJudge,
) -> Combination:
    """Build the judge.

    Args:
      judges: the parts; each is the group that `judge` would be, with a positive number "weight". For a mean only
        or a majority only the ratios of the weights matter.
      kind: "mean" of probabilities, "majority" of preferences, or "sum" of log-odds.
      make_judge: builds a judge from its group and the group's path in the config.
      call_by_shares: `ask.call_by_shares`.

    Raises:
      ValueError: no parts, a part without a name or with an invalid weight, or raised by a part's factory.
    """
    if not judges:
        raise ValueError("judges: give at least one, each with its name, its weight and its fields")
    parts: dict[str, tuple[float, Judge]] = {}
    for number, group in enumerate(judges):
        path = f"judge.judges[{number}]"
        name, weight = group.get("name"), group.get("weight")
        if not isinstance(name, str):
            raise ValueError(f"{path}.name is missing: give a built-in judge or 'package.module:Name'")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{path}.weight must be a number above 0, found {weight!r}")
        fields = {field: value for field, value in group.items() if field != "weight"}
        label = name.rpartition(":")[2]
        if label in parts:
            label = f"{label}_{number}"
        parts[label] = (float(weight), make_judge(fields, path))
    return Combination(parts, kind, call_by_shares)
