"""Held-out evaluation: the policy against the reference, by the judge, with an interval over prompts.

Two samples of the policy per prompt meet several of the reference, and an answer from a file where there is one. A
prompt's comparisons share their samples and are averaged first; the interval is over prompts, which are independent.
The reference's samples are drawn once and met again by every evaluation of a run. Each process judges its share of a
batch, and all learn what all found. What is computed from it stands in statistics.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from xpo_jax.algorithm.programs import Programs
from xpo_jax.evaluation import statistics
from xpo_jax.evaluation.statistics import Rate
from xpo_jax.judges import ask, contract, limits
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import run_on_all
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Params, Prompts, Samples

POLICY_SAMPLES = 2  # as many candidates as the scoring program takes
Decode = Callable[[Samples], list[str]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    win_rate: mean over prompts of the policy's share of comparisons won, ties half; low and high are the
      ends of its 95 % interval over prompts.
    controlled: the same at equal lengths, see `statistics.length_controlled`.
    against_answers: the win rate against the answers of a file; None where there is no file.
    kl: nats per sequence, mean of log pi - log ref over the policy's samples; kl_per_token likewise.
    entropy: nats per token, mean of -log pi over the same; of the distribution sampled, if nothing truncates it.
    policy, reference: means over all samples of what the judge's `parts` says of an answer (valid, copy,
      score, ...), with "tokens" and "unfinished"; only the latter two for a judge without `parts`. And the
      first answers' "distinct_1" and "distinct_2", see `statistics.distinct`.
    intervals: the half width of the 95 % interval over prompts of each mean in `policy`, and of "kl".
    queries: comparisons that the judge was asked.
    counts: what the judge's `stats`, if it has any, counted meanwhile; by name.
    samples: per prompt the first of the policy's answers and of the reference's, for people to read; "win_share",
      the prompt's share of comparisons won; and of the comparison of those two "p_policy", the verdict, "shown",
      which letter the policy's had, "reason" and "scores".
    """

    win_rate: float
    low: float
    high: float
    controlled: Rate
    against_answers: Rate | None
    kl: float
    kl_per_token: float
    entropy: float
    policy: Mapping[str, float]
    reference: Mapping[str, float]
    intervals: Mapping[str, float]
    queries: int
    counts: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]

    def metrics(self) -> dict[str, float]:
        """For the metrics file."""
        rates = {"win_rate": Rate(self.win_rate, self.low, self.high), "win_rate_controlled": self.controlled}
        if self.against_answers is not None:
            rates["win_rate_answers"] = self.against_answers
        out: dict[str, float] = {}
        for name, rate in rates.items():
            out |= {f"eval/{name}": rate.mean, f"eval/{name}_low": rate.low, f"eval/{name}_high": rate.high}
        out |= {
            "eval/kl": self.kl,
            "eval/kl_per_token": self.kl_per_token,
            "eval/entropy": self.entropy,
            "eval/queries": float(self.queries),
        }
        out |= {f"eval/judge/{name}": number for name, number in self.counts.items()}
        out |= {f"eval/policy/{name}": value for name, value in self.policy.items()}
        return out | {f"eval/reference/{name}": value for name, value in self.reference.items()}


def ended_by(
    start: Evaluation,
    now: Evaluation,
    *,
    stop_kl: float | None,
    stop_win_rate: float | None,
    stop_validity_drop: float | None,
) -> str:
    """The field of config.evaluation by which a run ends here, or "".

    Args:
      start, now: the evaluation before the first step, and the latest.
      Others: see settings.Evaluation.

    Raises:
      ValueError: a judge that does not say whether an answer is valid, where stop_validity_drop asks for it.
    """
    if stop_validity_drop is not None and "valid" not in start.policy:
        raise ValueError(
            'evaluation.stop_validity_drop is set, but the judge\'s parts do not tell "valid"; set it to None'
        )
    if stop_kl is not None and now.kl >= stop_kl:
        return "evaluation.stop_kl"
    if stop_win_rate is not None and now.low >= stop_win_rate:
        return "evaluation.stop_win_rate"
    if stop_validity_drop is not None and start.policy["valid"] - now.policy["valid"] >= stop_validity_drop:
        return "evaluation.stop_validity_drop"
    return ""


