"""The content of what a config names by path or by import: data, models, answers, the code of a judge.

A run is what it read. A resumed run compares these fingerprints with those of its last start, just as it compares the
config; see config_changes.py.

Left out on purpose: the code that a judge imports from elsewhere, and what it asks over a network.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.experiment.setup import Components
from xpo_jax.io import fingerprints
from xpo_jax.judges.contract import HasModels
from xpo_jax.models.hf import hub

# What a model is read from; its card or logs beside it may change.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")


def input_fingerprints(components: Components) -> dict[str, str]:
    """Return a fingerprint of each input's content, by the config's field or group that names it."""
    groups, models, data = components.config, components.models, components.data.prompts
    inputs = {
        "data.train" if groups.top.offline is None else "offline": data.train.fingerprint,
        "data.held_out": data.held_out.fingerprint,
        "model.path": _of_model(models.policy),
    }
    if models.reference.folder != models.policy.folder:
        inputs["model.reference"] = _of_model(models.reference)
    if judge := [*_code(groups.top.judge), *_judge_models(components)]:
        inputs["judge"] = fingerprints.combined(judge)
    if components.data.answers is not None:
        inputs["evaluation.answers"] = fingerprints.combined(
            answer for batch in components.data.answers for answer in batch
        )
    return inputs


def _of_model(model: hub.Model) -> str:
    return fingerprints.of_files(file for pattern in _MODEL_FILES for file in model.folder.glob(pattern))


def _judge_models(components: Components) -> Iterator[str]:
    """Yield a fingerprint of each model that the judge reads."""
    judge = components.judging.judge
    for model in judge.models() if isinstance(judge, HasModels) else ():
        if model["commit"] is not None:
            yield model["commit"]
        elif model["path"] is not None:
            yield _of_model(hub.find(model["path"]))


def _code(group: Mapping[str, Any] | ConfigDict) -> Iterator[str]:
    """Yield a fingerprint of the module of each judge that is named by import, in a judge's group and its parts."""
    name = group.get("name")
    if isinstance(name, str) and ":" in name:
        yield _of_package(name.partition(":")[0])
    for part in group.get("judges") or ():
        yield from _code(part)


def _of_package(module: str) -> str:
    """Return a fingerprint of the source files of a module, or of the modules of its package that are loaded."""
    package = module.partition(".")[0]
    sources = {
        Path(source)
        for name, loaded in list(sys.modules.items())
        if name == package or name.startswith(f"{package}.")
        if (source := _source(loaded)) is not None
    }
    return fingerprints.of_files(sources)


def _source(module: Any) -> str | None:
    try:
        return inspect.getsourcefile(module)
    except TypeError:  # a package without a file, or compiled code
        return None


def evaluation_identity(config: ConfigDict, inputs: Mapping[str, str]) -> str:
    """Return a hash of all that determines evaluation results besides weights and step.

    Args:
      config: of the run.
      inputs: as `input_fingerprints` returns them.
    """
    groups = {name: config[name] for name in ("seed", "data", "model", "sampling", "judge")}
    evaluation = {name: config.evaluation[name] for name in ("prompts", "reference_samples", "answers")}
    rules = (config.judging.both_orders, config.loss.unfinished_loses)
    text = configs.serialize({**groups, "evaluation": evaluation, "rules": rules, "batch": config.batch_size})
    read = (f"{name} {value}" for name, value in inputs.items() if name not in ("data.train", "offline"))
    return fingerprints.combined([text, *read])
