"""From a config to the parts of a run, cheapest first, so that what is wrong is known before anything is loaded.

Only this module and `session.py` read the config; what each value is stands in values.py. Nothing here writes a
file (but into the hub's cache) or puts an array on a device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from xpo_jax.algorithm.model_spec import compute_dtype, make_model_spec
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.programs import BatchShapes, Programs
from xpo_jax.algorithm.replay_buffer import ReplayBuffer
from xpo_jax.algorithm.sampler import Sampling, Vocabulary
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.config.loss import Loss, make_loss
from xpo_jax.data.answer_files import match_answers
from xpo_jax.data.batches import Batches
from xpo_jax.data.offline_pairs import load_pairs
from xpo_jax.data.prompts import PromptData, load_prompts
from xpo_jax.evaluation.evaluator import POLICY_SAMPLES, Evaluator
from xpo_jax.judges import JUDGES
from xpo_jax.judges.contract import DeviceJudge, HasCheck, HasModels, HasProbe, Judge
from xpo_jax.judges.limits import Budget, FailureTolerance
from xpo_jax.models import attention_kernels
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.runtime import sharding
from xpo_jax.values import Params, Prompts, Samples


class Parts(NamedTuple):
    """What `prepare` builds."""

    top: settings.Experiment
    loss: Loss
    judging: settings.Judging
    evaluation: settings.Evaluation
    checkpoint: settings.Checkpoint
    logging: settings.Logging
    alpha_at: Callable[[int], float]
    beta_at: Callable[[int], float]
    second_is_reference: bool
    judge: Judge
    budget: Budget
    failure_tolerance: FailureTolerance
    model: hub.Model
    reference: hub.Model
    reference_step: Callable[[int], int]
    model_config: Any
    data: PromptData
    batches: Batches
    memory: ReplayBuffer
    held_out: list[Prompts]
    answers: list[list[str]] | None
    programs: Programs
    decode: Callable[[Samples], list[str]]
    described: dict[str, str]


def make_judge(group: Mapping[str, Any] | ConfigDict, where: str) -> Any:
    """The judge that a config's group names; one that is made of others makes them with this, too.

    The name is of a factory (a class, or a function that returns the judge), whose arguments are the group's fields.
    A function whose only parameter is called `comparisons` is the judge itself.

    Raises:
      ValueError: an unknown name, a field that does not fit, whatever the judge's factory refuses, something that
        cannot be called as judge(comparisons).
    """
    judge = factory = configs.resolve(group["name"], f"{where}.name", JUDGES)
    if inspect.isfunction(factory) and _is_neither(factory, group):
        raise ValueError(
            f"{where}.name: {group['name']}{inspect.signature(factory)} is neither a judge, a function whose only"
            " parameter is called comparisons, nor a factory, whose arguments are the group's fields; see"
            " docs/judges.md"
        )
    if inspect.isfunction(factory) and list(inspect.signature(factory).parameters) == ["comparisons"]:
        configs.check(lambda: None, group, where)
    else:
        given = {"rule_judge": JUDGES["paraphrase"], "make_judge": make_judge}
        judge = configs.build(factory, group, where, **given)
    try:
        inspect.signature(judge).bind([])
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}.name: {group['name']} gives a {type(judge).__name__} that cannot be called as"
            " judge(comparisons); see docs/judges.md"
        ) from None
    return judge


def _is_neither(function: Callable[..., Any], group: Mapping[str, Any] | ConfigDict) -> bool:
    """Whether a function wants positional arguments, none of which the group has: somebody's judge, misspelt."""
    parameters = inspect.signature(function).parameters
    wanted = [
        name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    ]
    return bool(wanted) and wanted != ["comparisons"] and not any(name in group for name in wanted)


