"""Descriptions of a run's components: for people, for environment.json, and to compare processes and starts."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from xpo_jax.algorithm.losses import BonusLoss
from xpo_jax.config import loader as configs
from xpo_jax.experiment.setup import Components
from xpo_jax.judges.contract import HasModels
from xpo_jax.models.hf.end_tokens import describe_end_tokens

# What the opening table shows of a loss only where it differs: the fields with a default.
_USUAL = {"second_candidate": "reference"} | {
    field.name: field.default
    for field in dataclasses.fields(BonusLoss)
    if field.default is not dataclasses.MISSING
}


def summary_rows(components: Components) -> dict[str, str]:
    """Return the rows of the opening table that describe the config."""
    groups, models, data = components.config, components.models, components.data
    top, model, judging = groups.top, groups.model, groups.judging
    packer = components.programs.packer
    alpha, beta = components.coefficients.alpha(0), components.coefficients.beta(0)
    overlap = data.prompts.overlap()
    rows = {
        "model": f"{models.policy.described}; reference: "
        + ("a frozen copy of it" if model.reference is None else models.reference.described)
        + (f", renewed every {model.reference_every_steps} steps" if model.reference_every_steps else ""),
        "trained": groups.lora.summary,
        "responses": f"at most {groups.sampling.max_new_tokens} tokens, ended by "
        + describe_end_tokens(models.policy.folder, models.tokenizer, groups.sampling.end_tokens),
        "training": data.prompts.train.summary(),
        "held out": data.prompts.held_out.summary()
        + (f"; {overlap} of them are training prompts too" if overlap else ""),
        "judge": top.judge["name"]
        + (", queried in both orders" if judging.both_orders else "")
        + (", without <think> blocks" if judging.hide_thinking else "")
        + (", asked one step ahead" if judging.steps_behind else "")
        + (f"; at most {judging.max_queries} queries" if judging.max_queries is not None else "")
        + (f"; of evaluations: {groups.evaluation.judge['name']}" if groups.evaluation.judge else ""),
        "batch": f"{top.batch_size} prompts, updated {packer.rows // packer.shards} rows per device at a time;"
        f" {top.steps} steps, {data.batches.steps_per_epoch} per epoch",
        "candidates": groups.loss.summary,
        "replay": groups.replay.summary,
        "loss": f"{top.loss['name']}, beta {beta:g}, alpha {alpha:g} (alpha / beta {alpha / beta:g})"
        + "".join(
            f", {name} {value}" for name, value in top.loss.items() if _USUAL.get(name, value) != value
        ),
    }
    return {name: text for name, text in rows.items() if text}


def provenance(components: Components) -> dict[str, Any]:
    """Return what the run was made from, for environment.json."""
    data, models, judge = components.data.prompts, components.models, components.judging.judge
    return {
        "sources": {"train": data.train.sources, "held_out": data.held_out.sources},
        "model": {"path": models.policy.given, "commit": models.policy.commit},
        "reference": {"path": models.reference.given, "commit": models.reference.commit},
        "judge": judge.models() if isinstance(judge, HasModels) else [],
    }


def shared_config(config: ConfigDict) -> str:
    """Return the config fields that must be equal on every process."""
    return configs.serialize({name: config[name] for name in config if name != "distributed"})
