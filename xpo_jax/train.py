"""Exploratory Preference Optimization (arXiv 2405.21046, Algorithm 1), the whole of it on one page.

`prepare.py` builds the parts from the config; here they are put in order. What each value is stands in
values.py. Every process of a run goes through this page with the same global batches; what one of them may
fail at stands in a `Together`, see distributed.py.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xpo_jax import checkpoint, distributed, evaluate, hf, model_card, report, summary, verdicts
from xpo_jax import config as configs
from xpo_jax.compilation import CompilationCounter
from xpo_jax.distributed import Together
from xpo_jax.metrics import Metrics, Timer
from xpo_jax.pairs_log import PairsLog, pair_records
from xpo_jax.prepare import Parts, prepare
from xpo_jax.rundir import RunDir
from xpo_jax.update import summarise, trim
from xpo_jax.values import DeviceJudge, Pairs, Prompts, Samples, TrainState

TRAINING = 1  # purpose of the random keys; evaluation's is evaluate.PURPOSE


def train(config: ConfigDict) -> dict[str, Any]:
    """Run an experiment from its first step to its export.

    Returns:
      What the last line of a run shows.

    Raises:
      ValueError: whatever is wrong with config, data, model or judge, in one line. What can be known before
        the run directory exists is raised before it is made.
    """
    begun, compilations = time.monotonic(), CompilationCounter()
    with Together("preparing") as together:
        p = prepare(config)
        together.value = {"config": _common(config), "prompts": _fingerprints(p)}
    distributed.require_alike(together.values)
    with RunDir.join(p.top.run_dir, configs.to_json(config)) as run:
        if run.result is not None:
            print(f"{run.path} holds this run, finished; delete that folder to run it again")
            return run.result
        result = {**_train(p, run, compilations), "seconds": round(time.monotonic() - begun, 1)}
        with Together("finishing"):
            run.finish(result)
            if distributed.leads():
                report.write(run.path)
    return result


def _train(p: Parts, run: RunDir, compilations: CompilationCounter) -> dict[str, Any]:
    # ------------------------------------------------------------------------------------------ start
    programs, timer = p.programs, Timer()
    device_judge = p.judge if isinstance(p.judge, DeviceJudge) else None
    announced = [*programs.announced(), *(device_judge.announced() if device_judge else ())]
    with Together("writing the environment"):
        run.write_environment(
            {
                "data": _fingerprints(p),
                "sources": {"train": p.data.train.sources, "held_out": p.data.held_out.sources},
                "model": {"path": p.model.given, "commit": p.model.commit},
                "reference": {"path": p.reference.given, "commit": p.reference.commit},
            }
        )
    print(
        summary.opening(programs, {"run": str(run.path), **p.described}, compilations=len(announced)),
        flush=True,
    )
    with Together("compiling"):
        for _, compile_program in summary.progress(announced, "compiling"):
            compile_program()
    compiled = compilations.count

    def draw(weights: Any, prompts: Prompts, step: int, candidate: int) -> Samples:
        return programs.draw(weights, prompts, purpose=TRAINING, step=step, candidate=candidate)

    one_start = p.reference.folder == p.model.folder
    with Together("loading the models"):
        masters = hf.load_params(p.model.folder, p.model_config, shardings=programs.params_sharding)
        reference = None
        if not one_start:
            reference = hf.load_weights(
                p.reference.folder, p.model_config, dtype=programs.dtype, shardings=programs.weights_sharding
            )
    state: TrainState = programs.init(masters)
    del masters
    policy = programs.for_sampling(state.params)
    if one_start:
        reference = programs.for_sampling(state.params)
    if device_judge:
        with Together("loading the judge"):
            device_judge.load(reference if one_start else None)

    patience = verdicts.Patience(
        max_failed_share=p.judging.max_failed_share, max_failed_batches=p.judging.max_failed_batches
    )
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
        patience=patience,
        seed=p.top.seed,
    )
    before = after = evaluator(policy, 0, functools.partial(summary.progress, label="evaluating the start"))
    print(summary.sentence("before", before), flush=True)
    stopped = evaluate.ended_by(before, before, **p.evaluation.stops)  # nothing yet, or what the judge lacks

    # ------------------------------------------------------------------------------------------- loop
    queries = skipped_in_a_row = 0
    evaluation_queries = before.queries

    def save() -> Path:
        done = int(state.step)
        return checkpoint.save(run.path / "checkpoints", done, state, {"judge_queries": queries})

    with Together("opening the logs"):
        pairs_log = PairsLog(run.path / distributed.file_name("pairs.jsonl"))
        metrics = Metrics(
            run.path,
            tensorboard=p.logging.tensorboard,
            wandb=p.logging.wandb,
            total_steps=p.top.steps,
            console=summary.CONSOLE,
            console_every_steps=p.logging.table_every_steps,
            writes=distributed.leads(),
        )
    with pairs_log, metrics, verdicts.saved_first(save):
        with Together("writing metrics"):
            metrics.samples(0, "held_out", summary.some(before, p.top.seed))
            metrics.log(0, before.metrics())
        prompts = p.batches[0]
        second = draw(reference if p.second_is_reference else policy, prompts, 0, 1)
        for step in range(p.top.steps):
            # Sample both candidates. The host needs them, so it waits.
            with timer("sample"):
                first = draw(policy, prompts, step, 0)
                samples: tuple[Samples, Samples] = (programs.fetch(first), programs.fetch(second))
                texts = (p.decode(samples[0]), p.decode(samples[1]))
                lengths = np.stack([each.lengths for each in samples])
                tokens = trim(np.stack([each.tokens for each in samples]), lengths, programs.response_buckets)

            # What needs no verdict is dispatched before the host turns to the judge; the reference is frozen,
            # so its next samples are known already.
            ref_logps = programs.score(reference, prompts.tokens, prompts.lengths, tokens, lengths)
            next_prompts = p.batches[step + 1]
            if p.second_is_reference:
                second = draw(reference, next_prompts, step + 1, 1)

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
                    shown_seed=(p.top.seed, TRAINING, step),
                )
                pairs_log.append(pair_records(step, mine, samples, texts, own, own.shown))
                together.value = verdicts.brief(own)
            judged = verdicts.joined(own, together.values)
            queries += judged.queries
            patience.check(together.values)

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
                alpha, beta = p.alpha_at(step), p.beta_at(step)
                del policy  # its memory is the update's, until there are new weights
                state, sums, applied = programs.learn(state, pairs, alpha, beta)
                policy = programs.for_sampling(state.params)
                sums, applied = jax.device_get((sums, applied))
            if not p.second_is_reference:
                second = draw(policy, next_prompts, step + 1, 1)

            # Metrics, evaluation, checkpoint.
            done, times = step + 1, timer.take()
            found = {
                **summarise(sums, beta),
                **verdicts.metrics(judged, prompts.real),
                **p.batches.metrics(step),
                "judge/queries": queries,
                "alpha": alpha,
                "beta": beta,
                "alpha_over_beta": alpha / beta,
                "learning_rate": applied["learning_rate"],
                "grad_norm": applied["grad_norm"],
                "skipped": int(not applied["finite"]),
                **times,
                "tokens_per_second": float(lengths[:, prompts.real].sum() / sum(times.values())),
            }
            next_rows, every = int(next_prompts.real.sum()), p.evaluation.every_steps
            spent = not p.budget.allows(queries + evaluation_queries, done, next_rows)
            last = done == p.top.steps or spent
            if last or (every and done % every == 0):
                after = evaluator(
                    policy, done, functools.partial(summary.progress, label=f"evaluating step {done}")
                )
                found |= after.metrics()
                evaluation_queries += after.queries
                stopped = evaluate.ended_by(before, after, **p.evaluation.stops)
                last = last or bool(stopped)
                with Together("writing samples"):
                    metrics.samples(done, "held_out", summary.some(after, p.top.seed))
            with Together("writing metrics"):
                metrics.log(done, found)
            skipped_in_a_row = 0 if applied["finite"] else skipped_in_a_row + 1
            if last or skipped_in_a_row == p.top.max_skipped:
                saved = save()
            if skipped_in_a_row == p.top.max_skipped:
                with Together("learning"):
                    raise FloatingPointError(
                        f"step {done}: loss or gradient was not finite {skipped_in_a_row} times in a row; the last"
                        f" good weights are in {saved}; lower optimizer.learning_rate or loss.alpha"
                    )
            if last:
                break
            prompts = next_prompts

    # -------------------------------------------------------------------------------------------- end
    compiled_during, measured = compilations.count - compiled, summary.result(before, after)
    card = model_card.card(p.top, p.model, p.reference, measured, held_out=len(after.samples))
    hf.save(run.path / "export", state.params, p.model_config, p.model.folder, card=card)
    with Together("writing samples"):
        run.write_samples("held_out", after.samples)
    print(summary.closing(before, after, summary.some(after, p.top.seed)), flush=True)
    ended_by = "steps" if done == p.top.steps else stopped or "judging.max_queries"
    if done < p.top.steps:
        limit = {f"evaluation.{name}": value for name, value in p.evaluation.stops.items()}
        limit["judging.max_queries"] = p.budget.max_queries
        print(f"\nended after {done} of {p.top.steps} steps: {ended_by} is {limit[ended_by]}")
    return {
        "steps": done,
        "ended_by": ended_by,
        "judge_queries": queries,
        "evaluation_queries": evaluation_queries,
        **measured,
        "skipped": int(state.skipped),
        "compilations_announced": len(announced),
        "compilations_during_run": compiled_during,
        "run_dir": str(run.path),
        "export": str(run.path / "export"),
    }


def _fingerprints(p: Parts) -> dict[str, str]:
    return {"train": p.data.train.fingerprint, "held_out": p.data.held_out.fingerprint}


def _common(config: ConfigDict) -> str:
    """What all processes must have alike."""
    return configs.to_json({name: config[name] for name in config if name != "distributed"})
