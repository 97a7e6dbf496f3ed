"""The groups of a config as typed values, checked one by one and against each other: what needs no file and no device.

A run and `python -m tools.plan` refuse the same configs here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from xpo_jax.algorithm.losses import LossFn
from xpo_jax.algorithm.optimizer import Optimizer, make_optimizer
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.config.evaluation import Evaluation
from xpo_jax.config.loss import Loss, make_loss
from xpo_jax.evaluation.selection import Selection
from xpo_jax.models.lora import LoRA


class Groups(NamedTuple):
    """The groups of a config that are no factory's arguments, checked one by one and against each other."""

    # long: one field per group
    top: settings.Experiment
    model: settings.Model
    lora: LoRA
    sampling: CandidateSampling
    loss: Loss
    judging: settings.Judging
    replay: settings.Replay
    layout: settings.Layout
    evaluation: Evaluation
    checkpoint: settings.Checkpoint
    logging: settings.Logging

    @property
    def offline(self) -> bool:
        """Whether recorded pairs are learned from."""
        return self.top.offline is not None

    @property
    def renewed(self) -> bool:
        """Whether the policy becomes the reference from time to time."""
        return self.model.reference_every_steps is not None


class Coefficients(NamedTuple):
    """The coefficients of the loss as functions of the step, from 0; and `Loss.doubt` of the first ones."""

    alpha: Callable[[int], float]
    beta: Callable[[int], float]
    doubt: str


class Checked(NamedTuple):
    """What `check_groups` builds."""

    groups: Groups
    loss_fn: LossFn
    coefficients: Coefficients
    selection: Selection
    optimizer: Optimizer


def check_groups(config: ConfigDict) -> Checked:
    """Build what a config describes and nothing else has to be read for.

    Raises:
      ValueError: a group that does not fit its signature, or contradicts another one, in one line.
    """
    groups, loss_fn = _groups(config)
    top, offline = groups.top, groups.offline
    alpha, beta = groups.loss.coefficients(loss_fn, top.steps)
    groups.sampling.check(offline=offline)
    doubt = groups.loss.doubt(
        loss_fn,
        alpha(0),
        beta(0),
        fresh_pairs=groups.replay.updates == 1 and not groups.judging.steps_behind,
        one_distribution=not offline and groups.sampling.second_temperature is None,
    )
    selection = Selection(groups.checkpoint.export, beta(top.steps - 1), groups.evaluation.every_steps)
    groups.replay.check(top.batch_size, offline=offline, renewed=groups.renewed)
    updates = top.steps * groups.replay.updates
    optimizer = configs.build(make_optimizer, config.optimizer, "optimizer", steps=updates)
    return Checked(groups, loss_fn, Coefficients(alpha, beta, doubt), selection, optimizer)


def _groups(config: ConfigDict) -> tuple[Groups, LossFn]:
    """Build the groups that are no factory's arguments, and the loss that the config names."""
    build = configs.build
    top = build(settings.Experiment, config, "config")
    model = build(settings.Model, config.model, "model")
    sampling = build(CandidateSampling, config.sampling, "sampling")
    loss, loss_fn = make_loss(config.loss)
    groups = Groups(
        top,
        model,
        build(LoRA, config.lora, "lora"),
        sampling,
        loss,
        build(settings.Judging, config.judging, "judging"),
        build(settings.Replay, config.replay, "replay"),
        build(settings.Layout, config.layout, "layout"),
        build(Evaluation, config.evaluation, "evaluation"),
        build(settings.Checkpoint, config.checkpoint, "checkpoint"),
        build(settings.Logging, config.logging, "logging"),
    )
    if sampling.temperature == 0 or sampling.repetition_penalty != 1:
        raise ValueError("sampling: training needs a temperature above 0 and a repetition_penalty of 1")
    return groups, loss_fn
