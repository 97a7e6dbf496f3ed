"""The pairs of each step, from the prompts to the verdicts: sampled, chosen, scored by the reference, judged, logged.

A step begins its pairs and then finishes them. With `judging.steps_behind` the pairs of the next step are begun before
those of this one are finished, so that the judge, in a thread of its own, decides on them while the devices update:

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
from xpo_jax.algorithm.pairing import policy_numbers
from xpo_jax.algorithm.prefetch import ReferencePrefetcher
from xpo_jax.data.pairs_log import pair_records
from xpo_jax.evaluation import evaluator
from xpo_jax.experiment.choosing import Chooser, UnjudgedPairs, pack_and_score
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
from xpo_jax.values import Array, Params, Prompts, Samples, Verdicts


class JudgedPairs(NamedTuple):
    """The pairs of a step, in the form in which it learns from them.

    prompts: a row for each pair. samples: the first and the second one of each pair.
    tokens: i32[S B T]. lengths: i32[S B]. micro_batches: the same, packed.
    ref_logps: f32[S B], nats. verdicts: on all rows. summaries: of each process's verdicts.
    """

    prompts: Prompts
    samples: tuple[Samples, Samples]
    tokens: np.ndarray
    lengths: np.ndarray
    micro_batches: list[MicroBatch]
    ref_logps: np.ndarray
    verdicts: Verdicts
    summaries: list[ask.ShardSummary]


class _Begun(NamedTuple):
    """The pairs of a step on their way; `scored` may still be under way on the devices, `ask` at the judge."""

    drawn: tuple[Samples, Samples]
    pairs: UnjudgedPairs
    tokens: np.ndarray
    lengths: np.ndarray
    micro_batches: list[MicroBatch]
    scored: list[Array]
    ask: Callable[[], Verdicts]
    call: BackgroundCall[Verdicts] | None


class PairMaker:
    """Makes the pairs of each step of a run.

    A context: where a signal or an error ends the run, it waits for the judge and logs its verdicts, so that they are
    not asked for twice.

    Args:
      components: of the run. recorder: logs the pairs.
      timer: takes the seconds of sampling, judging and scoring.
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
        top, model, loss = components.config.top, components.config.model, components.config.loss
        self._prefetcher = ReferencePrefetcher(
            components.programs,
            components.data.batches,
            top.steps,
            model.reference_step,
            stream=Stream.TRAINING,
            candidate=1,
        )
        self._chooser = Chooser(
            components.programs,
            components.judging.judge,
            components.models.decode,
            loss,
            timer,
            hide_thinking=components.config.judging.hide_thinking,
        )
        self._begun: dict[int, _Begun] = {}

    @property
    def begun(self) -> list[int]:
        """The steps whose pairs are begun and not finished."""
        return list(self._begun)

    def begin(self, step: int, policy: Params, reference: Params) -> None:
        """Draw the pairs of a step, unless that was done, and dispatch what needs no verdict.

        Args:
          policy, reference: as they are sampled from.
        """
        if step in self._begun:
            return
        components, loss = self._components, self._components.config.loss
        second_is_reference = loss.second_candidate == "reference"
        reference_step = components.config.model.reference_step
        drawn = self._draw(step, policy, reference if second_is_reference else policy)
        # With two candidates a prompt there is one pair, else the rule that the config names chooses.
        pairs = self._chooser.choose(
            components.data.batches[step],
            *drawn,
            policy=policy,
            reference=reference,
            recorded=self._recorder.recorded_scores(step),
        )
        tokens = np.stack([candidate.tokens for candidate in pairs.samples])
        lengths = np.stack([candidate.lengths for candidate in pairs.samples])
        micro_batches, scored = pack_and_score(components.programs, reference, pairs.prompts, tokens, lengths)
        # The reference is frozen, so its samples for the next step can be drawn already.
        becomes_reference = reference_step(step + 1) == step + 1  # the policy after this step
        if second_is_reference and not becomes_reference:
            self._prefetcher.dispatch(reference, step + 1)
        question, call = self._question(step, pairs), None
        if components.config.judging.steps_behind:
            earlier = [begun.call for begun in self._begun.values()]
            call = BackgroundCall(question, after=earlier[-1] if earlier else None)
        self._begun[step] = _Begun(drawn, pairs, tokens, lengths, micro_batches, scored, question, call)

    def finish(self, step: int) -> JudgedPairs:
        """Wait for the verdicts on the pairs of a step that was begun, and log them."""
        begun = self._begun.pop(step)
        (local, ref_logps), summaries = run_and_gather("judging", self._judge, step, begun)
        return JudgedPairs(
            begun.pairs.prompts,
            begun.pairs.samples,
            begun.tokens,
            begun.lengths,
            begun.micro_batches,
            ref_logps,
            begun.pairs.counted(ask.merge_shards(local, summaries)),
            summaries,
        )

    def wait_for_judge(self) -> None:
        """Wait until the judge has answered all that it was asked; `finish` raises what went wrong."""
        calls = [begun.call for begun in self._begun.values() if begun.call is not None]
        with self._timer("judge"):
            for call in calls:
                self._watchdog.beat("waiting for the judge")
                call.join(self._signals.check_wait)

    def drawn(self, step: int) -> EarlySamples | None:
        """Return the samples of a step if they were drawn early."""
        begun = self._begun.get(step)
        if begun is None or begun.call is None:
            return None
        return EarlySamples(step, self._fingerprint(step), begun.drawn)

    def has_restored(self, step: int) -> bool:
        """Return whether the samples of a step were drawn early, by a start of the run that was interrupted."""
        restored = self._restored
        return restored is not None and restored.step == step and restored.prompts == self._fingerprint(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        waits = {step: begun for step, begun in self._begun.items() if begun.call is not None}
        if not isinstance(error, Exception | Stopped) or not waits:
            return
        if (
            not all(begun.call and begun.call.ended for begun in waits.values())
            and distributed.is_lead_process()
        ):
            print("xpo_jax: waiting for the judge, whose verdicts are kept", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception, Stopped):  # the error that ends the run is the one to report
            for step, begun in waits.items():
                self._log(step, begun, self._answer(begun))
            if isinstance(error, Stopped) and error.on_all_processes:
                self._recorder.push()

    def _answer(self, begun: _Begun) -> Verdicts:
        if begun.call is None:
            return begun.ask()
        self._watchdog.beat("waiting for the judge")
        return begun.call.wait(self._signals.check_wait)

    def _fingerprint(self, step: int) -> str:
        return fingerprint(self._components.data.batches[step], self._components.programs.max_new_tokens)

    def _draw(self, step: int, policy: Params, second: Params) -> tuple[Samples, Samples]:
        """Return the policy's candidates and the second one, on the host: the judge needs their texts."""
        if self._restored is not None and self.has_restored(step):
            return self._restored.samples
        programs, prompts = self._components.programs, self._components.data.batches[step]
        candidates = policy_numbers(self._components.config.loss.candidates)
        with self._timer("sample"):
            sampled = programs.sample(
                policy, prompts, stream=Stream.TRAINING, step=step, candidate=candidates
            )
            self._prefetcher.dispatch(second, step)
            return programs.fetch(sampled), self._prefetcher.take(step)

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

    def _judge(self, step: int, begun: _Begun) -> tuple[tuple[Verdicts, np.ndarray], ask.ShardSummary]:
        """Return the verdicts with the reference's log-probabilities, and the summary for all processes."""
        with self._timer("judge"):
            verdicts = self._answer(begun)
        with self._timer("score"):  # the rest of the scoring, which ran while the judge worked
            ref_logps = self._log(step, begun, verdicts)
        return (verdicts, ref_logps), ask.summarize_shard(verdicts)

    def _log(self, step: int, begun: _Begun, verdicts: Verdicts) -> np.ndarray:
        """Write the pairs of this process, and return the reference's log-probabilities of all."""
        ref_logps = np.concatenate(jax.device_get(begun.scored), axis=1)
        pairs = begun.pairs
        local_rows = distributed.local_rows(pairs.prompts)
        records = pair_records(
            step, local_rows, pairs.samples, pairs.texts, verdicts, verdicts.shown, ref_logps
        )
        self._recorder.write_pairs(pairs.with_scores(records))
        return ref_logps
