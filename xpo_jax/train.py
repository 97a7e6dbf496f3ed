"""Exploratory Preference Optimization (arXiv 2405.21046, Algorithm 1), the whole of it on one page.

`train` is the loop, `prepare` builds its parts from the config. Only this module reads
the config and knows the order; what each value is stands in values.py.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from xpo_jax import checkpoint, evaluate, hf, settings, sharding, summary, verdicts
from xpo_jax import config as configs
from xpo_jax.data.pipeline import Batches
from xpo_jax.data.prompts import PromptData, load_prompts
from xpo_jax.judges import JUDGES
from xpo_jax.metrics import Metrics, Timer
from xpo_jax.pairs_log import PairsLog, pair_records
from xpo_jax.programs import CompilationCounter, Programs, Vocabulary, compute_dtype
from xpo_jax.rundir import RunDir
from xpo_jax.sampler import Sampling
from xpo_jax.update import make_optimizer, summarise, trim
from xpo_jax.values import Judge, Pairs, Prompts, Samples, TrainState

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
    p = prepare(config)
    with RunDir.open(p.top.run_dir, configs.to_json(config)) as run:
        if run.result is not None:
            print(f"{run.path} holds this run, finished; delete that folder to run it again")
            return run.result
        result = {**_train(p, run, compilations), "seconds": round(time.monotonic() - begun, 1)}
        run.finish(result)
    return result


def _train(p: Parts, run: RunDir, compilations: CompilationCounter) -> dict[str, Any]:
    # ------------------------------------------------------------------------------------------ start
    programs, timer = p.programs, Timer()
    announced = programs.announced()
    run.write_environment(
        {"data": {"train": p.data.train.fingerprint, "held_out": p.data.held_out.fingerprint}}
    )
    print(
        summary.opening(programs, {"run": str(run.path), **p.described}, compilations=len(announced)),
        flush=True,
    )
    for _, compile_program in summary.progress(announced, "compiling"):
        compile_program()
    compiled = compilations.count

    def load(folder: Path) -> Any:
        return hf.load_params(folder, p.model_config, shardings=programs.params_sharding)

    def draw(weights: Any, prompts: Prompts, step: int, candidate: int) -> Samples:
        return programs.draw(weights, prompts, purpose=TRAINING, step=step, candidate=candidate)

    state: TrainState = programs.init(load(p.folder))
    policy = programs.for_sampling(state.params)
    reference = programs.for_sampling(load(p.reference_folder))

    evaluator = evaluate.Evaluator(
        programs,
        p.held_out,
        reference,
        p.judge,
        p.decode,
        reference_samples=p.evaluation.reference_samples,
        unfinished_loses=p.loss.unfinished_loses,
        seed=p.top.seed,
    )
    before = after = evaluator(policy, 0, functools.partial(summary.progress, label="evaluating the start"))
    print(summary.sentence("before", before), flush=True)

    # ------------------------------------------------------------------------------------------- loop
    queries = skipped_in_a_row = 0
    evaluation_queries = before.queries
    with (
        PairsLog(run.path / "pairs.jsonl") as pairs_log,
        Metrics(
            run.path,
            tensorboard=p.logging.tensorboard,
            total_steps=p.top.steps,
            console=summary.CONSOLE,
            console_every_steps=p.logging.table_every_steps,
        ) as metrics,
    ):
        metrics.log(0, before.metrics())
        prompts = p.batches[0]
        second = draw(reference if p.second_is_reference else policy, prompts, 0, 1)
        for step in range(p.top.steps):
            # Sample both candidates. The host needs them, so it waits.
            with timer("sample"):
                first = draw(policy, prompts, step, 0)
                samples: tuple[Samples, Samples] = jax.device_get((first, second))
                texts = (p.decode(samples[0]), p.decode(samples[1]))
                lengths = np.stack([each.lengths for each in samples])
                tokens = trim(np.stack([each.tokens for each in samples]), lengths, programs.response_buckets)

            # What needs no verdict is dispatched before the host turns to the judge; the reference is frozen,
            # so its next samples are known already.
            ref_logps = programs.score(reference, prompts.tokens, prompts.lengths, tokens, lengths)
            next_prompts = p.batches[step + 1]
            if p.second_is_reference:
                second = draw(reference, next_prompts, step + 1, 1)

            # Judge.
            with timer("judge"):
                judged = verdicts.ask(
                    p.judge,
                    prompts,
                    *texts,
                    identical=evaluate.same_tokens(*samples),
                    policy_finished=samples[0].finished,
                    reference_finished=samples[1].finished,
                    unfinished_loses=p.loss.unfinished_loses,
                    shown_seed=(p.top.seed, TRAINING, step),
                )
            queries += judged.queries
            pairs_log.append(pair_records(step, prompts, samples, texts, judged, judged.shown))

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
            last, every = done == p.top.steps, p.evaluation.every_steps
            if last or (every and done % every == 0):
                after = evaluator(
                    policy, done, functools.partial(summary.progress, label=f"evaluating step {done}")
                )
                found |= after.metrics()
                evaluation_queries += after.queries
            metrics.log(done, found)
            skipped_in_a_row = 0 if applied["finite"] else skipped_in_a_row + 1
            if last or skipped_in_a_row == p.top.max_skipped:
                saved = checkpoint.save(run.path / "checkpoints", done, state, {"judge_queries": queries})
            if skipped_in_a_row == p.top.max_skipped:
                raise FloatingPointError(
                    f"step {done}: loss or gradient was not finite {skipped_in_a_row} times in a row; the last good"
                    f" weights are in {saved}; lower optimizer.learning_rate or loss.alpha"
                )
            prompts = next_prompts

    # -------------------------------------------------------------------------------------------- end
    hf.save(run.path / "export", jax.device_get(state.params), p.model_config, p.folder)
    run.write_samples("held_out", after.samples)
    shown = random.Random(p.top.seed).sample(list(after.samples), min(10, len(after.samples)))
    print(summary.closing(before, after, shown), flush=True)
    return {
        "steps": p.top.steps,
        "judge_queries": queries,
        "evaluation_queries": evaluation_queries,
        **summary.result(before, after),
        "skipped": int(state.skipped),
        "compilations_announced": len(announced),
        "compilations_during_run": compilations.count - compiled,
        "run_dir": str(run.path),
        "export": str(run.path / "export"),
    }


class Parts(NamedTuple):
    """What `prepare` builds."""

    top: settings.Experiment
    loss: settings.Loss
    evaluation: settings.Evaluation
    logging: settings.Logging
    alpha_at: Callable[[int], float]
    beta_at: Callable[[int], float]
    second_is_reference: bool
    judge: Judge
    folder: Path
    reference_folder: Path
    model_config: Any
    data: PromptData
    batches: Batches
    held_out: list[Prompts]
    programs: Programs
    decode: Callable[[Samples], list[str]]
    described: dict[str, str]


def prepare(config: ConfigDict) -> Parts:
    """Build the parts, cheapest first, so that what is wrong is known before anything is loaded."""
    build = configs.build
    top = build(settings.Experiment, config, "config")
    model = build(settings.Model, config.model, "model")
    sampling = build(Sampling, config.sampling, "sampling")
    loss = build(settings.Loss, config.loss, "loss")
    layout = build(settings.Layout, config.layout, "layout")
    evaluation = build(settings.Evaluation, config.evaluation, "evaluation")
    logging = build(settings.Logging, config.logging, "logging")
    if sampling.temperature == 0 or sampling.repetition_penalty != 1:
        raise ValueError("sampling: training needs a temperature above 0 and a repetition_penalty of 1")
    layout.check(top.batch_size, sampling.max_new_tokens)
    alpha_at, beta_at = loss.strengths(top.steps)
    optimizer, rate = build(make_optimizer, config.optimizer, "optimizer", steps=top.steps)
    judge = build(configs.resolve(config.judge.name, "judge.name", JUDGES), config.judge, "judge")
    mesh = build(sharding.make_mesh, config.mesh, "mesh")
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, size in (("batch_size", top.batch_size), ("layout.micro_batch_size", layout.micro_batch_size)):
        if size % shares:
            raise ValueError(f"{name} {size} is not divisible by mesh.data x mesh.fsdp = {shares}")

    folder = hf.model_folder(model.path)
    model_config = hf.read_config(folder)
    tokenizer = hf.load_tokenizer(folder, model_config)
    reference_folder = folder if model.reference is None else hf.model_folder(model.reference)
    if hf.read_config(reference_folder) != model_config:
        raise ValueError(f"model.reference: {reference_folder} is of another architecture than {folder}")
    for each in {folder, reference_folder}:
        hf.check_params(each, model_config)
    data = build(
        load_prompts, config.data, "data", tokenizer=tokenizer, max_new_tokens=sampling.max_new_tokens
    )
    batches = data.train_batches(top.batch_size, top.seed)
    held_out = list(data.held_out_batches(top.batch_size, evaluation.prompts))
    chunks = top.batch_size // layout.micro_batch_size
    programs = Programs(
        mesh,
        model_config,
        Vocabulary(len(tokenizer), hf.end_token_ids(folder, tokenizer), hf.pad_token_id(folder, tokenizer)),
        sampling,
        dtype=compute_dtype(model.dtype),
        seed=top.seed,
        batch_size=top.batch_size,
        # the last step draws the reference's samples for one more batch
        prompt_buckets=sorted({*batches.buckets_of(top.steps + 1), *(b.tokens.shape[1] for b in held_out)}),
        response_buckets=layout.response_buckets,
        optimizer=optimizer,
        rate=rate,
        remat=layout.remat,
        loss={
            "kind": loss.kind,
            "bonus_clip": loss.bonus_clip,
            "entropy_weight": loss.entropy_weight,
            "chunks": chunks,
            "chunk_tokens": layout.chunk_tokens,
        },
    )

    def decode(samples: Samples) -> list[str]:
        rows = [row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths, strict=True)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    alpha, beta, overlap = alpha_at(0), beta_at(0), data.overlap()
    described = {
        "model": f"{model.path}; reference: {model.reference or 'a frozen copy of it'}",
        "training": data.train.summary(),
        "held out": data.held_out.summary()
        + (f"; {overlap} of them are training prompts too" if overlap else ""),
        "judge": config.judge.name,
        "batch": f"{top.batch_size} prompts in {chunks} micro-batch(es); {top.steps} steps,"
        f" {batches.steps_per_epoch} an epoch",
        "strengths": f"beta {beta:g}, alpha {alpha:g} (alpha / beta {alpha / beta:g})",
    }
    return Parts(
        top=top,
        loss=loss,
        evaluation=evaluation,
        logging=logging,
        alpha_at=alpha_at,
        beta_at=beta_at,
        second_is_reference=loss.second == "reference",
        judge=judge,
        folder=folder,
        reference_folder=reference_folder,
        model_config=model_config,
        data=data,
        batches=batches,
        held_out=held_out,
        programs=programs,
        decode=decode,
        described=described,
    )
