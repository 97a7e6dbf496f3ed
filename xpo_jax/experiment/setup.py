"""From a config to the components of a run, cheapest first, so that mistakes are reported before anything is loaded.

Only groups.py, data_setup.py, startup.py, session.py and this module read the config. Nothing here writes a file (but
into the hub's cache) or puts an array on a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from xpo_jax.algorithm.batch_shapes import BatchShapes, steps_per_call
from xpo_jax.algorithm.losses import LossFn
from xpo_jax.algorithm.model_spec import compute_dtype, make_model_spec
from xpo_jax.algorithm.optimizer import Optimizer
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.replay_buffer import ReplayBuffer
from xpo_jax.algorithm.sampler import Vocabulary
from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.evaluation.evaluator import Evaluator, Opponents
from xpo_jax.evaluation.selection import Selection
from xpo_jax.experiment.data_setup import Data, load_data
from xpo_jax.experiment.groups import Coefficients, Groups, check_groups
from xpo_jax.experiment.judge_factory import Judging, check_judge, make_judges, make_judging
from xpo_jax.io.user_paths import expand
from xpo_jax.judges.contract import DeviceJudge
from xpo_jax.models import attention_kernels
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf import adapter, hub, model_folder
from xpo_jax.models.lora import LoRA
from xpo_jax.runtime import sharding
from xpo_jax.values import Params, Samples


class Models(NamedTuple):
    """The folders of policy and reference, which share architecture and tokenizer.

    start: the folder of the adapter that the policy begins with; None for none.
    starts_as_reference: whether the reference is a frozen copy of the policy's start.
    """

    policy: hub.Model
    reference: hub.Model
    config: Any
    tokenizer: Any
    start: Path | None
    starts_as_reference: bool

    def end_tokens(self, sampling: Sampling) -> tuple[int, ...]:
        """Return the ids of the tokens that end a response."""
        return model_folder.end_token_ids(self.policy.folder, self.tokenizer, sampling.end_tokens)

    def decode(self, samples: Samples) -> list[str]:
        """Return the text of each sample on the host, without special tokens."""
        rows = [row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths, strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def has_cut_tokens(self, samples: Samples) -> np.ndarray:
        """Return bool[B]: whether `decode` cuts tokens of a sample other than the one that ends it."""
        before_end = np.arange(samples.tokens.shape[1]) < (samples.lengths - samples.finished)[:, None]
        return (np.isin(samples.tokens, self.tokenizer.all_special_ids) & before_end).any(axis=1)

    def cut_rate(self, candidates: Sequence[Samples], valid: np.ndarray) -> float:
        """Return the fraction of the valid rows' samples with `has_cut_tokens`."""
        return float(np.mean([self.has_cut_tokens(samples)[valid] for samples in candidates]))


class Components(NamedTuple):
    """What `prepare` builds."""

    config: Groups
    coefficients: Coefficients
    models: Models
    data: Data
    judging: Judging
    programs: Programs
    replay: ReplayBuffer
    selection: Selection


def prepare(config: ConfigDict) -> Components:
    """Build the components of the run that a config describes.

    Raises:
      ValueError: anything that can be known to be wrong before a run directory is made, in one line.
    """
    groups, loss_fn, coefficients, selection, optimizer = check_groups(config)
    top, offline = groups.top, groups.offline
    judges = make_judges(config.judge, groups.evaluation)
    check_judge(judges.training, groups.judging, groups.loss, offline=offline, renewed=groups.renewed)
    selection.check_judge(judges.evaluation)
    mesh = configs.build(sharding.make_mesh, config.mesh, "mesh")
    sharding.check_rows(mesh, batch_size=top.batch_size)
    judges.probe()
    models = _models(groups.model, groups.lora, mesh)
    if isinstance(judges.training, DeviceJudge):
        judges.training.attach(
            mesh=mesh,
            folder=models.policy.folder,
            model_config=models.config,
            tokenizer=models.tokenizer,
            dtype=compute_dtype(groups.model.dtype, sharding.platform(mesh)),
        )
    _check_positions(config.data.max_prompt_tokens, groups.sampling, models.config)
    data = load_data(
        config,
        groups.evaluation,
        judges.training,
        models.tokenizer,
        evaluation_judge=judges.evaluation,
        end_tokens=models.end_tokens(groups.sampling),
        max_new_tokens=groups.sampling.max_new_tokens,
    )
    judging = make_judging(judges, groups.judging, groups.evaluation, data, groups.loss, offline=offline)
    programs = _programs(groups, models, data, mesh, optimizer, loss_fn)
    replay = ReplayBuffer(
        **dataclasses.asdict(groups.replay),
        batch_size=top.batch_size,
        seed=top.seed,
        pad_token=data.prompts.pad_id,
    )
    return Components(groups, coefficients, models, data, judging, programs, replay, selection)