class Evaluator:
    """Evaluates the policy on the same held-out prompts and reference samples, again and again.

    Args:
      batches: the held-out prompts, in the shapes that `programs` was compiled for.
      reference: the reference's sampling weights.
      reference_samples: R, per prompt.
      decode: Samples on the host -> B texts.
      answers: per batch B texts, which the policy's samples meet too ("" in unreal rows); None for none.
      unfinished_loses, both_orders: see `ask.ask`.
      patience: with the judge's failures.
      seed: of the run, for the order shown.
    """

    def __init__(
        self,
        programs: Programs,
        batches: Sequence[Prompts],
        reference: Params,
        judge: contract.Judge,
        decode: Decode,
        *,
        answers: Sequence[Sequence[str]] | None,
        reference_samples: int,
        unfinished_loses: bool,
        both_orders: bool,
        failure_tolerance: limits.FailureTolerance,
        seed: int,
    ):
        self.programs, self.batches, self.reference = programs, batches, reference
        self.judge, self.decode, self.answers = judge, decode, answers
        self.reference_samples, self.failure_tolerance, self.seed = reference_samples, failure_tolerance, seed
        self._rules: dict[str, Any] = {"unfinished_loses": unfinished_loses, "both_orders": both_orders}
        self._drawn: list[list[tuple[Samples, list[str]]]] = []

    def _draw(self, weights: Params, prompts: Prompts, step: int, candidates: Iterable[int]) -> list[Any]:
        drawn = [
            self.programs.sample(weights, prompts, stream=Stream.EVALUATION, step=step, candidate=candidate)
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
          JudgeError: see `limits.FailureTolerance`.
        """
        wins: list[np.ndarray] = []  # per prompt f64[policy's samples, reference's]
        differences: list[np.ndarray] = []  # in length, of the same shape
        against_answers: list[np.ndarray] = []
        kl: list[float] = []
        surprise: list[float] = []
        tokens: list[float] = []
        queries, counts = 0, dict[str, float]()
        parts: dict[str, dict[str, list[float]]] = {"policy": {}, "reference": {}}
        table: list[dict[str, Any]] = []
        for number, prompts in enumerate(progress(self.batches)):
            valid = [int(i) for i in np.flatnonzero(prompts.valid)]
            # the place among all held-out prompts: with the place in its batch, two batches would share keys
            prompts = prompts._replace(position=prompts.position + np.int32(number * len(prompts.rows)))
            # candidates 0 and 1 are the policy's, from 2 on the reference's: no key is used twice
            mine = self._draw(policy, prompts, step, range(POLICY_SAMPLES))
            if number == len(self._drawn):
                ids = range(POLICY_SAMPLES, POLICY_SAMPLES + self.reference_samples)
                self._drawn.append(self._draw(self.reference, prompts, 0, ids))
            theirs = self._drawn[number]
            answers = None if self.answers is None else self.answers[number]

            lengths = np.stack([samples.lengths for samples, _ in mine])
            drawn = np.stack([samples.tokens for samples, _ in mine])
            packed = self.programs.pack(prompts, drawn, lengths)
            scores = [self.programs.score(weights, packed) for weights in (policy, self.reference)]
            logps, ref_logps = map(np.asarray, scores)
            kl.extend((logps - ref_logps).mean(0)[valid])
            surprise.extend(-logps.mean(0)[valid])
            tokens.extend(lengths.mean(0)[valid])

            seed = (self.seed, Stream.EVALUATION, step, number)
            values = run_on_all("judging held-out answers", self._judge, prompts, mine, theirs, answers, seed)
            briefs = [each for found in values for each in found["briefs"]]
            self.failure_tolerance.check(briefs)
            queries += sum(each["queries"] for each in briefs)
            counts = ask.sum_counts([counts, *(each["counts"] for each in briefs)])
            judged = [row for found in values for row in found["rows"]]
            for row, found in zip(valid, judged, strict=True):
                wins.append(np.array(found["wins"], np.float64))  # what is None becomes nan
                against_answers.append(np.array(found["against_answers"], np.float64))
                letters = [np.array([len(texts[row]) for _, texts in side]) for side in (mine, theirs)]
                differences.append(np.subtract.outer(*letters).astype(np.float64))
                for side in ("policy", "reference"):
                    for name, value in found[side].items():
                        parts[side].setdefault(name, []).append(math.nan if value is None else value)
                table.append(
                    {
                        "prompt": prompts.messages[row][-1]["content"],
                        "reference": theirs[0][1][row],
                        "policy": mine[0][1][row],
                        "win_share": statistics.share(wins[-1]),
                        **found["first"],
                    }
                )
        means = {
            side: {k: statistics.mean_interval(np.array(v)) for k, v in named.items()}
            for side, named in parts.items()
        }
        variety = {
            side: {f"distinct_{n}": statistics.distinct([row[side] for row in table], n) for n in (1, 2)}
            for side in parts
        }
        half_widths = {name: half for name, (_, half) in means["policy"].items()}
        return Evaluation(
            *statistics.win_rate(wins),
            controlled=statistics.length_controlled(wins, differences),
            against_answers=None if self.answers is None else statistics.win_rate(against_answers),
            kl=float(np.mean(kl)),
            kl_per_token=float(np.sum(kl) / np.sum(tokens)),
            entropy=float(np.sum(surprise) / np.sum(tokens)),
            policy={name: mean for name, (mean, _) in means["policy"].items()} | variety["policy"],
            reference={name: mean for name, (mean, _) in means["reference"].items()} | variety["reference"],
            intervals=half_widths | {"kl": statistics.mean_interval(np.array(kl))[1]},
            queries=queries,
            counts=counts,
            samples=table,
        )

    def _judge(
        self,
        prompts: Prompts,
        mine: list[tuple[Samples, list[str]]],
        theirs: list[tuple[Samples, list[str]]],
        answers: Sequence[str] | None,
        seed: tuple[int, ...],
    ) -> Any:
        """What is found on this process's share of the rows: a brief of each call, and per valid row its figures."""
        asked = prompts if contract.is_collective(self.judge) else distributed.local_rows(prompts)
        briefs = []

        def wins(
            i: int, j: int, texts: Sequence[str], same: np.ndarray, finished: np.ndarray
        ) -> tuple[Any, np.ndarray]:
            own, own_texts = mine[i]
            result = ask.ask(
                self.judge,
                asked,
                ask.ResponsePairs(own_texts, texts, same, own.finished, finished),
                **self._rules,
                shown_seed=(*seed, i, j),
            )
            briefs.append(ask.summarize_call(result))  # the verdicts come with the rows
            return result, np.where(result.weight > 0, ask.wins(result.p_first), np.nan)

        found = np.full((len(prompts.rows), len(mine), len(theirs)), np.nan)
        against = np.full((len(prompts.rows), len(mine)), np.nan)
        first: Any = None
        for i, (own, own_texts) in enumerate(mine):
            for j, (other, texts) in enumerate(theirs):
                same = same_tokens(own, other)
                result, found[:, i, j] = wins(i, j, texts, same, other.finished)
                first = first or result
            if answers is not None:
                same = np.array([a == b for a, b in zip(own_texts, answers, strict=True)])
                _, against[:, i] = wins(i, len(theirs), answers, same, np.ones(len(same), bool))
        rows = []
        for row in map(int, np.flatnonzero(distributed.local_rows(prompts).valid)):
            shown = first.shown[row]
            rows.append(
                {
                    "wins": found[row],
                    "against_answers": against[row],
                    "policy": self._parts(prompts, row, mine),
                    "reference": self._parts(prompts, row, theirs),
                    "first": {
                        "p_policy": float(first.p_first[row]) if first.weight[row] > 0 else None,
                        "shown": None if shown is None else "AB"[shown.index(0)],
                        "reason": first.reasons[row],
                        "scores": first.scores[row],
                    },
                }
            )
        return {"briefs": briefs, "rows": rows}

    def _parts(self, prompts: Prompts, row: int, drawn: list[tuple[Samples, list[str]]]) -> dict[str, float]:
        """One prompt's means over its samples."""
        values: dict[str, list[float]] = {
            "tokens": [float(samples.lengths[row]) for samples, _ in drawn],
            "unfinished": [float(not samples.finished[row]) for samples, _ in drawn],
        }
        for _, texts in drawn:
            for name, value in contract.measure(self.judge, prompts.messages[row], texts[row]).items():
                if isinstance(value, (int, float)):
                    values.setdefault(name, []).append(float(value))
        return {name: float(np.mean(v)) for name, v in values.items()}


def same_tokens(a: Samples, b: Samples) -> np.ndarray:
    """bool[B]: the same response, token for token, up to its length."""
    counted = np.arange(a.tokens.shape[-1]) < np.asarray(a.lengths)[:, None]
    return (a.lengths == b.lengths) & np.all((a.tokens == b.tokens) | ~counted, axis=-1)