def prepare(config: ConfigDict) -> Parts:
    """Build the parts of the run that a config describes.

    Raises:
      ValueError: whatever can be known to be wrong before a run directory is made, in one line.
    """
    build = configs.build
    top = build(settings.Experiment, config, "config")
    model = build(settings.Model, config.model, "model")
    sampling = build(Sampling, config.sampling, "sampling")
    loss, loss_fn = make_loss(config.loss)
    judging = build(settings.Judging, config.judging, "judging")
    replay = build(settings.Replay, config.replay, "replay")
    layout = build(settings.Layout, config.layout, "layout")
    evaluation = build(settings.Evaluation, config.evaluation, "evaluation")
    checkpoint = build(settings.Checkpoint, config.checkpoint, "checkpoint")
    logging = build(settings.Logging, config.logging, "logging")
    if sampling.temperature == 0 or sampling.repetition_penalty != 1:
        raise ValueError("sampling: training needs a temperature above 0 and a repetition_penalty of 1")
    alpha_at, beta_at = loss.coefficients(loss_fn, top.steps)
    replay.check(
        top.batch_size, offline=top.offline is not None, renewed=model.reference_every_steps is not None
    )
    updates = top.steps * replay.updates
    optimizer = build(make_optimizer, config.optimizer, "optimizer", steps=updates)
    judge = make_judge(config.judge, "judge")
    mesh = build(sharding.make_mesh, config.mesh, "mesh")
    sharding.check_rows(mesh, batch_size=top.batch_size)

    if isinstance(judge, HasProbe):
        judge.probe()  # before anything is downloaded or loaded

    found = hub.find(model.path)
    found_reference = found if model.reference is None else hub.find(model.reference)
    folder, reference_folder = found.folder, found_reference.folder
    model_config = model_folder.read_config(folder)
    attention_kernels.check(model.attention, dtype=compute_dtype(model.dtype), head_dim=model_config.head_dim)
    tokenizer = model_folder.load_tokenizer(folder, model_config)
    if model_folder.read_config(reference_folder) != model_config:
        raise ValueError(f"model.reference: {reference_folder} is of another architecture than {folder}")
    for each in {folder, reference_folder}:
        model_folder.check_params(each, model_config)
    if isinstance(judge, DeviceJudge):
        dtype = compute_dtype(model.dtype)
        judge.attach(mesh=mesh, folder=folder, model_config=model_config, tokenizer=tokenizer, dtype=dtype)
    offline = top.offline is not None
    data = build(
        load_prompts,
        # nothing is read from `train` where the pairs take its place
        {**config.data, "train": config.data.held_out} if offline else config.data,
        "data",
        tokenizer=tokenizer,
        max_new_tokens=sampling.max_new_tokens,
        check=judge.check if isinstance(judge, HasCheck) else None,
    )
    end_tokens = model_folder.end_token_ids(folder, tokenizer)
    if offline:
        names = ("template", "column", "max_prompt_tokens", "on_long", "take")
        given = {name: config.data[name] for name in names}
        given |= {"tokenizer": tokenizer, "end_tokens": end_tokens, "max_new_tokens": sampling.max_new_tokens}
        data = data._replace(train=build(load_pairs, config.offline, "offline", **given))
    batches = data.train_batches(top.batch_size, top.seed)
    held_out = list(data.held_out_batches(top.batch_size, evaluation.prompts))
    answers = None
    if evaluation.answers is not None:
        columns = {name: config.data[name] for name in ("template", "column", "rename")}
        answers = match_answers(held_out, evaluation.answers, **columns)
    opponents = evaluation.reference_samples + (answers is not None)
    budget = Budget(
        judging.max_queries,
        orders=1 + judging.both_orders,
        comparisons_per_evaluation=sum(int(b.valid.sum()) for b in held_out) * POLICY_SAMPLES * opponents,
        every_steps=evaluation.every_steps,
    )
    budget.check(0 if offline else int(batches[0].valid.sum()))
    prefetches = loss.second_candidate == "reference" and not offline
    shapes = BatchShapes(
        batch_size=top.batch_size,
        prompt_buckets=tuple(
            sorted({*batches.buckets_used(top.steps), *(b.tokens.shape[1] for b in held_out)})
        ),
        micro_batch_rows=layout.micro_batch_rows,
        chunk_tokens=layout.chunk_tokens,
        prefetch_depth=layout.reference_steps if prefetches else 1,
    )
    spec = make_model_spec(
        mesh,
        model_config,
        dtype=compute_dtype(model.dtype),
        remat=layout.remat,
        kernel=model.attention,
        batch_size=top.batch_size,
        prompt_tokens=shapes.prompt_buckets[-1],
    )
    programs = Programs(
        spec,
        shapes,
        sampling,
        Vocabulary(len(tokenizer), end_tokens, model_folder.pad_token_id(folder, tokenizer)),
        optimizer=optimizer,
        loss=loss_fn,
        entropy_weight=loss.entropy_weight,
        seed=top.seed,
    )
    memory = ReplayBuffer(
        **dataclasses.asdict(replay),
        batch_size=top.batch_size,
        seed=top.seed,
        pad_token=data.pad_id,
    )

    def decode(samples: Samples) -> list[str]:
        rows = [row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths, strict=True)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    alpha, beta, overlap = alpha_at(0), beta_at(0), data.overlap()
    described = {
        "model": f"{found.described}; reference: "
        + ("a frozen copy of it" if model.reference is None else found_reference.described)
        + (f", renewed every {model.reference_every_steps} steps" if model.reference_every_steps else ""),
        "training": data.train.summary(),
        "held out": data.held_out.summary()
        + (f"; {overlap} of them are training prompts too" if overlap else ""),
        "judge": config.judge.name
        + (", asked in both orders" if judging.both_orders else "")
        + (f"; at most {judging.max_queries} queries" if judging.max_queries is not None else ""),
        "batch": f"{top.batch_size} prompts, the update on {layout.micro_batch_rows} rows a device at a time;"
        f" {top.steps} steps, {batches.steps_per_epoch} an epoch",
        "replay": replay.described,
        "strengths": f"beta {beta:g}, alpha {alpha:g} (alpha / beta {alpha / beta:g})",
    }
    described = {name: text for name, text in described.items() if text}
    return Parts(
        top=top,
        loss=loss,
        judging=judging,
        evaluation=evaluation,
        checkpoint=checkpoint,
        logging=logging,
        alpha_at=alpha_at,
        beta_at=beta_at,
        second_is_reference=loss.second_candidate == "reference",
        judge=judge,
        budget=budget,
        failure_tolerance=FailureTolerance(**judging.failure_tolerance),
        model=found,
        reference=found_reference,
        reference_step=model.reference_step,
        model_config=model_config,
        data=data,
        batches=batches,
        memory=memory,
        held_out=held_out,
        answers=answers,
        programs=programs,
        decode=decode,
        described=described,
    )


