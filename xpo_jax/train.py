"""Exploratory Preference Optimization (arXiv 2405.21046, Algorithm 1), the whole of it on one page.

`setup.py` builds the parts from the config; here they are put in order. What each value is stands in
values.py, what comes before the first step, between two of them and after the last in session.py. Every process of a
run goes through this page with the same global batches; what one of them may fail at runs through
collectives.py. What is kept so that an interrupted run goes on is the `Ledger`'s, see resume.py.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xpo_jax.algorithm.prefetch import ReferencePrefetcher
from xpo_jax.algorithm.update import applied_metrics, summarise
from xpo_jax.data.pairs_log import pair_records
from xpo_jax.evaluation import evaluator
from xpo_jax.experiment import session
from xpo_jax.experiment.resume import Ledger
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.setup import Parts
from xpo_jax.judges import ask, contract, limits
from xpo_jax.reporting.metrics import Timer
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import run_and_gather
from xpo_jax.runtime.compilation import CompilationCounter
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Array, Pairs, Prompts, Samples, Verdicts


def train(config: ConfigDict, *, accept_changes: bool = False) -> dict[str, Any]:
    """Run an experiment from its first step, or from where it was interrupted, to its export; see `session.run`."""
    return session.run(config, _train, accept_changes=accept_changes)


def _train(p: Parts, run: RunDir, ledger: Ledger, compilations: CompilationCounter) -> dict[str, Any]:
    state, policy, reference, started = session.start(p, run, ledger, compilations)
    programs, counters, timer = p.programs, ledger.counters, Timer(jax.profiler.TraceAnnotation)
    done = ledger.newest or 0  # rounds of samples
    second = ReferencePrefetcher(
        programs, p.batches, p.top.steps, p.reference_step, stream=Stream.TRAINING, candidate=1
    )
    with ledger.open(started.metrics), started.tracing, limits.save_on_judge_error(ledger.save):
        p.memory.refill(ledger.past, p.batches)
        while not (ended := started.between(done, policy, asks=True)):
            # Whether the policy after this step is the next reference.
            renews = p.reference_step(done + 1) == done + 1

            # Sample both candidates. The host needs them, so it waits.
            prompts = p.batches[done]
            with timer("sample"):
                first = programs.sample(policy, prompts, stream=Stream.TRAINING, step=done, candidate=0)
                second.dispatch(reference if p.second_is_reference else policy, done)
                samples: tuple[Samples, Samples] = (programs.fetch(first), second.take(done))
                texts = (p.decode(samples[0]), p.decode(samples[1]))
                lengths = np.stack([each.lengths for each in samples])
                tokens = np.stack([each.tokens for each in samples])

            # What needs no verdict is dispatched before the host turns to the judge; the reference is frozen,
            # so its next samples are known already.
            packed = programs.pack(prompts, tokens, lengths)
            scored = programs.score(reference, packed)
            if p.second_is_reference and not renews:
                second.dispatch(reference, done + 1)

            # Judge: each process its share of the rows.
            (own, ref_logps), briefs = run_and_gather(
                "judging", _judge, p, ledger, timer, done, prompts, samples, texts, scored
            )
            judged = ask.merge_shards(own, briefs)
            p.failure_tolerance.check(briefs)

            # Update: once on these pairs, and then on past ones as often as the config has it.
            with timer("update"):
                fresh = Pairs(
                    prompts.tokens,
                    prompts.lengths,
                    tokens,
                    lengths,
                    ref_logps,
                    judged.p_first,
                    judged.weight,
                    prompts.valid,
                )
                alpha, beta = p.alpha_at(done), p.beta_at(done)
                del policy  # its memory is the update's, until there are new weights
                learned = []
                state, *summary = programs.update(state, fresh, packed, alpha, beta)
                learned.append(summary)
                for pairs in p.memory.minibatches(done, fresh):
                    state, *summary = programs.update(state, pairs, programs.pack_pairs(pairs), alpha, beta)
                    learned.append(summary)
                policy = programs.for_sampling(state.params)
                reference = policy if renews else reference
                learned = jax.device_get(learned)

            # Metrics.
            counters.queries += judged.queries
            for _, applied in learned:
                counters.skipped_in_a_row = 0 if applied["finite"] else counters.skipped_in_a_row + 1
            summaries, times = [summarise(sums, beta) for sums, _ in learned], timer.take()
            found = {
                **summaries[0],
                **p.memory.metrics(summaries[1:]),
                **ask.metrics(judged, prompts.valid),
                **p.batches.metrics(done),
                "judge/queries": counters.queries,
                **applied_metrics([applied for _, applied in learned], alpha, beta),
                **times,
                "tokens_per_second": float(lengths[:, prompts.valid].sum() / sum(times.values())),
            }
            done += 1
            ledger.arrive(done, state, found)

    del policy
    return started.end(state, done, ended)


def _judge(
    p: Parts,
    ledger: Ledger,
    timer: Timer,
    step: int,
    prompts: Prompts,
    samples: tuple[Samples, Samples],
    texts: tuple[list[str], list[str]],
    scored: Array,
) -> tuple[tuple[Verdicts, np.ndarray], ask.ShardSummary]:
    """Judge this process's rows of a step and log their pairs.

    Returns:
      The verdicts and the reference's log-probabilities, f32[S B]; and the verdicts' summary for all processes.
    """
    local_rows = distributed.local_rows(prompts)
    with timer("judge"):
        verdicts = ask.ask(
            p.judge,
            prompts if contract.is_collective(p.judge) else local_rows,
            ask.ResponsePairs(
                *texts,
                identical=evaluator.same_tokens(*samples),
                policy_finished=samples[0].finished,
                reference_finished=samples[1].finished,
            ),
            unfinished_loses=p.loss.unfinished_loses,
            both_orders=p.judging.both_orders,
            shown_seed=(p.top.seed, Stream.TRAINING, step),
            recorded={} if contract.is_collective(p.judge) else ledger.paid(step, local_rows, texts),
        )
    with timer("score"):  # the rest of the scoring, which ran while the judge worked
        ref_logps = jax.device_get(scored)
    ledger.write_pairs(pair_records(step, local_rows, samples, texts, verdicts, verdicts.shown, ref_logps))
    return (verdicts, ref_logps), ask.summarize_shard(verdicts)
