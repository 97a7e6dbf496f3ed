"""What a judge that shows people the progress of a run is given between two steps, see `contract.HasProgress`."""

from __future__ import annotations

import collections

import numpy as np

from xpo_jax.evaluation import statistics
from xpo_jax.evaluation.result import Evaluation
from xpo_jax.experiment.resume import Counters
from xpo_jax.experiment.setup import Components
from xpo_jax.judges.contract import HasProgress, Progress
from xpo_jax.judges.outcomes import Outcomes
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Params

PAIRS = 64  # of the latest with a verdict give the win rate, or a few more: complete steps
EXAMPLES = 3  # held-out prompts


class JudgeProgress:
    """Counts the policy's wins in the latest training pairs, and samples a few held-out prompts; both for the judge.

    Where the judge takes no progress, nothing is sampled.

    Args:
      components: of the run.
      start: the evaluation before the first step, which a resumed run has, too.
      counters: of the run, which counts on in them.
    """

    def __init__(self, components: Components, start: Evaluation, counters: Counters):
        self._components = components
        self._counters = counters
        self._held_out = (start.win_rate, start.low, start.high, 0)
        # of each step: wins, ties, pairs
        self._wins: collections.deque[tuple[int, int, int]] = collections.deque()
        self._first = list(start.samples[:EXAMPLES])

    def count(self, outcomes: Outcomes) -> None:
        """Take what became of the pairs of a step."""
        pairs = outcomes.get("pairs", 0) - outcomes.get("failed", 0)
        ties = pairs - outcomes.get("decisive", 0)
        self._wins.append((outcomes.get("won", 0), ties, pairs))
        while sum(step[-1] for step in self._wins) - self._wins[0][-1] >= PAIRS:
            self._wins.popleft()

    def show(self, policy: Params, done: int, evaluated: Evaluation | None) -> None:
        """Give the judge the progress after `done` steps; `policy` as it is sampled from, and an evaluation of it."""
        if evaluated is not None:
            self._held_out = (evaluated.win_rate, evaluated.low, evaluated.high, done)
        judge = self._components.judging.judge
        if not isinstance(judge, HasProgress):
            return
        wins, ties, pairs = map(sum, zip(*self._wins, strict=True)) if self._wins else (0, 0, 0)
        shares = np.repeat([1.0, 0.5, 0.0], [wins, ties, pairs - wins - ties])
        rate = statistics.win_rate([share[None] for share in shares])
        counters, evaluates_too = self._counters, self._components.judging.evaluates_too
        evaluation = counters.evaluation_queries if evaluates_too else 0
        against_reference = self._components.config.loss.second_candidate == "reference"
        newest = self._sample(policy, done)
        judge.progress(
            Progress(
                step=done,
                steps=self._components.config.top.steps,
                win_rate=(rate.mean, rate.low, rate.high) if against_reference and pairs > 1 else None,
                pairs=pairs,
                examples=[
                    (row["prompt"], row["policy"], text)
                    for row, text in zip(self._first, newest, strict=True)
                ],
                held_out=self._held_out,
                queries=counters.queries + evaluation,
            )
        )

    def _sample(self, policy: Params, done: int) -> list[str]:
        """Return a sample for each of the first prompts of `start`."""
        components = self._components
        batch = components.data.held_out[0]
        # the samples that an evaluation at this step would draw first
        drawn = components.programs.sample(policy, batch, stream=Stream.EVALUATION, step=done, candidate=0)
        texts = components.models.decode(components.programs.fetch(drawn))
        return [texts[i] for i in np.flatnonzero(batch.valid)[: len(self._first)]]
