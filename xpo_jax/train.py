"""Exploratory Preference Optimization (arXiv 2405.21046, Algorithm 1), the whole of it on one page.

`prepare.py` builds the parts from the config; here they are put in order. What each value is stands in
values.py. Every process of a run goes through this page with the same global batches; what one of them may
fail at stands in a `Together`, see distributed.py. What is kept so that an interrupted run goes on is the
`Ledger`'s, see resume.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xpo_jax import config as configs
from xpo_jax import distributed, evaluate, hf, model_card, report, summary, verdicts
from xpo_jax.compilation import CompilationCounter
from xpo_jax.distributed import Together
from xpo_jax.interruption import Signals, Watchdog
from xpo_jax.metrics import Metrics, Timer
from xpo_jax.pairs_log import pair_records
from xpo_jax.prepare import Parts, common, fingerprints, of_evaluations, origins, prepare
from xpo_jax.resume import Counters, Ledger
from xpo_jax.rundir import RunDir
from xpo_jax.update import summarise, trim
from xpo_jax.values import DeviceJudge, Pairs, Params, Prompts, Samples, TrainState

TRAINING = 1  # purpose of the random keys; evaluation's is evaluate.PURPOSE


def train(config: ConfigDict, *, accept_changes: bool = False) -> dict[str, Any]:
    """Run an experiment from its first step, or from where it was interrupted, to its export.

    Args:
      accept_changes: go on with an interrupted run even if the config differs in what may not change.

    Returns:
      What the last line of a run shows.

    Raises:
      ValueError: whatever is wrong with config, data, model or judge, in one line. What can be known before
        the run directory exists is raised before it is made.
      Stopped: told to by a signal, and saved as far as it was.
    """
    begun, compilations = time.monotonic(), CompilationCounter()
    with Signals() as signals:
        with Together("preparing") as together:
            p = prepare(config)
            together.value = {"config": common(config), "prompts": fingerprints(p)}
        distributed.require_alike(together.values)
        with (
            RunDir.join(p.top.run_dir, configs.to_json(config), accept_changes=accept_changes) as run,
            Watchdog(p.top.max_step_seconds) as watchdog,
        ):
            if run.result is not None:
                print(f"{run.address} holds this run, finished; delete that folder to run it again")
                return run.result
            ledger = Ledger(
                run,
                p.checkpoint,
                steps=p.top.steps,
                evaluations=of_evaluations(config),
                devices=f"{dict(p.programs.mesh.shape)} of {jax.process_count()}",
                accept_changes=accept_changes,
                patience=p.patience,
                signals=signals,
                watchdog=watchdog,
            )
            result = _train(p, run, ledger, compilations)
            result["seconds"] = round(time.monotonic() - begun, 1)
            with Together("finishing"):
                run.finish(result)
                if distributed.leads():
                    report.write(run.path)
            run.push()
            return result


def _train(p: Parts, run: RunDir, ledger: Ledger, compilations: CompilationCounter) -> dict[str, Any]:
    # ------------------------------------------------------------------------------------------ start
    programs, timer = p.programs, Timer()
    device_judge = p.judge if isinstance(p.judge, DeviceJudge) else None
    announced = [*programs.announced(), *(device_judge.announced() if device_judge else ())]
    with Together("writing the environment"):
        run.write_environment(origins(p))
    described = {**ledger.described(), **p.described}
    print(summary.opening(programs, described, compilations=len(announced)), flush=True)
    with Together("compiling"):
        for name, compile_program in summary.progress(announced, "compiling"):
            ledger.beat(f"compiling {name}")
            compile_program()
    compiled = compilations.count

    def draw(weights: Params, prompts: Prompts, step: int, candidate: int) -> Samples:
        return programs.draw(weights, prompts, purpose=TRAINING, step=step, candidate=candidate)

    ledger.beat("loading the models")
    state, reference = _load(p, ledger)
    done, counters = int(state.step), ledger.counters
    if run.changes:  # by which somebody may have mended what made it skip
        counters.skipped_in_a_row = 0
    policy = programs.for_sampling(state.params)
    if device_judge:
        with Together("loading the judge"):
            device_judge.load(reference if p.reference.folder == p.model.folder else None)
    evaluator = evaluate.Evaluator(
        programs,
        p.held_out,
        reference,
        p.judge,
        p.decode,
        answers=p.answers,
        reference_samples=p.evaluation.reference_samples,
        unfinished_loses=p.loss.unfinished_loses,
        both_orders=p.judging.both_orders,
        patience=p.patience,
        seed=p.top.seed,
    )

    def evaluated(weights: Params, step: int) -> evaluate.Evaluation:
        label = f"evaluating step {step}" if step else "evaluating the start"

        def progress(batches: Iterable[Any]) -> Iterator[Any]:
            for batch in summary.progress(batches, label):
                ledger.beat(label)
                yield batch

        return ledger.evaluation(step, lambda: evaluator(weights, step, progress))

    def metrics(first_step: int) -> Metrics:
        return Metrics(
            run.path,
            tensorboard=p.logging.tensorboard,
            wandb=p.logging.wandb,
            first_step=first_step,
            total_steps=p.top.steps,
            console=summary.CONSOLE,
            console_every_steps=p.logging.table_every_steps,
            writes=distributed.leads(),
        )

    # ------------------------------------------------------------------------------------------- loop
    ledger.arrive(done, state, {})
    before = after = evaluated(_first_policy(p, reference) if done else policy, 0)
    print(summary.sentence("before", before), flush=True)
    evaluate.ended_by(before, before, **p.evaluation.stops)  # raises for what the judge does not tell
    second: Samples | None = None
    with ledger.open(metrics), verdicts.saved_first(ledger.save):
        while True:
            # `done` updates are behind us. What they came to is written down, and a run can go on from here.
            ended, every = _ended(p, done, counters), p.evaluation.every_steps
            evaluates = bool(ended or done == 0 or (every and done % every == 0))
            if evaluates and done:
                after = evaluated(policy, done)
                ended = ended or evaluate.ended_by(before, after, **p.evaluation.stops)
            shown = summary.some(after, p.top.seed) if evaluates else ()
            ledger.settle(score=after.win_rate if evaluates else None, samples=shown, last=bool(ended))
            if counters.skipped_in_a_row >= p.top.max_skipped:
                saved = ledger.save()
                with Together("learning"):
                    raise FloatingPointError(
                        f"step {done}: loss or gradient was not finite {counters.skipped_in_a_row} times in a row; the"
                        f" last good weights are in {saved}; lower optimizer.learning_rate or loss.alpha"
                    )
            if ended:
                break

            # Sample both candidates. The host needs them, so it waits.
            prompts = p.batches[done]
            with timer("sample"):
                first = draw(policy, prompts, done, 0)
                if second is None:
                    second = draw(reference if p.second_is_reference else policy, prompts, done, 1)
                samples: tuple[Samples, Samples] = (programs.fetch(first), programs.fetch(second))
                texts = (p.decode(samples[0]), p.decode(samples[1]))
                lengths = np.stack([each.lengths for each in samples])
                tokens = trim(np.stack([each.tokens for each in samples]), lengths, programs.response_buckets)

            # What needs no verdict is dispatched before the host turns to the judge; the reference is frozen,
            # so its next samples are known already.
            ref_logps = programs.score(reference, prompts.tokens, prompts.lengths, tokens, lengths)
            second = None
            if p.second_is_reference and done + 1 < p.top.steps:
                second = draw(reference, p.batches[done + 1], done + 1, 1)

            # Judge: each process its share of the rows.
            mine = distributed.mine(prompts)
            with timer("judge"), Together("judging") as together:
                own = verdicts.ask(
                    p.judge,
                    prompts if verdicts.is_collective(p.judge) else mine,
                    *texts,
                    identical=evaluate.same_tokens(*samples),
                    policy_finished=samples[0].finished,
                    reference_finished=samples[1].finished,
                    unfinished_loses=p.loss.unfinished_loses,
                    both_orders=p.judging.both_orders,
                    shown_seed=(p.top.seed, TRAINING, done),
                    paid={} if verdicts.is_collective(p.judge) else ledger.paid(done, mine, texts),
                )
                ledger.write_pairs(pair_records(done, mine, samples, texts, own, own.shown))
                together.value = verdicts.brief(own)
            judged = verdicts.joined(own, together.values)
            p.patience.check(together.values)

            # Update.
            with timer("update"):
                pairs = Pairs(
                    prompts.tokens,
                    prompts.lengths,
                    tokens,
                    lengths,
                    ref_logps,
                    judged.p_first,
                    judged.weight,
                    prompts.real,
                )
                alpha, beta = p.alpha_at(done), p.beta_at(done)
                del policy  # its memory is the update's, until there are new weights
                state, sums, applied = programs.learn(state, pairs, alpha, beta)
                policy = programs.for_sampling(state.params)
                sums, applied = jax.device_get((sums, applied))

            # Metrics.
            counters.queries += judged.queries
            counters.skipped_in_a_row = 0 if applied["finite"] else counters.skipped_in_a_row + 1
            times = timer.take()
            found = {
                **summarise(sums, beta),
                **verdicts.metrics(judged, prompts.real),
                **p.batches.metrics(done),
                "judge/queries": counters.queries,
                "alpha": alpha,
                "beta": beta,
                "alpha_over_beta": alpha / beta,
                "learning_rate": applied["learning_rate"],
                "grad_norm": applied["grad_norm"],
                "skipped": int(not applied["finite"]),
                **times,
                "tokens_per_second": float(lengths[:, prompts.real].sum() / sum(times.values())),
            }
            done += 1
            ledger.arrive(done, state, found)

    # -------------------------------------------------------------------------------------------- end
    ledger.beat("exporting")
    compiled_during, exported = compilations.count - compiled, done
    if p.checkpoint.export == "best" and (best := ledger.best()) not in (None, done):
        del state, policy
        exported = best
        state = ledger.state_of(exported, programs.like)
        after = evaluated(programs.for_sampling(state.params), exported)
    measured = summary.result(before, after)
    card = model_card.card(p.top, p.model, p.reference, measured, held_out=len(after.samples))
    hf.save(run.path / "export", state.params, p.model_config, p.model.folder, card=card, replace=True)
    with Together("writing samples"):
        run.write_samples("held_out", after.samples)
    print(summary.closing(before, after, summary.some(after, p.top.seed)), flush=True)
    if ended != "steps":
        limit = {f"evaluation.{name}": value for name, value in p.evaluation.stops.items()}
        limit["judging.max_queries"] = p.budget.max_queries
        print(f"\nended after {done} of {p.top.steps} steps: {ended} is {limit[ended]}")
    return {
        "steps": done,
        "ended_by": ended,
        "exported_step": exported,
        "judge_queries": counters.queries,
        "evaluation_queries": counters.evaluation_queries,
        **measured,
        "skipped": int(state.skipped),
        "compilations_announced": len(announced),
        "compilations_during_run": compiled_during,
        "run_dir": run.address,
        "export": f"{run.address}/export",
    }


def _ended(p: Parts, done: int, counters: Counters) -> str | None:
    """The config's field that ends the run after `done` updates, if one does."""
    if done >= p.top.steps:
        return "steps"
    rows = int(p.batches[done].real.sum())
    spent = counters.queries + counters.evaluation_queries
    return None if p.budget.allows(spent, done, rows) else "judging.max_queries"


def _load(p: Parts, ledger: Ledger) -> tuple[TrainState, Params]:
    """The state to begin with, and the reference's weights as they are sampled from: the only form it is held in."""
    programs, reference, fresh = p.programs, None, ledger.newest is None
    with Together("loading the models"):
        if fresh:
            masters = hf.load_params(p.model.folder, p.model_config, shardings=programs.params_sharding)
        if not fresh or p.reference.folder != p.model.folder:
            reference = _weights(p, p.reference.folder)
    state: TrainState = programs.init(masters) if fresh else ledger.restore(programs.like)
    reference = programs.for_sampling(state.params) if reference is None else reference
    ledger.vouch(int(programs.fingerprint(reference)))
    return state, reference


def _first_policy(p: Parts, reference: Params) -> Params:
    """The policy of step 0 as it is sampled from, where a run goes on from a later step."""
    return reference if p.reference.folder == p.model.folder else _weights(p, p.model.folder)


def _weights(p: Parts, folder: Path) -> Params:
    programs = p.programs
    return hf.load_weights(folder, p.model_config, dtype=programs.dtype, shardings=programs.weights_sharding)
