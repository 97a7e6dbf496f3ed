"""Folders of LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

They are read as the start of a run and written as an export; an adapter is also merged into the weights of its base,
tensor by tensor, for an export that needs no PEFT.

Left out on purpose: what lora.py does not compute. A field of adapter_config.json that asks for it is an error, and so
is a field that is set and unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from xpo_jax.io.files import read_json, sync
from xpo_jax.models import lora, registry
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf.tensors import Stored, disagreements, listed, read_slice
from xpo_jax.models.hf.weights import Reader, readers, save_tensors
from xpo_jax.models.lora import LoRA
from xpo_jax.models.registry import param_shapes
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none
from xpo_jax.values import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of adapter_config.json. COMPARED must be those of the config, NEEDED have these values if they are there.
_COMPARED = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}
_NEEDED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # the others change the base, or are no plain start
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}
# These say nothing of what is computed, or repeat what the tensors show.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "loftq_config",
    "lora_dropout",  # of training
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}


class AdapterTensor(NamedTuple):
    """A tensor of an adapter: path in our tree, layer, and shape in the file, which is the transposed one."""

    path: tuple[str, ...]
    layer: int
    shape: tuple[int, ...]


def adapter_shapes(model_config: ModelConfig, adapters: LoRA) -> Params:
    """Return the tree of an adapter's float32 weights, with stacked layers, as ShapeDtypeStructs."""
    return adapters.trained(registry.abstract_model(model_config, stacked=True, adapters=adapters)[1])


def adapter_tensors(model_config: ModelConfig, adapters: LoRA) -> dict[str, AdapterTensor]:
    """Return PEFT's name of every tensor of an adapter, layers in order."""
    shapes = traverse_util.flatten_dict(adapter_shapes(model_config, adapters))
    tensors = {}
    for path, name, _ in registry.family(model_config).tensors:
        *module, _ = path.split(".")
        for ours, in_peft in ((lora.A, "lora_A"), (lora.B, "lora_B")):
            key = (*module, ours)
            if not path.endswith(".kernel") or key not in shapes:
                continue
            layers, *shape = shapes[key].shape
            for layer in range(layers):
                of_map = name.removesuffix("weight").format(layer=layer)
                tensors[f"{_PREFIX}{of_map}{in_peft}.weight"] = AdapterTensor(key, layer, tuple(shape[::-1]))
    return tensors


