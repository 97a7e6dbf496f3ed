"""Exploratory Preference Optimization (arXiv 2405.21046, Algorithm 1), all of it on one page.

setup.py builds the components from the config; this module puts them in order. values.py documents each value,
startup.py what happens before the first step, session.py what happens between two steps and after the last. Every
process of a run executes this page on the same global batches. Host steps that may fail on one process alone run
through collectives.py, so that all processes fail together.
"""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict

from xpo_jax.algorithm.pairing import SECOND, policy_numbers
from xpo_jax.algorithm.prefetch import ReferencePrefetcher
from xpo_jax.experiment import startup
from xpo_jax.experiment.choosing import Chooser, pack_and_score
from xpo_jax.experiment.judged_pairs import JudgeQueue, ScoredPairs
from xpo_jax.experiment.session import Context
from xpo_jax.experiment.step import step_metrics, update_policy
from xpo_jax.judges import ask, outcomes
from xpo_jax.reporting.metrics import Timer
from xpo_jax.reporting.summary import CONSOLE
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Pairs, Params


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
        programs, batches, steps, reference_step, stream=Stream.TRAINING, candidate=SECOND
    )
    chooser = Chooser(
        programs,
        components.judging.judge,
        components.models.decode,
        components.config.loss,
        timer,
        hide_thinking=components.config.judging.hide_thinking,
    )
    with (
        startup.open_session(ready, CONSOLE, asks_judge=True) as session,
        JudgeQueue(
            components, session.recorder, timer, context.signals, context.watchdog, ready.restored.drawn
        ) as judge,
    ):
        replay.refill(session.recorder.past_pairs)

        def draw(step: int, policy: Params, reference: Params) -> ScoredPairs:
            # Sample the candidates. The judge needs their texts, so the host waits for them.
            prompts, candidates = batches[step], judge.restored(step)
            if candidates is None:
                with timer("sample"):
                    sampled = programs.sample(
                        policy, prompts, stream=Stream.TRAINING, step=step, candidate=policy_candidates
                    )
                    prefetcher.dispatch(reference if second_is_reference else policy, step)
                    candidates = (programs.fetch(sampled), prefetcher.take(step))

            # Choose the pairs: with two candidates a prompt there is one, else by the rule that the config names.
            pairs = chooser.choose(
                prompts,
                *candidates,
                policy=policy,
                reference=reference,
                recorded=session.recorder.recorded_scores(step),
            )

            # Dispatch what needs no verdict before the host turns to the judge. The reference is frozen, so its samples
            # for the next step can be drawn already, unless the policy becomes the reference after this step.
            micro_batches, scored = pack_and_score(
                programs, reference, pairs.prompts, pairs.tokens, pairs.lengths
            )
            if second_is_reference and reference_step(step + 1) != step + 1:
                prefetcher.dispatch(reference, step + 1)
            return ScoredPairs(candidates, pairs, micro_batches, scored)

        while True:
            # Between two steps.
            if components.judging.evaluates_too and session.evaluates(done):
                judge.wait()  # it takes one call at a time
            session.evaluate_if_due(done, policy)
            session.checkpoint_if_due(done)
            if session.should_stop():
                break
            session.begin_step(done)

            # Judge: each process its local rows. With judging.steps_behind the next step's pairs are drawn, too, and
            # the judge decides on them while this step updates the policy.
            if done not in judge.steps:
                judge.put(done, draw(done, policy, reference))
            if components.config.judging.steps_behind and session.may_begin(range(done, done + 2)):
                judge.put(done + 1, draw(done + 1, policy, reference))
            of_step, ref_logps, verdicts, summaries = judge.finish(done)
            pairs, valid = of_step.pairs, of_step.pairs.prompts.valid
            components.judging.failure_tolerance.check(summaries)
            step_outcomes = outcomes.add(summary["outcomes"] for summary in summaries)
            cut_rate = components.models.cut_rate(pairs.samples, valid)
            session.learning.count(step_outcomes, cut_rate=cut_rate)
            session.progress.count(step_outcomes)

            # Update: once on these pairs, then on past ones as often as the config asks for.
            fresh = Pairs(
                pairs.prompts.tokens,
                pairs.prompts.lengths,
                pairs.tokens,
                pairs.lengths,
                ref_logps,
                verdicts.p_first,
                verdicts.weight,
                valid,
            )
            policy = None  # frees the memory of the old weights for the update
            with timer("update"):
                update = update_policy(
                    programs,
                    state,
                    base,
                    fresh,
                    of_step.micro_batches,
                    replayed=replay.minibatches(done, fresh),
                    alpha=components.coefficients.alpha(done),
                    beta=components.coefficients.beta(done),
                )
            state, policy = update.state, update.policy
            if reference_step(done + 1) == done + 1:
                reference = policy

            # Metrics.
            session.counters.queries += verdicts.queries
            metrics = step_metrics(
                update,
                session.counters,
                data={
                    **replay.metrics(update.summaries[1:]),
                    **ask.metrics(verdicts, valid),
                    **{f"judge/{name}": rate for name, rate in outcomes.metrics(step_outcomes).items()},
                    "judge/cut_rate": cut_rate,
                    **batches.metrics(done),
                },
                times=timer.take(),
                tokens=pairs.lengths[:, valid].sum(),
            )
            del update  # or it would hold these weights during the next update
            done += 1
            session.record_step(done, state, metrics, judge.drawn(done))

        # Pairs that were drawn early, before the run turned out to end here, are judged and logged, too.
        if judge.restored(done):
            judge.put(done, draw(done, policy, reference))
        for step in judge.steps:
            session.counters.queries += judge.finish(step).verdicts.queries

    policy = reference = None  # frees their memory for the export
    return session.end(state, base, done)
