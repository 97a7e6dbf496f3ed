"""The content of what a config names by path or by import: data, models, answers, files and code of a judge, a loss.

A run is what it read. A resumed run compares these fingerprints with those of its last start, just as it compares the
config; see config_changes.py.

Left out on purpose: code that a judge or loss imports from installed packages, and what a judge asks over a network.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.experiment.setup import Components
from xpo_jax.io import fingerprints
from xpo_jax.io.user_paths import expand
from xpo_jax.judges.contract import HasModels
from xpo_jax.models.hf import hub

# What a model is read from; its card or logs beside it may change.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")

_OF_TRAINING = ("data.train", "offline", "loss")  # inputs that no evaluation depends on


def input_fingerprints(config: ConfigDict, components: Components) -> dict[str, str]:
    """Return a fingerprint of each input's content, by the config's field or group that names it."""
    groups, models, data = components.config, components.models, components.data.prompts
    inputs = {
        "data.train" if groups.top.offline is None else "offline": data.train.fingerprint,
        "data.held_out": data.held_out.fingerprint,
        "model.path": _of_model(models.policy),
    }
    if models.reference.folder != models.policy.folder:
        inputs["model.reference"] = _of_model(models.reference)
    if models.start is not None:
        inputs["lora.start"] = _of_model_files(models.start)
    if judge := [*_named(config.judge), *_judge_models(components)]:
        inputs["judge"] = fingerprints.combined(judge)
    if evaluation_judge := list(_named(config.evaluation.judge)):
        inputs["evaluation.judge"] = fingerprints.combined(evaluation_judge)
    if loss := list(_named(config.loss.name)):
        inputs["loss"] = fingerprints.combined(loss)
    if components.data.answers is not None:
        inputs["evaluation.answers"] = fingerprints.combined(
            answer for batch in components.data.answers for answer in batch
        )
    return inputs


def _of_model(model: hub.Model) -> str:
    return _of_model_files(model.folder)


def _of_model_files(folder: Path) -> str:
    return fingerprints.of_files(file for pattern in _MODEL_FILES for file in folder.glob(pattern))


def _judge_models(components: Components) -> Iterator[str]:
    """Yield what identifies each model or file that the judge says it reads: its commit, its content, or its name."""
    judge = components.judging.judge
    for model in judge.models() if isinstance(judge, HasModels) else ():
        if model["commit"] is not None:
            yield model["commit"]
        elif model["path"] is not None:
            folder = Path(expand(model["path"]))
            yield _of_model_files(folder) if folder.is_dir() else _of_file(model["path"]) or model["path"]


def _of_file(name: str) -> str | None:
    """Return a fingerprint of a file; None if `name` is not the path of one."""
    try:
        path = Path(expand(name))
        return fingerprints.of_file(path) if path.is_file() else None
    except (OSError, ValueError):  # a text that is no path
        return None


def _named(value: Any) -> Iterator[str]:
    """Yield a fingerprint of each module and file that a group of the config, or one of its parts, names.

    Folders are left out: a word such as a judge's name may happen to be the name of one.
    """
    if isinstance(value, Mapping | ConfigDict):
        for item in value.values():
            yield from _named(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _named(item)
    elif isinstance(value, str):
        module, colon, _ = value.partition(":")
        if colon and module in sys.modules:
            yield fingerprints.of_files(_sources(module))
        elif (content := _of_file(value)) is not None:
            yield content


def _sources(module: str) -> set[Path]:
    """Return the source files of a module, and of the modules beside it that it imports, directly or not.

    A module of a package stands for all modules of the package that are loaded. Beside an installed package there are
    only other installed packages.
    """
    package = module.partition(".")[0]
    folder, sources, new = _folder(package), set[Path](), _loaded_of(package)
    if folder is None or {"site-packages", "dist-packages"} & set(folder.parts):
        return new
    while new:
        sources |= new
        imported = {name for path in new for name in _imports(path)} - {__package__.partition(".")[0]}
        beside = [name for name in imported if (folder / f"{name}.py").is_file() or (folder / name).is_dir()]
        new = {path for name in beside for path in _loaded_of(name)} - sources
    return sources


def _folder(package: str) -> Path | None:
    """Return the folder that a package, or a module outside of any, lies in."""
    module = sys.modules[package]
    if paths := list(getattr(module, "__path__", ())):
        return Path(paths[0]).parent
    source = _source(module)
    return None if source is None else Path(source).parent


def _loaded_of(package: str) -> set[Path]:
    """Return the source files of a package's loaded modules."""
    return {
        Path(source)
        for name, loaded in list(sys.modules.items())
        if name == package or name.startswith(f"{package}.")
        if (source := _source(loaded)) is not None
    }


def _imports(path: Path) -> set[str]:
    """Return the first parts of the names of all modules that a source file imports from outside its package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


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
    groups = {name: config[name] for name in ("seed", "model", "sampling", "judge")}
    groups["data"] = {name: value for name, value in config.data.items() if name != "train"}
    evaluation = {
        name: config.evaluation[name] for name in ("prompts", "reference_samples", "answers", "judge")
    }
    rules = (config.judging.both_orders, config.judging.hide_thinking, config.loss.unfinished_loses)
    text = configs.serialize({**groups, "evaluation": evaluation, "rules": rules, "batch": config.batch_size})
    read = (f"{name} {value}" for name, value in inputs.items() if name not in _OF_TRAINING)
    return fingerprints.combined([text, *read])
