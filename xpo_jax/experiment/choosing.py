"""From the candidates of a step to the pairs that are judged and learned from, see algorithm/pairing.py.

With two candidates a prompt there is nothing to choose. Rules that need the policy's implicit rewards compute them on
the devices. Rules that need scores ask the judge here, and what then compares the answers is
a `ScoredJudge`. Their scores go into the pairs log, so that an interrupted run does not ask for them a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from xpo_jax.algorithm import pairing
from xpo_jax.algorithm.packing import MicroBatch
from xpo_jax.algorithm.programs import Programs
from xpo_jax.config.loss import Loss
from xpo_jax.judges import contract, scoring
from xpo_jax.judges.contract import HasScores, Judge
from xpo_jax.judges.thinking import without_thinking
from xpo_jax.reporting.metrics import Timer
from xpo_jax.runtime.collectives import run_and_gather
from xpo_jax.values import Array, Params, Prompts, Samples, Verdicts


class UnjudgedPairs(NamedTuple):
    """The pairs of a step, before their verdicts.

    prompts: a row for each pair, see `pairing.Chosen`.
    samples, texts: of the first and the second one of each pair.
    judge: compares them.
    scored: the scores that the rule used, and `log` what is logged of them, by position; None and {} for no scores.
    """

    prompts: Prompts
    samples: tuple[Samples, Samples]
    texts: tuple[list[str], list[str]]
    judge: Judge
    scored: scoring.Scored | None = None
    log: Mapping[int, Sequence[Mapping[str, Any]]] = {}

    @property
    def tokens(self) -> np.ndarray:
        """The responses, i32[S B T]."""
        return np.stack([samples.tokens for samples in self.samples])

    @property
    def lengths(self) -> np.ndarray:
        """Their lengths, i32[S B]."""
        return np.stack([samples.lengths for samples in self.samples])

    def counted(self, verdicts: Verdicts) -> Verdicts:
        """Return verdicts on these pairs with the queries and counts of all that was put to the judge."""
        return verdicts if self.scored is None else self.scored.counted(verdicts)

    def with_scores(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return records of the pairs log with the scores of all candidates, at the first pair of each prompt."""
        return [
            {**record, "candidates": self.log[record["position"]]}
            if record["position"] in self.log
            else record
            for record in records
        ]


