"""The pairs of a step while the judge decides on them: asked about, waited for, logged.

With `judging.steps_behind` a step's pairs are drawn before the update of the step before, and the judge, in a thread of
its own, decides on them while the devices update:

    devices  sample 0 | sample 1 |          | update 0 | sample 2 |          | update 1 | sample 3 | ...
    judge               0 ..................  1 ............................   2 ...............

Step n is then drawn by the policy before update n - 1: the loss is right for pairs of any origin, and their
log-probabilities are those of the policy that is updated. What was drawn early is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import numpy as np

from xpo_jax.algorithm.packing import MicroBatch
from xpo_jax.data.pairs_log import pair_records
from xpo_jax.evaluation import evaluator
from xpo_jax.experiment.choosing import UnjudgedPairs
from xpo_jax.experiment.early_samples import EarlySamples, fingerprint
from xpo_jax.experiment.run_recorder import RunRecorder
from xpo_jax.experiment.setup import Components
from xpo_jax.judges import ask, contract
from xpo_jax.reporting.metrics import Timer
from xpo_jax.runtime import distributed
from xpo_jax.runtime.background import BackgroundCall
from xpo_jax.runtime.collectives import run_and_gather
from xpo_jax.runtime.interruption import Signals, Stopped, Watchdog
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Array, Samples, Verdicts


class ScoredPairs(NamedTuple):
    """The pairs of a step before their verdicts.

    candidates: what was drawn. pairs: what was chosen of them.
    micro_batches: the pairs, packed. scored: [f32[S B]], the reference's log-probabilities, nats, which may still be
      under way on the devices.
    """

    candidates: tuple[Samples, Samples]
    pairs: UnjudgedPairs
    micro_batches: list[MicroBatch]
    scored: list[Array]


class JudgedPairs(NamedTuple):
    """The pairs of a step with their verdicts.

    of_step: the pairs. ref_logps: f32[S B], nats, on the host. verdicts: on all rows.
    summaries: of each process's verdicts.
    """

    of_step: ScoredPairs
    ref_logps: np.ndarray
    verdicts: Verdicts
    summaries: list[ask.ShardSummary]


class _Pending(NamedTuple):
    """Pairs with the question about them; `call` asks it already, or it is asked when they are waited for."""

    of_step: ScoredPairs
    question: Callable[[], Verdicts]
    call: BackgroundCall[Verdicts] | None


class JudgeQueue:
    """The pairs that the judge is asked about, by step: at most two steps'.

    A context: where a signal or an error ends the run, it waits for the judge and logs its verdicts, so that they are
    not asked for twice.

    Args:
      components: of the run. recorder: logs the pairs. timer: takes the seconds of judging and scoring.
      signals, watchdog: of the process, for waits.
      restored: as `drawn` returned it to the checkpoint that the run resumes from.
    """

    def __init__(
        self,
        components: Components,
        recorder: RunRecorder,
        timer: Timer,
        signals: Signals,
        watchdog: Watchdog,
        restored: EarlySamples | None,
    ):
        self._components, self._recorder, self._timer = components, recorder, timer
        self._signals, self._watchdog, self._restored = signals, watchdog, restored
        self._pending: dict[int, _Pending] = {}

    @property
    def steps(self) -> list[int]:
        """The steps whose pairs the judge was asked about and which are not finished."""
        return list(self._pending)

    def restored(self, step: int) -> tuple[Samples, Samples] | None:
        """Return the candidates of a step if they were drawn early by a start of the run that was interrupted."""
        early = self._restored
        fits = early is not None and early.step == step and early.prompts == self._fingerprint(step)
        return early.samples if early is not None and fits else None

    def drawn(self, step: int) -> EarlySamples | None:
        """Return the candidates of a step if they were drawn early, for a checkpoint."""
        if step not in self._pending:
            return None
        return EarlySamples(step, self._fingerprint(step), self._pending[step].of_step.candidates)

    def put(self, step: int, of_step: ScoredPairs) -> None:
        """Ask the judge about a step's pairs: in `finish`, or with `judging.steps_behind` in a thread from now on."""
        question, call = self._question(step, of_step.pairs), None
        if self._components.config.judging.steps_behind:
            earlier = [pending.call for pending in self._pending.values()]
            call = BackgroundCall(question, after=earlier[-1] if earlier else None)
        self._pending[step] = _Pending(of_step, question, call)

    def wait(self) -> None:
        """Wait until the judge has answered all that it was asked; `finish` raises what went wrong."""
        with self._timer("judge"):
            for pending in self._pending.values():
                if pending.call is not None:
                    self._watchdog.beat("waiting for the judge")
                    pending.call.join(self._signals.check_wait)

    def finish(self, step: int) -> JudgedPairs:
        """Wait for the verdicts on a step's pairs, and log them."""
        pending = self._pending.pop(step)
        (local, ref_logps), summaries = run_and_gather("judging", self._judge, step, pending)
        verdicts = pending.of_step.pairs.counted(ask.merge_shards(local, summaries))
        return JudgedPairs(pending.of_step, ref_logps, verdicts, summaries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        calls = [pending.call for pending in self._pending.values() if pending.call is not None]
        if not isinstance(error, Exception | Stopped) or not calls:
            return
        if not all(call.ended for call in calls) and distributed.is_lead_process():
            print("xpo_jax: waiting for the judge, whose verdicts are kept", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception, Stopped):  # the error that ends the run is the one to report
            for step, pending in self._pending.items():
                self._log(step, pending.of_step, self._answer(pending))
            if isinstance(error, Stopped) and error.on_all_processes:
                self._recorder.push()

    def _judge(self, step: int, pending: _Pending) -> tuple[tuple[Verdicts, np.ndarray], ask.ShardSummary]:
        """Return the verdicts with the reference's log-probabilities, and the summary for all processes."""
        with self._timer("judge"):
            verdicts = self._answer(pending)
        with self._timer("score"):  # the rest of the scoring, which ran while the judge worked
            ref_logps = self._log(step, pending.of_step, verdicts)
        return (verdicts, ref_logps), ask.summarize_shard(verdicts)

    def _answer(self, pending: _Pending) -> Verdicts:
        if pending.call is None:
            return pending.question()
        self._watchdog.beat("waiting for the judge")
        return pending.call.wait(self._signals.check_wait)

    def _question(self, step: int, pairs: UnjudgedPairs) -> Callable[[], Verdicts]:
        """Return the call that asks the judge: each process about its local rows, a collective judge about all."""
        judge, config = pairs.judge, self._components.config
        local_rows, collective = distributed.local_rows(pairs.prompts), contract.is_collective(judge)
        first, second = pairs.samples
        return lambda: ask.ask(
            judge,
            pairs.prompts if collective else local_rows,
            ask.ResponsePairs(
                *pairs.texts,
                identical=evaluator.same_tokens(first, second),
                policy_finished=first.finished,
                reference_finished=second.finished,
            ),
            unfinished_loses=config.loss.unfinished_loses,
            both_orders=config.judging.both_orders,
            hide_thinking=config.judging.hide_thinking,
            shown_seed=(config.top.seed, Stream.TRAINING, step),
            recorded={} if collective else self._recorder.recorded_verdicts(step, local_rows, pairs.texts),
        )

    def _log(self, step: int, of_step: ScoredPairs, verdicts: Verdicts) -> np.ndarray:
        """Write the pairs of this process, and return the reference's log-probabilities of all."""
        pairs, ref_logps = of_step.pairs, np.concatenate(jax.device_get(of_step.scored), axis=1)
        local_rows = distributed.local_rows(pairs.prompts)
        records = pair_records(
            step, local_rows, pairs.samples, pairs.texts, verdicts, verdicts.shown, ref_logps
        )
        self._recorder.write_pairs(pairs.with_scores(records))
        return ref_logps

    def _fingerprint(self, step: int) -> str:
        return fingerprint(self._components.data.batches[step], self._components.programs.max_new_tokens)
