"""Held-out evaluation: the policy against the reference, by the judge, with an interval over prompts.

Two samples of the policy per prompt meet several of the reference. A prompt's comparisons share their
samples and are averaged first; the interval is over prompts, which are independent. The reference's
samples are drawn once and met again by every evaluation of a run. Each process judges its share of a batch, and
all learn what all found.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from xpo_jax import distributed, verdicts
from xpo_jax.distributed import Together
from xpo_jax.programs import Programs
from xpo_jax.update import trim
from xpo_jax.values import Judge, Params, Prompts, Samples

POLICY_SAMPLES = 2  # as many candidates as the scoring program takes
PURPOSE = 2  # of the random keys; training's is 1
Decode = Callable[[Samples], list[str]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    win_rate: mean over prompts of the policy's share of comparisons won, ties half; low and high are the
      ends of its 95 % interval over prompts.
    kl: nats per sequence, mean of log pi - log ref over the policy's samples; kl_per_token likewise.
    policy, reference: means over all samples of what the judge's `parts` says of an answer (valid, copy,
      score, ...), with "tokens" and "unfinished"; only the latter two for a judge without `parts`.
    intervals: the half width of the 95 % interval over prompts of each mean in `policy`.
    queries: comparisons that the judge was asked.
    counts: what the judge's `stats`, if it has any, counted meanwhile; by name.
    samples: per prompt the first of the policy's answers and of the reference's, for people to read; with
      "win_share", the prompt's share of comparisons won.
    """

    win_rate: float
    low: float
    high: float
    kl: float
    kl_per_token: float
    policy: Mapping[str, float]
    reference: Mapping[str, float]
    intervals: Mapping[str, float]
    queries: int
    counts: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]

    def metrics(self) -> dict[str, float]:
        """For the metrics file."""
        out = {"eval/win_rate": self.win_rate, "eval/win_rate_low": self.low, "eval/win_rate_high": self.high}
        out |= {
            "eval/kl": self.kl,
            "eval/kl_per_token": self.kl_per_token,
            "eval/queries": float(self.queries),
        }
        out |= {f"eval/judge/{name}": number for name, number in self.counts.items()}
        out |= {f"eval/policy/{name}": value for name, value in self.policy.items()}
        return out | {f"eval/reference/{name}": value for name, value in self.reference.items()}


