"""Held-out evaluation: the policy against the reference, by the judge, with an interval over prompts.

Two samples of the policy per prompt meet several of the reference, and an answer from a file where there is one. A
prompt's comparisons share their samples and are averaged first; the interval is over prompts, which are independent.
The reference's samples are drawn once, and every evaluation of a run uses the same. Each process judges its local rows
of a batch, and all processes get all results. statistics.py computes the rates from them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from xpo_jax.algorithm.programs import Programs
from xpo_jax.evaluation import statistics
from xpo_jax.evaluation.result import Evaluation
from xpo_jax.judges import ask, contract, limits, outcomes
from xpo_jax.judges.thinking import without_thinking
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import run_on_all
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Params, Prompts, Samples

POLICY_SAMPLES = 2  # per prompt; the scoring program takes as many candidates
Decode = Callable[[Samples], list[str]]


class Opponents(NamedTuple):
    """What the policy's samples meet in every evaluation of a run.

    batches: the held-out prompts, in the shapes that the run's programs are compiled for.
    reference: its weights, as they are sampled from. reference_samples: R, per prompt.
    answers: per batch B texts, which the policy's samples meet too ("" in padding rows); None for none.
    """

    batches: Sequence[Prompts]
    reference: Params
    reference_samples: int
    answers: Sequence[Sequence[str]] | None


class _Candidate(NamedTuple):
    """One response to each prompt of a batch, and its texts."""

    samples: Samples
    texts: list[str]


class _Batch(NamedTuple):
    """What is judged of one batch: its prompts, the candidates of each side, and answers where there is a file."""

    prompts: Prompts
    policy: list[_Candidate]
    reference: list[_Candidate]
    answers: Sequence[str] | None


@dataclasses.dataclass
class _Totals:
    """The results of an evaluation so far; lists have one entry per prompt.

    wins: f64[policy's samples, reference's]. differences: in characters, of the same shape.
    against_answers: f64[policy's samples]. kl, surprisal, tokens: means over the policy's samples.
    parts: by side and name, means over the side's samples. samples: see `Evaluation`.
    """

    # long: one field per result
    wins: list[np.ndarray] = dataclasses.field(default_factory=list)
    differences: list[np.ndarray] = dataclasses.field(default_factory=list)
    against_answers: list[np.ndarray] = dataclasses.field(default_factory=list)
    kl: list[float] = dataclasses.field(default_factory=list)
    surprisal: list[float] = dataclasses.field(default_factory=list)
    tokens: list[float] = dataclasses.field(default_factory=list)
    queries: int = 0
    counts: dict[str, float] = dataclasses.field(default_factory=dict)
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[str, list[float]]] = dataclasses.field(
        default_factory=lambda: {"policy": {}, "reference": {}}
    )
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Evaluator:
    """Evaluates policies on the same held-out prompts and reference samples.

    Args:
      programs: of the run.
      judge: of the run.
      decode: Samples on the host -> B texts.
      opponents: the prompts, and what the policy's samples meet.
      unfinished_loses, both_orders, hide_thinking: see `ask.ask`.
      failure_tolerance, seed: of the run; the seed is for the order shown.
    """

    # long: five of the arguments are fields of the config, passed by name

    def __init__(
        self,
        programs: Programs,
        judge: contract.Judge,
        decode: Decode,
        opponents: Opponents,
        *,
        unfinished_loses: bool,
        both_orders: bool,
        hide_thinking: bool,
        failure_tolerance: limits.FailureTolerance,
        seed: int,
    ):
        self._programs, self._judge, self._decode, self._opponents = programs, judge, decode, opponents
        self._failure_tolerance, self._seed = failure_tolerance, seed
        self._rules: dict[str, Any] = {"unfinished_loses": unfinished_loses, "both_orders": both_orders}
        self._rules["hide_thinking"] = hide_thinking
        self._reference_candidates: list[list[_Candidate]] = []  # per batch, from the first evaluation on

    def __call__(
        self, policy: Params, step: int, progress: Callable[[Iterable[Any]], Iterable[Any]]
    ) -> Evaluation:
        """Evaluate a policy.

        Args:
          policy: its weights, as it is sampled from.
          step: steps so far.
          progress: wraps the iteration over batches, to show the progress.

        Raises:
          JudgeError: see `limits.FailureTolerance`.
        """
        totals = _Totals()
        for number, prompts in enumerate(progress(self._opponents.batches)):
            batch = self._sample(policy, prompts, step, number)
            self._score(policy, batch, totals)
            seed = (self._seed, Stream.EVALUATION, step, number)
            shards = run_on_all("judging held-out answers", self._judge_local_rows, batch, seed)
            calls = [call for shard in shards for call in shard["calls"]]
            self._failure_tolerance.check(calls)
            totals.queries += sum(call["queries"] for call in calls)
            totals.counts = outcomes.add([totals.counts, *(call["counts"] for call in calls)])
            totals.outcomes = outcomes.add([totals.outcomes, *(call["outcomes"] for call in calls)])
            rows = [row for shard in shards for row in shard["rows"]]
            for i, row in zip(map(int, np.flatnonzero(prompts.valid)), rows, strict=True):
                _add_row(totals, batch, i, row)
        return _summarise(totals, against_answers=self._opponents.answers is not None)

    def _sample(self, policy: Params, prompts: Prompts, step: int, number: int) -> _Batch:
        """Sample from the policy for batch `number`, and from the reference if that was not done before."""
        # the position among all held-out prompts: with the position in its batch, two batches would share keys
        prompts = prompts._replace(position=prompts.position + np.int32(number * len(prompts.rows)))
        # candidates 0 and 1 are the policy's, from 2 on the reference's: no key is used twice
        policy_candidates = self._candidates(policy, prompts, step, range(POLICY_SAMPLES))
        if number == len(self._reference_candidates):
            ids = range(POLICY_SAMPLES, POLICY_SAMPLES + self._opponents.reference_samples)
            reference = self._opponents.reference
            self._reference_candidates.append(self._candidates(reference, prompts, 0, ids))
        answers = None if self._opponents.answers is None else self._opponents.answers[number]
        return _Batch(prompts, policy_candidates, self._reference_candidates[number], answers)

    def _candidates(
        self, weights: Params, prompts: Prompts, step: int, candidates: Iterable[int]
    ) -> list[_Candidate]:
        sampled = [
            self._programs.sample(weights, prompts, stream=Stream.EVALUATION, step=step, candidate=candidate)
            for candidate in candidates
        ]
        return [_Candidate(samples, self._decode(samples)) for samples in map(self._programs.fetch, sampled)]

    def _score(self, policy: Params, batch: _Batch, totals: _Totals) -> None:
        """Add KL, surprisal and lengths of the policy's samples."""
        valid = np.flatnonzero(batch.prompts.valid)
        lengths = np.stack([candidate.samples.lengths for candidate in batch.policy])
        tokens = np.stack([candidate.samples.tokens for candidate in batch.policy])
        micro_batches = self._programs.pack(batch.prompts, tokens, lengths)
        scored = [
            self._programs.score(weights, micro_batches) for weights in (policy, self._opponents.reference)
        ]
        logps, ref_logps = map(np.asarray, jax.device_get(scored))
        totals.kl.extend((logps - ref_logps).mean(0)[valid])
        totals.surprisal.extend(-logps.mean(0)[valid])
        totals.tokens.extend(lengths.mean(0)[valid])

    def _judge_local_rows(self, batch: _Batch, seed: tuple[int, ...]) -> dict[str, Any]:
        """Judge this process's rows of a batch.

        Returns:
          "calls": a `CallSummary` of each call of the judge. "rows": the results of each valid local row.
        """
        prompts, shape = batch.prompts, (len(batch.prompts.rows), len(batch.policy), len(batch.reference))
        local_rows = distributed.local_rows(prompts)
        judged_rows = prompts if contract.is_collective(self._judge) else local_rows
        calls: list[limits.CallSummary] = []

        def judge(i: int, j: int, pairs: ask.ResponsePairs) -> tuple[Any, np.ndarray]:
            verdicts = ask.ask(self._judge, judged_rows, pairs, **self._rules, shown_seed=(*seed, i, j))
            calls.append(ask.summarize_call(verdicts))  # the verdicts themselves come with the rows
            return verdicts, np.where(verdicts.weight > 0, ask.wins(verdicts.p_first), np.nan)

        wins, against_answers = np.full(shape, np.nan), np.full(shape[:2], np.nan)
        first: Any = None
        for i, (policy, texts) in enumerate(batch.policy):
            for j, (reference, reference_texts) in enumerate(batch.reference):
                identical = same_tokens(policy, reference)
                pairs = ask.ResponsePairs(
                    texts, reference_texts, identical, policy.finished, reference.finished
                )
                verdicts, wins[:, i, j] = judge(i, j, pairs)
                first = first or verdicts
            if batch.answers is not None:
                identical = np.array([a == b for a, b in zip(texts, batch.answers, strict=True)])
                all_finished = np.ones(len(identical), bool)
                pairs = ask.ResponsePairs(texts, batch.answers, identical, policy.finished, all_finished)
                _, against_answers[:, i] = judge(i, len(batch.reference), pairs)
        rows = [
            {
                "wins": wins[i],
                "against_answers": against_answers[i],
                "policy": self._parts(prompts, i, batch.policy),
                "reference": self._parts(prompts, i, batch.reference),
                "first": {
                    "p_policy": float(first.p_first[i]) if first.weight[i] > 0 else None,
                    "shown": None if first.shown[i] is None else "AB"[first.shown[i].index(0)],
                    "reason": first.reasons[i],
                    "scores": first.scores[i],
                },
            }
            for i in map(int, np.flatnonzero(local_rows.valid))
        ]
        return {"calls": calls, "rows": rows}

    def _parts(self, prompts: Prompts, row: int, candidates: Sequence[_Candidate]) -> dict[str, float]:
        """Return one prompt's means over its samples."""
        values: dict[str, list[float]] = {
            "tokens": [float(samples.lengths[row]) for samples, _ in candidates],
            "unfinished": [float(not samples.finished[row]) for samples, _ in candidates],
        }
        for _, texts in candidates:
            text = without_thinking(texts[row]) if self._rules["hide_thinking"] else texts[row]
            for name, value in contract.measure(self._judge, prompts.messages[row], text).items():
                if isinstance(value, (int, float)):
                    values.setdefault(name, []).append(float(value))
        return {name: float(np.mean(v)) for name, v in values.items()}


def same_tokens(a: Samples, b: Samples) -> np.ndarray:
    """Return bool[B]: whether responses are the same, token for token, up to their length."""
    counted = np.arange(a.tokens.shape[-1]) < np.asarray(a.lengths)[:, None]
    return (a.lengths == b.lengths) & np.all((a.tokens == b.tokens) | ~counted, axis=-1)


def _add_row(totals: _Totals, batch: _Batch, i: int, row: Mapping[str, Any]) -> None:
    """Add the results of one prompt, which may have come through JSON: None is nan there."""
    totals.wins.append(np.array(row["wins"], np.float64))
    totals.against_answers.append(np.array(row["against_answers"], np.float64))
    characters = [np.array([len(texts[i]) for _, texts in side]) for side in (batch.policy, batch.reference)]
    totals.differences.append(np.subtract.outer(*characters).astype(np.float64))
    for side in ("policy", "reference"):
        for name, value in row[side].items():
            totals.parts[side].setdefault(name, []).append(math.nan if value is None else value)
    totals.samples.append(
        {
            "prompt": batch.prompts.messages[i][-1]["content"],
            "reference": batch.reference[0].texts[i],
            "policy": batch.policy[0].texts[i],
            "win_share": statistics.win_share(totals.wins[-1]),
            **row["first"],
        }
    )


def _summarise(totals: _Totals, *, against_answers: bool) -> Evaluation:
    """Return the rates and means over prompts."""
    means = {
        side: {name: statistics.mean_interval(np.array(values)) for name, values in parts.items()}
        for side, parts in totals.parts.items()
    }
    variety = {
        side: {f"distinct_{n}": statistics.distinct([row[side] for row in totals.samples], n) for n in (1, 2)}
        for side in totals.parts
    }
    half_widths = {name: half for name, (_, half) in means["policy"].items()}
    return Evaluation(
        *statistics.win_rate(totals.wins),
        controlled=statistics.length_controlled(totals.wins, totals.differences),
        against_answers=statistics.win_rate(totals.against_answers) if against_answers else None,
        kl=float(np.mean(totals.kl)),
        reward=statistics.reward(totals.wins, np.array(totals.kl)),
        kl_per_token=float(np.sum(totals.kl) / np.sum(totals.tokens)),
        entropy=float(np.sum(totals.surprisal) / np.sum(totals.tokens)),
        policy={name: mean for name, (mean, _) in means["policy"].items()} | variety["policy"],
        reference={name: mean for name, (mean, _) in means["reference"].items()} | variety["reference"],
        intervals=half_widths | {"kl": statistics.mean_interval(np.array(totals.kl))[1]},
        queries=totals.queries,
        counts=totals.counts,
        outcomes=totals.outcomes,
        samples=totals.samples,
    )
