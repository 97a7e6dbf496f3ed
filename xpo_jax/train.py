"""Exploratory Preference Optimization (arXiv 2405.21046, Algorithm 1), all of it on one page.

setup.py builds the components from the config; this module puts them in order. values.py documents each value,
startup.py what happens before the first step, session.py what happens between two steps and after the last. Every
process of a run executes this page on the same global batches. Host steps that may fail on one process alone run
through collectives.py, so that all processes fail together.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xpo_jax.algorithm.pairing import policy_numbers
from xpo_jax.algorithm.prefetch import ReferencePrefetcher
from xpo_jax.data.pairs_log import pair_records
from xpo_jax.evaluation import evaluator
from xpo_jax.experiment import choosing, startup
from xpo_jax.experiment.choosing import Chooser, pack_and_score
from xpo_jax.experiment.run_recorder import RunRecorder
from xpo_jax.experiment.session import Context
from xpo_jax.experiment.setup import Components
from xpo_jax.experiment.step import step_metrics, update_policy
from xpo_jax.judges import ask, contract, outcomes
from xpo_jax.reporting.metrics import Timer
from xpo_jax.reporting.summary import CONSOLE
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import run_and_gather
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Array, Pairs, Verdicts


def train(config: ConfigDict, *, accept_changes: bool = False) -> dict[str, Any]:
    """Run an experiment from its first step, or from where it was interrupted, to its export; see `startup.run`."""
    return startup.run(config, _train, accept_changes=accept_changes)


def _train(context: Context) -> dict[str, Any]:
    # long: the whole algorithm is to be read from top to bottom
    components = context.components
    programs, replay, batches = components.programs, components.replay, components.data.batches
    steps, reference_step = components.config.top.steps, components.config.model.reference_step
    second_is_reference = components.config.loss.second_candidate == "reference"
    policy_candidates = policy_numbers(components.config.loss.candidates)
    timer = Timer(jax.profiler.TraceAnnotation)

    state, base, policy, reference, ready = startup.start(context)
    done = ready.step
    prefetcher = ReferencePrefetcher(
        programs, batches, steps, reference_step, stream=Stream.TRAINING, candidate=1
    )
    chooser = Chooser(
        programs,
        components.judging.judge,
        components.models.decode,
        components.config.loss,
        timer,
        hide_thinking=components.config.judging.hide_thinking,
    )
    with startup.open_session(ready, CONSOLE, asks_judge=True) as session:
        replay.refill(session.recorder.past_pairs)
        while True:
            # Between two steps.
            session.evaluate_if_due(done, policy)
            session.checkpoint_if_due(done)
            if session.should_stop():
                break
            session.begin_step(done)

            # Sample the candidates. The judge needs their texts, so the host waits for them.
            prompts = batches[done]
            becomes_reference = reference_step(done + 1) == done + 1  # the policy after this step
            with timer("sample"):
                sampled = programs.sample(
                    policy, prompts, stream=Stream.TRAINING, step=done, candidate=policy_candidates
                )
                prefetcher.dispatch(reference if second_is_reference else policy, done)
                candidates = (programs.fetch(sampled), prefetcher.take(done))

            # Choose the pairs: with two candidates a prompt there is one, else by the rule that the config names.
            pairs = chooser.choose(
                prompts,
                *candidates,
                policy=policy,
                reference=reference,
                recorded=session.recorder.recorded_scores(done),
            )
            prompts, samples = pairs.prompts, pairs.samples
            tokens = np.stack([candidate.tokens for candidate in samples])
            lengths = np.stack([candidate.lengths for candidate in samples])

            # Dispatch what needs no verdict before the host turns to the judge. The reference is frozen, so its samples
            # for the next step can be drawn already.
            micro_batches, scored = pack_and_score(programs, reference, prompts, tokens, lengths)
            if second_is_reference and not becomes_reference:
                prefetcher.dispatch(reference, done + 1)

            # Judge: each process its local rows.
            (local_verdicts, ref_logps), summaries = run_and_gather(
                "judging", _judge, components, session.recorder, timer, done, pairs, scored
            )
            verdicts = pairs.counted(ask.merge_shards(local_verdicts, summaries))
            components.judging.failure_tolerance.check(summaries)
            step_outcomes = outcomes.add(summary["outcomes"] for summary in summaries)
            cut_rate = components.models.cut_rate(samples, prompts.valid)
            session.learning.count(step_outcomes, cut_rate=cut_rate)
            session.progress.count(step_outcomes)

            # Update: once on these pairs, then on past ones as often as the config asks for.
            fresh = Pairs(
                prompts.tokens,
                prompts.lengths,
                tokens,
                lengths,
                ref_logps,
                verdicts.p_first,
                verdicts.weight,
                prompts.valid,
            )
            policy = None  # frees the memory of the old weights for the update
            with timer("update"):
                update = update_policy(
                    programs,
                    state,
                    base,
                    fresh,
                    micro_batches,
                    replayed=replay.minibatches(done, fresh),
                    alpha=components.coefficients.alpha(done),
                    beta=components.coefficients.beta(done),
                )
            state, policy = update.state, update.policy
            reference = policy if becomes_reference else reference

            # Metrics.
            session.counters.queries += verdicts.queries
            metrics = step_metrics(
                update,
                session.counters,
                data={
                    **replay.metrics(update.summaries[1:]),
                    **ask.metrics(verdicts, prompts.valid),
                    **{f"judge/{name}": rate for name, rate in outcomes.metrics(step_outcomes).items()},
                    "judge/cut_rate": cut_rate,
                    **batches.metrics(done),
                },
                times=timer.take(),
                tokens=lengths[:, prompts.valid].sum(),
            )
            del update  # or it would hold these weights during the next update
            done += 1
            session.record_step(done, state, metrics)

    policy = reference = None  # frees their memory for the export
    return session.end(state, base, done)


def _judge(
    components: Components,
    recorder: RunRecorder,
    timer: Timer,
    step: int,
    pairs: choosing.UnjudgedPairs,
    scored: list[Array],
) -> tuple[tuple[Verdicts, np.ndarray], ask.ShardSummary]:
    """Judge this process's rows of a step and log their pairs.

    Args:
      scored: [f32[S B]], the reference's log-probabilities, which may still be under way on the devices.
      Others: of the step.

    Returns:
      The verdicts with `scored` on the host; and the verdicts' summary for all processes.
    """
    judge, prompts, samples, texts = pairs.judge, pairs.prompts, pairs.samples, pairs.texts
    config = components.config
    local_rows, collective = distributed.local_rows(prompts), contract.is_collective(judge)
    with timer("judge"):
        verdicts = ask.ask(
            judge,
            prompts if collective else local_rows,
            ask.ResponsePairs(
                *texts,
                identical=evaluator.same_tokens(*samples),
                policy_finished=samples[0].finished,
                reference_finished=samples[1].finished,
            ),
            unfinished_loses=config.loss.unfinished_loses,
            both_orders=config.judging.both_orders,
            hide_thinking=config.judging.hide_thinking,
            shown_seed=(config.top.seed, Stream.TRAINING, step),
            recorded={} if collective else recorder.recorded_verdicts(step, local_rows, texts),
        )
    with timer("score"):  # the rest of the scoring, which ran while the judge worked
        ref_logps = np.concatenate(jax.device_get(scored), axis=1)
    records = pair_records(step, local_rows, samples, texts, verdicts, verdicts.shown, ref_logps)
    recorder.write_pairs(pairs.with_scores(records))
    return (verdicts, ref_logps), ask.summarize_shard(verdicts)
