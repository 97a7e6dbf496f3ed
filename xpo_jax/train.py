"""Exploratory Preference Optimization (arXiv 2405.21046, Algorithm 1), all of it on one page.

setup.py builds the components from the config; this module puts them in order. values.py documents each value,
startup.py what happens before the first step, session.py what happens between two steps and after the last,
judged_pairs.py how the pairs of a step are sampled and judged. Every process of a run executes this page on the same
global batches. Host steps that may fail on one process alone run through collectives.py, so that all processes fail
together.
"""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict

from xpo_jax.experiment import startup
from xpo_jax.experiment.judged_pairs import PairMaker
from xpo_jax.experiment.session import Context
from xpo_jax.experiment.step import step_metrics, update_policy
from xpo_jax.judges import ask, outcomes
from xpo_jax.reporting.metrics import Timer
from xpo_jax.reporting.summary import CONSOLE
from xpo_jax.values import Pairs


def train(config: ConfigDict, *, accept_changes: bool = False) -> dict[str, Any]:
    """Run an experiment from its first step, or from where it was interrupted, to its export; see `startup.run`."""
    return startup.run(config, _train, accept_changes=accept_changes)


def _train(context: Context) -> dict[str, Any]:
    # long: the whole algorithm is to be read from top to bottom
    components = context.components
    programs, replay = components.programs, components.replay
    reference_step = components.config.model.reference_step
    timer = Timer(jax.profiler.TraceAnnotation)

    state, base, policy, reference, ready = startup.start(context)
    done = ready.step
    with (
        startup.open_session(ready, CONSOLE, asks_judge=True) as session,
        PairMaker(
            components, session.recorder, timer, context.signals, context.watchdog, ready.restored.drawn
        ) as maker,
    ):
        session.drawn = maker.drawn
        replay.refill(session.recorder.past_pairs)
        while True:
            # Between two steps.
            if components.judging.evaluates_too and session.evaluates(done):
                maker.wait_for_judge()  # which takes one call at a time
            session.evaluate_if_due(done, policy)
            session.checkpoint_if_due(done)
            if session.should_stop():
                break
            session.begin_step(done)

            # Sample, choose the pairs, and put them to the judge: those of this step, and with judging.steps_behind
            # those of the next one, which the judge decides while this step updates the policy.
            maker.begin(done, policy, reference)
            if components.config.judging.steps_behind and session.may_begin(range(done, done + 2)):
                maker.begin(done + 1, policy, reference)
            judged = maker.finish(done)
            valid, verdicts = judged.prompts.valid, judged.verdicts
            components.judging.failure_tolerance.check(judged.summaries)
            step_outcomes = outcomes.add(summary["outcomes"] for summary in judged.summaries)
            cut_rate = components.models.cut_rate(judged.samples, valid)
            session.learning.count(step_outcomes, cut_rate=cut_rate)
            session.progress.count(step_outcomes)

            # Update: once on these pairs, then on past ones as often as the config asks for.
            fresh = Pairs(
                judged.prompts.tokens,
                judged.prompts.lengths,
                judged.tokens,
                judged.lengths,
                judged.ref_logps,
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
                    judged.micro_batches,
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
                    **components.data.batches.metrics(done),
                },
                times=timer.take(),
                tokens=judged.lengths[:, valid].sum(),
            )
            del update  # or it would hold these weights during the next update
            done += 1
            session.record_step(done, state, metrics)

        # Pairs that were begun early, before the run turned out to end here, are judged and logged, too.
        if maker.has_restored(done):
            maker.begin(done, policy, reference)
        for step in maker.begun:
            session.counters.queries += maker.finish(step).verdicts.queries

    policy = reference = None  # frees their memory for the export
    return session.end(state, base, done)