def mean_interval(per_prompt: np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (normal approximation over prompts) of f64[n]; nan if empty."""
    values = per_prompt[~np.isnan(per_prompt)]
    if len(values) < 2:
        return (float(values.mean()) if len(values) else math.nan), math.nan
    return float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))


class Evaluator:
    """Evaluates the policy on the same held-out prompts and reference samples, again and again.

    Args:
      batches: the held-out prompts, in the shapes that `programs` was compiled for.
      reference: the reference's sampling weights.
      reference_samples: R, per prompt.
      decode: Samples on the host -> B texts.
      unfinished_loses, both_orders: see `verdicts.ask`.
      patience: with the judge's failures.
      seed: of the run, for the order shown.
    """

    def __init__(
        self,
        programs: Programs,
        batches: Sequence[Prompts],
        reference: Params,
        judge: Judge,
        decode: Decode,
        *,
        reference_samples: int,
        unfinished_loses: bool,
        both_orders: bool,
        patience: verdicts.Patience,
        seed: int,
    ):
        self.programs, self.batches, self.reference = programs, batches, reference
        self.judge, self.decode = judge, decode
        self.reference_samples, self.patience, self.seed = reference_samples, patience, seed
        self._rules: dict[str, Any] = {"unfinished_loses": unfinished_loses, "both_orders": both_orders}
        self._drawn: list[list[tuple[Samples, list[str]]]] = []

    def _draw(self, weights: Params, prompts: Prompts, step: int, candidates: Iterable[int]) -> list[Any]:
        drawn = [
            self.programs.draw(weights, prompts, purpose=PURPOSE, step=step, candidate=candidate)
            for candidate in candidates
        ]
        return [(samples, self.decode(samples)) for samples in map(self.programs.fetch, drawn)]

    def __call__(
        self, policy: Params, step: int, progress: Callable[[Iterable[Any]], Iterable[Any]]
    ) -> Evaluation:
        """Evaluate the sampling weights `policy` after `step` updates.

        Args:
          progress: wraps the iteration over batches, to show how far it is.

        Raises:
          JudgeError: see `verdicts.Patience`.
        """
        wins: list[float] = []
        kl: list[float] = []
        tokens: list[float] = []
        queries, counts = 0, dict[str, float]()
        parts: dict[str, dict[str, list[float]]] = {"policy": {}, "reference": {}}
        table: list[dict[str, Any]] = []
        for number, prompts in enumerate(progress(self.batches)):
            real = [int(i) for i in np.flatnonzero(prompts.real)]
            # the place among all held-out prompts: with the place in its batch, two batches would share keys
            prompts = prompts._replace(position=prompts.position + np.int32(number * len(prompts.rows)))
            # candidates 0 and 1 are the policy's, from 2 on the reference's: no key is used twice
            mine = self._draw(policy, prompts, step, range(POLICY_SAMPLES))
            if number == len(self._drawn):
                ids = range(POLICY_SAMPLES, POLICY_SAMPLES + self.reference_samples)
                self._drawn.append(self._draw(self.reference, prompts, 0, ids))
            theirs = self._drawn[number]

            lengths = np.stack([samples.lengths for samples, _ in mine])
            drawn = trim(
                np.stack([samples.tokens for samples, _ in mine]), lengths, self.programs.response_buckets
            )
            args = (prompts.tokens, prompts.lengths, drawn, lengths)
            scores = [self.programs.score(weights, *args) for weights in (policy, self.reference)]
            ratio = np.subtract(*map(self.programs.fetch, scores))
            kl.extend(ratio.mean(0)[real])
            tokens.extend(lengths.mean(0)[real])

            with Together("judging held-out answers") as together:
                together.value = self._judge(prompts, mine, theirs, (self.seed, PURPOSE, step, number))
            briefs = [each for found in together.values for each in found["briefs"]]
            self.patience.check(briefs)
            queries += sum(each["queries"] for each in briefs)
            counts = verdicts.summed([{"counts": counts}, *briefs])
            judged = [row for found in together.values for row in found["rows"]]
            for row, found in zip(real, judged, strict=True):
                wins.append(_number(found["win_share"]))
                for side in ("policy", "reference"):
                    for name, value in found[side].items():
                        parts[side].setdefault(name, []).append(_number(value))
                table.append(
                    {
                        "prompt": prompts.messages[row][-1]["content"],
                        "reference": theirs[0][1][row],
                        "policy": mine[0][1][row],
                        "win_share": wins[-1],
                    }
                )
        rate, half = mean_interval(np.array(wins))
        summary = {
            side: {k: mean_interval(np.array(v)) for k, v in named.items()} for side, named in parts.items()
        }
        return Evaluation(
            rate,
            max(rate - half, 0.0) if half >= 0 else math.nan,
            min(rate + half, 1.0) if half >= 0 else math.nan,
            float(np.mean(kl)),
            float(np.sum(kl) / np.sum(tokens)),
            {name: mean for name, (mean, _) in summary["policy"].items()},
            {name: mean for name, (mean, _) in summary["reference"].items()},
            {name: half for name, (_, half) in summary["policy"].items()},
            queries,
            counts,
            table,
        )

    def _judge(self, prompts: Prompts, mine: list[Any], theirs: list[Any], seed: tuple[int, ...]) -> Any:
        """What is found on this process's share of the rows: a brief of each call, and per real row its figures."""
        asked = prompts if verdicts.is_collective(self.judge) else distributed.mine(prompts)
        found = np.full((len(prompts.rows), len(mine), len(theirs)), np.nan)
        briefs = []
        for i, (first, first_texts) in enumerate(mine):
            for j, (second, second_texts) in enumerate(theirs):
                result = verdicts.ask(
                    self.judge,
                    asked,
                    first_texts,
                    second_texts,
                    identical=same_tokens(first, second),
                    policy_finished=first.finished,
                    reference_finished=second.finished,
                    **self._rules,
                    shown_seed=(*seed, i, j),
                )
                found[:, i, j] = np.where(result.weight > 0, verdicts.wins(result.p_first), np.nan)
                # what the others need to know of a call; its verdicts come with the rows
                told = verdicts.brief(result)
                briefs.append(
                    {k: told[k] for k in ("queries", "asked", "failed", "words", "refused", "counts")}
                )
        rows = []
        for row in map(int, np.flatnonzero(distributed.mine(prompts).real)):
            judged = found[row][~np.isnan(found[row])]
            sides = {
                "policy": self._parts(prompts, row, mine),
                "reference": self._parts(prompts, row, theirs),
            }
            rows.append({"win_share": float(judged.mean()) if judged.size else math.nan, **sides})
        return {"briefs": briefs, "rows": rows}

    def _parts(self, prompts: Prompts, row: int, drawn: list[tuple[Samples, list[str]]]) -> dict[str, float]:
        """One prompt's means over its samples."""
        values: dict[str, list[float]] = {
            "tokens": [float(samples.lengths[row]) for samples, _ in drawn],
            "unfinished": [float(not samples.finished[row]) for samples, _ in drawn],
        }
        describe: Any = getattr(self.judge, "parts", lambda messages, text: {})
        for _, texts in drawn:
            for name, value in describe(prompts.messages[row], texts[row]).items():
                if isinstance(value, (int, float)):
                    values.setdefault(name, []).append(float(value))
        return {name: float(np.mean(v)) for name, v in values.items()}


def _number(value: float | None) -> float:
    """What another process found: None is what a number that is not finite became on its way."""
    return math.nan if value is None else value


def same_tokens(a: Samples, b: Samples) -> np.ndarray:
    """bool[B]: the same response, token for token, up to its length."""
    counted = np.arange(a.tokens.shape[-1]) < np.asarray(a.lengths)[:, None]
    return (a.lengths == b.lengths) & np.all((a.tokens == b.tokens) | ~counted, axis=-1)
