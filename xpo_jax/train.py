"""Exploratory Preference Optimization, the whole of it on one page.

`train` is the loop; `prepare` builds its parts from the config; `summary` and `result` are what is printed.
Only this module reads the config and knows the order. What each value is stands in values.py.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from xpo_jax import checkpoint, evaluate, hf, settings, sharding, verdicts
from xpo_jax import config as configs
from xpo_jax.data.pipeline import Batches
from xpo_jax.data.prompts import PromptData, load_prompts
from xpo_jax.judges import JUDGES
from xpo_jax.metrics import Metrics, Timer, summary_table, text_table
from xpo_jax.pairs_log import PairsLog, pair_records
from xpo_jax.programs import CompilationCounter, Programs, Vocabulary, compute_dtype
from xpo_jax.rundir import RunDir
from xpo_jax.sampler import Sampling
from xpo_jax.update import make_optimizer, summarise, trim
from xpo_jax.values import Judge, Pairs, Prompts, Samples

TRAINING = 1  # purpose of the random keys; evaluation's is evaluate.PURPOSE
CONSOLE = (
    "judge/win_rate",
    "judge/tie_rate",
    "rewards/margins",
    "objective/kl",
    "loss/dpo",
    "loss/xpo",
    "objective/entropy",
    "tokens_per_second",
)


def train(config: ConfigDict) -> dict[str, Any]:
    """Run an experiment from its first step to its export.

    Returns:
      What the last line of a run shows.

    Raises:
      ValueError: whatever is wrong with config, data, model or judge, in one line. What can be known before
        the run directory exists is raised before it is made.
    """
    begun = time.monotonic()
    compilations = CompilationCounter()
    p = prepare(config)
    programs, timer, weights_of = p.programs, Timer(), p.programs.for_sampling

    with RunDir.open(p.top.run_dir, configs.to_json(config)) as run:
        if run.result is not None:
            print(f"{run.path} holds this run, finished; delete that folder to run it again")
            return run.result
        run.write_environment({"data": {"train": p.data.train.fingerprint, "held_out": p.data.held_out.fingerprint}})
        announced = programs.announced()
        print(summary(p, run, len(announced)), flush=True)
        for _, compile_it in progress(announced, "compiling"):
            compile_it()
        before_run = compilations.count

        load = lambda folder: hf.load_params(folder, p.model_config, shardings=programs.params_sharding)  # noqa: E731
        state = programs.init(load(p.folder))
        policy = weights_of(state.params)
        reference = weights_of(load(p.reference_folder))
        second = reference if p.loss.second == "reference" else policy

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
        before = after = evaluator(policy, 0, lambda x: progress(x, "evaluating the start"))
        print(sentence("before", before), flush=True)

        queries = skipped = 0
        with (
            PairsLog(run.path / "pairs.jsonl") as pairs_log,
            Metrics(
                run.path,
                tensorboard=p.logging.tensorboard,
                total_steps=p.top.steps,
                console=CONSOLE,
                console_every_steps=p.logging.table_every_steps,
            ) as metrics,
        ):
            metrics.log(0, before.metrics())
            prompts = p.batches[0]
            drawn_ahead = programs.draw(second, prompts, purpose=TRAINING, step=0, candidate=1)
            for step in range(p.top.steps):
                alpha, beta = p.alpha_at(step), p.beta_at(step)

                # Both candidates. The host needs them, so it waits.
                with timer("sample"):
                    first = programs.draw(policy, prompts, purpose=TRAINING, step=step, candidate=0)
                    samples: tuple[Samples, Samples] = jax.device_get((first, drawn_ahead))
                    texts = [p.decode(each) for each in samples]
                    tokens, lengths = (np.stack(pair) for pair in list(zip(*samples, strict=True))[:2])
                    tokens = trim(tokens, lengths, programs.response_buckets)

                # What needs no verdict is dispatched before the host turns to the judge.
                ref_logps = programs.score(reference, prompts.tokens, prompts.lengths, tokens, lengths)
                next_prompts = p.batches[step + 1]
                if p.loss.second == "reference":  # frozen, so its next samples are known already
                    drawn_ahead = programs.draw(reference, next_prompts, purpose=TRAINING, step=step + 1, candidate=1)

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
                pairs_log.append(pair_records(step, prompts, samples, tuple(texts), judged, judged.shown))

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
                    rows, policy_tokens = prompts.real.sum(), lengths[0][prompts.real].sum()
                    numbers = [np.float32(x) for x in (rows, policy_tokens, alpha, beta)]
                    grads, sums = programs.zeros(state.params)
                    for chunk in range(p.chunks):
                        grads, sums = programs.accumulate(
                            state.params, grads, sums, pairs, np.int32(chunk), *numbers
                        )
                    state, applied = programs.apply(state, grads, sums["loss"])
                    policy = weights_of(state.params)
                    sums, applied = jax.device_get((sums, applied))
                if p.loss.second == "policy":
                    second = policy
                    drawn_ahead = programs.draw(policy, next_prompts, purpose=TRAINING, step=step + 1, candidate=1)

                skipped = 0 if applied["finite"] else skipped + 1
                if skipped >= p.top.max_skipped:
                    where = checkpoint.save(run.path / "checkpoints", step + 1, state, {"queries": queries})
                    raise FloatingPointError(
                        f"step {step + 1}: loss or gradient was not finite {skipped} times in a row; the last good"
                        f" weights are in {where}; lower optimizer.learning_rate or loss.alpha"
                    )
                times = timer.take()
                found = {
                    **summarise(sums, beta),
                    **verdicts.metrics(judged, prompts.real),
                    "judge/queries": queries,
                    "alpha": alpha,
                    "beta": beta,
                    "alpha_over_beta": alpha / beta,
                    "learning_rate": float(applied["learning_rate"]),
                    "grad_norm": float(applied["grad_norm"]),
                    "skipped": int(not applied["finite"]),
                    **times,
                    "tokens_per_second": float(lengths[:, prompts.real].sum() / sum(times.values())),
                }
                if p.evaluation.every_steps and (step + 1) % p.evaluation.every_steps == 0 and step + 1 < p.top.steps:
                    found |= evaluator(policy, step + 1, lambda x: x).metrics()
                if step + 1 == p.top.steps:
                    after = evaluator(policy, step + 1, lambda x: progress(x, "evaluating the end"))
                    found |= after.metrics()
                metrics.log(step + 1, found)
                prompts = next_prompts

        checkpoint.save(run.path / "checkpoints", p.top.steps, state, {"queries": queries})
        hf.save(run.path / "export", jax.device_get(state.params), p.model_config, p.folder)
        shown = random.Random(p.top.seed).sample(list(after.samples), min(10, len(after.samples)))
        run.write_samples("held_out", after.samples)
        print(closing(before, after, shown), flush=True)
        result = {
            "steps": p.top.steps,
            "judge_queries": queries,
            "evaluation_queries": evaluator.queries,
            "win_rate": after.win_rate,
            "win_rate_low": after.low,
            "win_rate_high": after.high,
            "win_rate_before": before.win_rate,
            "win_rate_before_low": before.low,
            "win_rate_before_high": before.high,
            "valid": after.policy.get("valid"),
            "valid_reference": after.reference.get("valid"),
            "copy_rate": after.policy.get("copy"),
            "copy_rate_reference": after.reference.get("copy"),
            "copy_rate_interval": after.intervals.get("copy"),
            "kl": after.kl,
            "skipped": int(state.skipped),
            "compilations_announced": len(announced),
            "compilations_during_run": compilations.count - before_run,
            "seconds": round(time.monotonic() - begun, 1),
            "run_dir": str(run.path),
            "export": str(run.path / "export"),
        }
        run.finish(result)
    return result


class Parts(NamedTuple):
    """What `prepare` builds."""

    top: settings.Experiment
    model: settings.Model
    loss: settings.Loss
    evaluation: settings.Evaluation
    logging: settings.Logging
    alpha_at: Callable[[int], float]
    beta_at: Callable[[int], float]
    chunks: int
    judge: Judge
    folder: Any
    reference_folder: Any
    model_config: Any
    data: PromptData
    batches: Batches
    held_out: list[Prompts]
    programs: Programs
    decode: Callable[[Samples], list[str]]


def prepare(config: ConfigDict) -> Parts:
    """Build the parts, cheapest first, so that what is wrong is known before anything is loaded."""
    top = configs.build(settings.Experiment, config, "config")
    model = configs.build(settings.Model, config.model, "model")
    sampling = configs.build(Sampling, config.sampling, "sampling")
    loss = configs.build(settings.Loss, config.loss, "loss")
    layout = configs.build(settings.Layout, config.layout, "layout")
    evaluation = configs.build(settings.Evaluation, config.evaluation, "evaluation")
    logging = configs.build(settings.Logging, config.logging, "logging")
    if sampling.temperature == 0 or sampling.repetition_penalty != 1:
        raise ValueError("sampling: training needs a temperature above 0 and a repetition_penalty of 1")
    layout.check(top.batch_size, sampling.max_new_tokens)
    alpha_at, beta_at = loss.strengths(top.steps)
    optimizer, rate = configs.build(make_optimizer, config.optimizer, "optimizer", steps=top.steps)
    judge = configs.build(configs.resolve(config.judge.name, "judge.name", JUDGES), config.judge, "judge")
    mesh = configs.build(sharding.make_mesh, config.mesh, "mesh")

    folder = hf.model_folder(model.path)
    model_config = hf.read_config(folder)
    tokenizer = hf.load_tokenizer(folder, model_config)
    vocabulary = Vocabulary(len(tokenizer), hf.end_token_ids(folder, tokenizer), hf.pad_token_id(folder, tokenizer))
    reference_folder = folder if model.reference is None else hf.model_folder(model.reference)
    if hf.read_config(reference_folder) != model_config:
        raise ValueError(f"model.reference: {reference_folder} is of another architecture than {folder}")
    data = configs.build(
        load_prompts, config.data, "data", tokenizer=tokenizer, max_new_tokens=sampling.max_new_tokens
    )
    batches = data.train_batches(top.batch_size, top.seed)
    held_out = list(data.held_out_batches(top.batch_size, evaluation.prompts))
    programs = Programs(
        mesh,
        model_config,
        vocabulary,
        sampling,
        dtype=compute_dtype(model.dtype),
        seed=top.seed,
        batch_size=top.batch_size,
        prompt_buckets=sorted({*batches.buckets_of(top.steps + 1), *(b.tokens.shape[1] for b in held_out)}),
        response_buckets=layout.response_buckets,
        optimizer=optimizer,
        rate=rate,
        remat=layout.remat,
        loss={
            "kind": loss.kind,
            "bonus_clip": loss.bonus_clip,
            "entropy_weight": loss.entropy_weight,
            "chunks": top.batch_size // layout.micro_batch_size,
            "chunk_tokens": layout.chunk_tokens,
        },
    )

    def decode(samples: Samples) -> list[str]:
        rows = [row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths, strict=True)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    return Parts(
        top,
        model,
        loss,
        evaluation,
        logging,
        alpha_at,
        beta_at,
        top.batch_size // layout.micro_batch_size,
        judge,
        folder,
        reference_folder,
        model_config,
        data,
        batches,
        held_out,
        programs,
        decode,
    )


def summary(p: Parts, run: RunDir, compilations: int) -> str:
    """What is about to happen, for the console."""
    programs, alpha, beta = p.programs, p.alpha_at(0), p.beta_at(0)
    mesh = ", ".join(f"{axis} {size}" for axis, size in programs.mesh.shape.items())
    return summary_table(
        {
            "run": str(run.path),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}; mesh {mesh}",
            "model": f"{p.model.path}, {programs.parameters:,} parameters, computing in {programs.dtype.name};"
            f" reference: {p.model.reference or 'a frozen copy'}",
            "training": p.data.train.summary(),
            "held out": p.data.held_out.summary(),
            "judge": p.top.judge["name"],
            "batch": f"{p.top.batch_size} prompts in {p.chunks} micro-batch(es); {p.top.steps} steps,"
            f" {p.batches.steps_per_epoch} an epoch",
            "buckets": f"prompts {programs.prompt_buckets}, responses {programs.response_buckets} tokens",
            "strengths": f"beta {beta:g}, alpha {alpha:g} (alpha / beta {alpha / beta:g})",
            "compilations": f"{compilations}, all before the first step",
        }
    )


def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A bar on standard error, where that is a terminal."""
    return tqdm(items, desc=label, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())


def sentence(when: str, found: evaluate.Evaluation) -> str:
    """One line about an evaluation."""
    valid = f", valid {found.policy['valid']:.1%}" if "valid" in found.policy else ""
    return f"{when:<12}  win rate {found.win_rate:.1%} [{found.low:.1%}, {found.high:.1%}]{valid}, KL {found.kl:.2f}"


def closing(before: evaluate.Evaluation, after: evaluate.Evaluation, shown: list[Mapping[str, Any]]) -> str:
    """The final tables: some prompts with the answers of reference and policy, and the figures."""
    names = ["valid", "copy", "score", "distance", "tokens", "unfinished"]
    figures = [("win rate", 0.5, before.win_rate, after.win_rate)] + [
        (name, after.reference[name], before.policy[name], after.policy[name])
        for name in names
        if name in after.policy
    ]
    samples = [[row["prompt"], row["reference"], row["policy"], row["win_share"]] for row in shown]
    return "\n\n".join(
        [
            text_table(["prompt", "reference", "policy", "won"], samples),
            text_table(["held out", "reference", "policy before", "policy after"], figures),
        ]
    )