def make_evaluator(p: Parts, reference: Params) -> Evaluator:
    """The held-out evaluation against these weights, as they are sampled from."""
    return Evaluator(
        p.programs,
        p.held_out,
        reference,
        p.judge,
        p.decode,
        answers=p.answers,
        reference_samples=p.evaluation.reference_samples,
        unfinished_loses=p.loss.unfinished_loses,
        both_orders=p.judging.both_orders,
        failure_tolerance=p.failure_tolerance,
        seed=p.top.seed,
    )


def of_evaluations(config: ConfigDict) -> str:
    """A fingerprint of what decides what an evaluation finds, besides weights and step."""
    groups = {name: config[name] for name in ("seed", "data", "model", "sampling", "judge")}
    evaluation = {name: config.evaluation[name] for name in ("prompts", "reference_samples", "answers")}
    rules = (config.judging.both_orders, config.loss.unfinished_loses)
    text = configs.serialize({**groups, "evaluation": evaluation, "rules": rules, "batch": config.batch_size})
    return hashlib.sha256(text.encode()).hexdigest()


def origins(p: Parts) -> dict[str, Any]:
    """What the run was made from, for environment.json."""
    return {
        "data": fingerprints(p),
        "sources": {"train": p.data.train.sources, "held_out": p.data.held_out.sources},
        "model": {"path": p.model.given, "commit": p.model.commit},
        "reference": {"path": p.reference.given, "commit": p.reference.commit},
        "judge": p.judge.models() if isinstance(p.judge, HasModels) else [],
    }


def fingerprints(p: Parts) -> dict[str, str]:
    """SHA-256 of the prompts, see `PromptData`."""
    return {"train": p.data.train.fingerprint, "held_out": p.data.held_out.fingerprint}


def common(config: ConfigDict) -> str:
    """What all processes must have alike."""
    return configs.serialize({name: config[name] for name in config if name != "distributed"})