class Chooser:
    """Chooses the pairs of each step.

    Args:
      programs, judge: of the run. decode: the text of each sample.
      loss: the rule. timer: takes the seconds. hide_thinking: see settings.Judging.
    """

    def __init__(
        self,
        programs: Programs,
        judge: Judge,
        decode: Callable[[Samples], list[str]],
        loss: Loss,
        timer: Timer,
        *,
        hide_thinking: bool,
    ):
        self._programs, self._judge, self._decode = programs, judge, decode
        self._loss, self._timer, self._hide_thinking = loss, timer, hide_thinking

    def choose(
        self,
        prompts: Prompts,
        first: Samples,
        second: Samples,
        *,
        policy: Params,
        reference: Params,
        recorded: Mapping[str, float],
    ) -> UnjudgedPairs:
        """Choose the pairs of a batch.

        Args:
          first: of the candidates `pairing.policy_numbers`, one call's. second: of candidate 1.
          policy, reference: weights, for rules that need implicit rewards.
          recorded: scores from before the run was interrupted, see `scoring.score_rows`.
        """
        loss, count = self._loss, self._loss.candidates
        of_policy = pairing.split(first, count)
        samples = [of_policy[0], second, *of_policy[1:]]
        if loss.pairing is None:
            return self._unscored(prompts, (samples[0], second))
        candidates = pairing.stack(samples)
        if loss.scores_answers:
            return self._by_scores(prompts, candidates, samples, recorded)
        rewards = self._rewards(prompts, candidates, policy, reference)
        informative = pairing.informative(candidates, unfinished_loses=loss.unfinished_loses)
        numbers = pairing.choose_by_rewards(loss.pairing, rewards, informative)
        chosen = pairing.take_pairs(prompts, candidates, numbers[:, None])
        return self._unscored(chosen.prompts, chosen.samples)

    def _unscored(self, prompts: Prompts, samples: tuple[Samples, Samples]) -> UnjudgedPairs:
        with self._timer("sample"):
            texts = self._decode(samples[0]), self._decode(samples[1])
        return UnjudgedPairs(prompts, samples, texts, self._judge)

    def _rewards(
        self, prompts: Prompts, candidates: pairing.Candidates, policy: Params, reference: Params
    ) -> np.ndarray:
        """Return log pi - log ref of each candidate, f32[C B]; beta times it is the reward, in the same order."""
        dispatched = []
        for number in range(0, len(candidates.tokens), 2):
            two = [number, min(number + 1, len(candidates.tokens) - 1)]  # an odd one is scored twice
            packed = self._programs.pack(prompts, candidates.tokens[two], candidates.lengths[two])
            dispatched.append([self._programs.score(weights, packed) for weights in (policy, reference)])
        with self._timer("score"):
            ratios = [of_policy - of_reference for of_policy, of_reference in jax.device_get(dispatched)]
        return np.concatenate(ratios)[: len(candidates.tokens)]

    def _by_scores(
        self,
        prompts: Prompts,
        candidates: pairing.Candidates,
        samples: list[Samples],
        recorded: Mapping[str, float],
    ) -> UnjudgedPairs:
        judge, loss = self._judge, self._loss
        assert isinstance(judge, HasScores), "judge_factory.py refuses others"
        loses, collective = ~candidates.finished & loss.unfinished_loses, contract.is_collective(judge)
        with self._timer("sample"):
            decoded = [self._decode(s) for s in samples]
        texts = [[self._read(text) for text in column] for column in decoded]

        def score() -> tuple[None, scoring.ScoreSummary]:
            return None, scoring.score_rows(
                judge,
                prompts,
                texts,
                loses,
                recorded={} if collective else recorded,  # the processes' records differ
                collective=collective,
            )

        with self._timer("judge"):
            scored = scoring.merge(run_and_gather("scoring", score)[1])
        ranked = np.where(loses, -np.inf, scored.scores)
        if loss.pairing == "all":
            pairs = len(pairing.all_pairs(len(texts)))
            numbers = np.tile(np.arange(pairs), (len(prompts.valid), 1))
        else:
            numbers = pairing.choose_by_scores(str(loss.pairing), ranked)[:, None]
        log = {
            int(position) * numbers.shape[1]: [
                {"text": column[row], "score": _number(scored.scores[number, row])}
                for number, column in enumerate(texts)
            ]
            for row, position in enumerate(prompts.position)
            if prompts.valid[row]
        }
        by_key = scoring.scores_by_key(prompts, texts, scored.scores)
        chosen = pairing.take_pairs(prompts, candidates, numbers)
        first, second = (
            [decoded[number][row] for number, row in zip(side, chosen.rows, strict=True)]
            for side in chosen.numbers.T
        )
        compares = scoring.ScoredJudge(judge, by_key, scored.failure)
        return UnjudgedPairs(chosen.prompts, chosen.samples, (first, second), compares, scored, log)

    def _read(self, text: str) -> str:
        """Return what the judge reads of an answer."""
        return without_thinking(text) if self._hide_thinking else text


def _number(score: float) -> float | None:
    return None if np.isnan(score) else float(score)


def pack_and_score(
    programs: Programs, weights: Params, prompts: Prompts, tokens: np.ndarray, lengths: np.ndarray
) -> tuple[list[MicroBatch], list[Array]]:
    """Pack pairs, a batch's number of them at a time, and dispatch their log-probabilities; does not wait.

    Args:
      prompts: as many batches of rows as there are pairs of a prompt. tokens i32[S B T], lengths i32[S B].

    Returns:
      The micro-batches of all pairs; and f32[S B], nats, for each batch's number of them.
    """
    micro_batches, scored, B = list[MicroBatch](), list[Array](), programs.shapes.batch_size
    for start in range(0, len(prompts.valid), B):
        rows = slice(start, start + B)
        group = prompts._replace(
            tokens=prompts.tokens[rows], lengths=prompts.lengths[rows], valid=prompts.valid[rows]
        )
        packed = programs.pack(group, tokens[:, rows], lengths[:, rows])
        scored.append(programs.score(weights, packed))
        micro_batches += [
            batch._replace(pairs=np.where(batch.pairs < 0, batch.pairs, batch.pairs + start))
            for batch in packed
        ]
    return micro_batches, scored