def check_adapter(folder: Path, model_config: ModelConfig, adapters: LoRA) -> dict[str, Stored]:
    """Return the tensors of a folder that PEFT wrote, after a check that they are the adapters of `adapters`.

    Raises:
      ValueError: no such folder, an adapter that is not computed here, or one that is not the config's; in one line.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"lora.start: {folder} has no {CONFIG}; give a folder that PEFT's save_pretrained wrote"
        )
    _check_config(
        folder / CONFIG, read_json(folder / CONFIG, remedy="give a complete adapter folder"), adapters
    )
    stored = _stored(folder / WEIGHTS)
    if problems := disagreements(adapter_tensors(model_config, adapters), stored, limit=2):
        raise ValueError(
            f"{folder / WEIGHTS}: is not the adapter of lora.targets of this model; {problems}."
            " Set lora.targets to the adapter's modules, and model.path to its base"
        )
    return stored


def load_adapter(folder: Path, model_config: ModelConfig, adapters: LoRA) -> Params:
    """Read a folder that PEFT wrote: float32 on the host, with stacked layers; errors as in `check_adapter`."""
    stored = check_adapter(folder, model_config, adapters)
    shapes = traverse_util.flatten_dict(adapter_shapes(model_config, adapters))
    flat = {path: np.empty(leaf.shape, np.float32) for path, leaf in shapes.items()}
    for name, tensor in adapter_tensors(model_config, adapters).items():
        numbers = read_slice(stored[name], (slice(None), slice(None))).astype(np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError(
                f"{folder / WEIGHTS}: {name} holds a number that is not finite; restore the file"
            )
        flat[tensor.path][tensor.layer] = numbers.T
    return traverse_util.unflatten_dict(flat)


def save_adapter(folder: Path, params: Params, model_config: ModelConfig, adapters: LoRA, base: str) -> None:
    """Write a folder that PEFT's PeftModel.from_pretrained loads, over what it held. All processes call it.

    Args:
      params: the adapter, float32, with stacked layers.
      base: the name of the model that it belongs to.
    """
    flat = traverse_util.flatten_dict(params)
    tensors = adapter_tensors(model_config, adapters)
    with all_or_none("writing the adapter"), distributed.fetched_to_lead(list(flat.values())) as fetched:
        if not distributed.is_lead_process():
            return
        arrays = dict(zip(flat, fetched, strict=True))
        folder.mkdir(exist_ok=True)
        pieces = {
            name: np.ascontiguousarray(arrays[tensor.path][tensor.layer].T)
            for name, tensor in tensors.items()
        }
        save_tensors(folder / WEIGHTS, pieces)
        text = json.dumps(_config(tensors, adapters, base), indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        for path in (folder / CONFIG, folder / WEIGHTS):
            sync(path)


def merged(folder: Path, model_config: ModelConfig, params: Params, adapters: LoRA) -> Params:
    """Return W + scale A B for each weight W of a model's folder, as `model_folder.save` takes them.

    Each is read and computed on the host, in float32, when process 0 writes it. All processes call this.

    Args:
      folder: of the base. params: the adapter, with stacked layers.
    """
    flat = traverse_util.flatten_dict(params)
    with distributed.fetched_to_lead(list(flat.values())) as fetched:
        on_lead = distributed.is_lead_process()
        arrays = dict(zip(flat, fetched, strict=True)) if on_lead else {}
    with all_or_none("reading the base"):
        of_base = readers(folder, model_config, param_shapes(model_config))
    return traverse_util.unflatten_dict(
        {
            path: _Merged(leaf.shape, reader, arrays, path, adapters.scale)
            for path, (leaf, reader) in of_base.items()
        }
    )


class _Merged:
    """An array that is made when NumPy asks for it."""

    def __init__(
        self,
        shape: tuple[int, ...],
        reader: Callable[[], Reader],
        adapter: Mapping[tuple[str, ...], np.ndarray],
        path: tuple[Any, ...],
        scale: float,
    ):
        self.shape = shape
        self._reader, self._adapter, self._path, self._scale = reader, adapter, path, scale

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        weight = self._reader()((slice(None),) * len(self.shape))
        a, b = (self._adapter.get((*self._path[:-1], name)) for name in (lora.A, lora.B))
        if self._path[-1] == "kernel" and a is not None and b is not None:
            for layer in range(len(weight)):
                weight[layer] += np.float32(self._scale) * (a[layer] @ b[layer])
        return weight if dtype is None else weight.astype(dtype)


def _check_config(path: Path, config: Mapping[str, Any], adapters: LoRA) -> None:
    for field, needed in _NEEDED.items():
        if field in config and config[field] not in needed:
            raise ValueError(
                f"{path}: {field} is {config[field]!r}, which xpo_jax does not compute; merge that adapter into its"
                " model with PEFT's merge_and_unload, and give the result as model.path"
            )
    for name, field in _COMPARED.items():
        expected, stated = getattr(adapters, field), config.get(name, False if name == "use_rslora" else None)
        if stated != expected:
            raise ValueError(
                f"{path}: {name} is {stated!r}, but lora.{field} is {expected!r}; set lora.{field} to the adapter's"
            )
    read = {*_NEEDED, *_COMPARED, *_IGNORED}
    others = [f"{name} {value!r}" for name, value in config.items() if name not in read and value]
    if others:
        raise ValueError(
            f"{path}: {listed(others, 3)}: not computed by xpo_jax; merge that adapter into its model with PEFT's"
            " merge_and_unload, and give the result as model.path"
        )


def _stored(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        raise ValueError(
            f"{file.parent} lacks {file.name}; give a complete adapter folder (safetensors only)"
        )
    try:
        with safe_open(file, framework="np") as f:
            views = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (it is not a dict)
            return {n: Stored(file, n, tuple(v.get_shape()), v.get_dtype()) for n, v in views.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); download it again") from error


def _config(tensors: Mapping[str, AdapterTensor], adapters: LoRA, base: str) -> dict[str, Any]:
    """Return an adapter_config.json; fields that are left out have the values of a plain LoRA in PEFT."""
    alpha = int(adapters.alpha) if math.floor(adapters.alpha) == adapters.alpha else adapters.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapters.rslora,
        "target_modules": sorted({tensor.path[-2] for tensor in tensors.values()}),
        "bias": "none",
        "inference_mode": True,
    }