def _models(model: settings.Model, lora: LoRA, mesh: Mesh) -> Models:
    """Find and check the folders of policy, reference and first adapter."""
    policy = hub.find(model.path)
    reference = policy if model.reference is None else hub.find(model.reference)
    config = model_folder.read_config(policy.folder)
    dtype = compute_dtype(model.dtype, sharding.platform(mesh))
    attention_kernels.check(model.attention, mesh.devices.flat[0], dtype=dtype, head_dim=config.head_dim)
    tokenizer = model_folder.load_tokenizer(policy.folder, config)
    if model_folder.read_config(reference.folder) != config:
        raise ValueError(
            f"model.reference: {reference.folder} has another architecture than {policy.folder}; give a model of the"
            " same architecture"
        )
    for folder in {policy.folder, reference.folder}:
        model_folder.check_params(folder, config)
    start = None if lora.start is None else Path(expand(lora.start))
    if start is not None:
        adapter.check_adapter(start, config, lora)
    is_start = model.reference is None or (reference.folder == policy.folder and start is None)
    return Models(policy, reference, config, tokenizer, start, is_start)


def _check_positions(prompt_tokens: int, sampling: Sampling, model_config: ModelConfig) -> None:
    """Raise ValueError where a prompt and its response may be longer than what the model was made for."""
    limit, tokens = model_config.max_position_embeddings, sampling.max_new_tokens
    if prompt_tokens + tokens > limit:
        room = {"sampling.max_new_tokens": limit - prompt_tokens, "data.max_prompt_tokens": limit - tokens}
        remedies = [f"lower {name} to {number}" for name, number in room.items() if number > 0]
        fits = " or ".join(remedies) or f"lower both to at most {limit} together"
        raise ValueError(
            f"data.max_prompt_tokens: prompts of {prompt_tokens} tokens and responses of {tokens}"
            f" (sampling.max_new_tokens) need {prompt_tokens + tokens} positions, but the model has {limit}; {fits}"
        )


def _programs(
    groups: Groups, models: Models, data: Data, mesh: Mesh, optimizer: Optimizer, loss_fn: LossFn
) -> Programs:
    """Declare what runs on the devices."""
    top, model, layout, loss = groups.top, groups.model, groups.layout, groups.loss
    prefetches = loss.second_candidate == "reference" and not groups.offline
    held_out_buckets = {batch.tokens.shape[1] for batch in data.held_out}
    prompt_buckets = tuple(sorted({*data.batches.buckets_used(top.steps), *held_out_buckets}))
    spec = make_model_spec(
        mesh,
        models.config,
        dtype=compute_dtype(model.dtype, sharding.platform(mesh)),
        remat=layout.remat,
        attention=model.attention,
        lora=groups.lora,
        batch_size=top.batch_size,
        prompt_tokens=prompt_buckets[-1],
    )
    depth = steps_per_call(layout.reference_steps, top.batch_size, spec.shards, model.reference_every_steps)
    shapes = BatchShapes(
        batch_size=top.batch_size,
        prompt_buckets=prompt_buckets,
        micro_batch_rows=layout.micro_batch_rows,
        chunk_tokens=layout.chunk_tokens,
        prefetch_depth=depth if prefetches else 1,
        prefill_rows=layout.prefill_rows,
        candidates=loss.candidates,
    )
    vocabulary = Vocabulary(
        len(models.tokenizer),
        models.end_tokens(groups.sampling),
        model_folder.pad_token_id(models.policy.folder, models.tokenizer),
    )
    return Programs(
        spec,
        shapes,
        groups.sampling,
        vocabulary,
        optimizer=optimizer,
        loss=loss_fn,
        entropy_weight=loss.entropy_weight,
        seed=top.seed,
    )


def make_evaluator(components: Components, reference: Params) -> Evaluator:
    """Return the held-out evaluation against these weights, as they are sampled from."""
    groups, data = components.config, components.data
    return Evaluator(
        components.programs,
        components.judging.evaluation_judge,
        components.models.decode,
        Opponents(data.held_out, reference, groups.evaluation.reference_samples, data.answers),
        unfinished_loses=groups.loss.unfinished_loses,
        both_orders=groups.judging.both_orders,
        hide_thinking=groups.judging.hide_thinking,
        failure_tolerance=components.judging.failure_tolerance,
        seed=groups.top.seed,
    )
