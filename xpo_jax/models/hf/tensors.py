"""The tensors in the files of a model's folder, checked against its config.json.

Headers are compared with the tensor table of the model family before any data is read; a tensor that the table does not
name is an error. `weights.py` reads and writes the data.

Left out on purpose: pickled weights (they can run code and are never opened) and quantised tensors.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from xpo_jax.io.files import read_json
from xpo_jax.models import registry
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.registry import param_shapes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")  # copied with the model
FLOATS = ("F32", "BF16", "F16")  # safetensors' names of the dtypes that can be read

# A real folder, because safetensors maps its files; the package is never installed as a zip.
EMBEDDED = Path(str(importlib.resources.files("xpo_jax.embedded") / "model"))


class Tensor(NamedTuple):
    """A tensor that the config requires: path in our tree, layer (None: not stacked), and shape in the file."""

    path: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


class Stored(NamedTuple):
    """A tensor in a file; dtype is safetensors' name."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def model_folder(folder: str | Path) -> Path:
    """Return the path of an existing folder, where "embedded" is the project's own; raise ValueError otherwise."""
    path = EMBEDDED if folder == "embedded" else Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder; give a Hugging Face model folder, a hub name (owner/name), or 'embedded'"
        )
    return path


def read_model_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file of a model folder holds; a ValueError names the file otherwise."""
    adapter = path.with_name("adapter_config.json")
    if path.name == "config.json" and not path.exists() and adapter.exists():
        base = read_json(adapter, remedy="give a complete model").get("base_model_name_or_path")
        raise ValueError(
            f"{path.parent}: holds an adapter (LoRA) of {base or 'another model'}, not a model; give that model, and"
            " this folder as lora.start; or merge the two (merge_and_unload of peft) and give the result"
        )
    return read_json(path, remedy="give a complete Hugging Face model folder")


def expected_tensors(model_config: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's name of every tensor of this model, layers in order."""
    shapes = traverse_util.flatten_dict(param_shapes(model_config), sep=".")
    tensors: dict[str, Tensor] = {}
    for path, name, how in registry.family(model_config).tensors:
        if path not in shapes:
            continue  # a tied model has no lm_head
        shape = shapes[path].shape
        layers: Sequence[int | None] = range(shape[0]) if "{layer}" in name else (None,)
        shape = shape[1:] if "{layer}" in name else shape
        for layer in layers:
            in_file = shape[::-1] if how == "transpose" else shape
            tensors[name.format(layer=layer)] = Tensor(path, layer, how == "transpose", in_file)
    return tensors


def _stored(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """Return every tensor of the folder's weight files, and a line for each that occurs twice."""
    tensors: dict[str, Stored] = {}
    duplicates = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="np") as f:
                for name in f.keys():  # noqa: SIM118 (it is not a dict)
                    view = f.get_slice(name)
                    if name in tensors:
                        duplicates.append(f"{name} in {tensors[name].file.name} and {file.name}")
                    tensors[name] = Stored(file, name, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or truncated ({error}); download it again") from error
    return tensors, duplicates


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise ValueError(
                f"{folder} has only pickled weights ({listed(pickled)}), which may run code and are never opened;"
                " save the model with transformers' save_pretrained to get safetensors"
            )
        raise ValueError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; give a complete Hugging Face model folder"
        )
    names = read_model_json(folder / INDEX).get("weight_map")
    if not isinstance(names, Mapping) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensor to file; download it again")
    files = sorted(set(names.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise ValueError(
            f"{folder / INDEX} names files outside its folder: {listed(outside)}; correct the index"
        )
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder} lacks {listed(absent)}, which {INDEX} names; download the rest of the model"
        )
    return [folder / name for name in files]


def checked(
    folder: Path, model_config: ModelConfig, head: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Mapping[str, Tensor], Mapping[str, Stored]]:
    """Return the tensors that the config requires and those in the files, after a check that they agree.

    Args:
      head: names and shapes of additional tensors, which are in the files but in no tree of parameters.
    """
    stored, duplicates = _stored(folder)
    expected = expected_tensors(model_config)
    expected |= {name: Tensor(name, None, False, shape) for name, shape in (head or {}).items()}
    family = registry.family(model_config)
    if model_config.tie_word_embeddings and family.head in stored and family.embedding in stored:
        _check_tied(stored[family.head], stored[family.embedding])
        del stored[family.head]
    _check(folder, expected, stored, duplicates)
    return expected, stored


def _check(
    folder: Path, expected: Mapping[str, Tensor], stored: Mapping[str, Stored], duplicates: Sequence[str]
) -> None:
    """Raise one error that lists all tensors that do not agree."""
    if problems := disagreements(expected, stored, duplicates):
        raise ValueError(
            f"{folder}: the weights do not fit config.json; {problems}."
            " Take weights and config.json from the same model"
        )


class HasShape(Protocol):
    """A tensor that is expected."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        ...


def disagreements(
    expected: Mapping[str, HasShape],
    stored: Mapping[str, Stored],
    duplicates: Sequence[str] = (),
    *,
    limit: int = 6,
) -> str:
    """Return in what stored tensors differ from the expected ones, of each kind the first few; "" if in nothing."""
    both = sorted(expected.keys() & stored.keys())
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "duplicate": sorted(duplicates),
        "mis-shaped": [
            f"{name} is {stored[name].shape}, not {expected[name].shape}"
            for name in both
            if stored[name].shape != expected[name].shape
        ],
        "of an unknown dtype": [f"{n} is {stored[n].dtype}" for n in both if stored[n].dtype not in FLOATS],
    }
    return "; ".join(
        f"{len(lines)} {kind}: {listed(lines, limit)}" for kind, lines in problems.items() if lines
    )


def listed(lines: Sequence[str], limit: int = 6) -> str:
    """Join the first few of many names, and the number of the others."""
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")


def _check_tied(head: Stored, embedding: Stored) -> None:
    """Check that a tied model's lm_head, which transformers sometimes writes, equals the embedding."""
    same = head.shape == embedding.shape
    rows_all, block = head.shape[0] if same else 0, 8192  # in blocks, so that neither is completely in memory
    for start in range(0, rows_all, block):
        rows = (slice(start, min(start + block, rows_all)),)
        same = same and np.array_equal(read_slice(head, rows), read_slice(embedding, rows))
    if not same:
        raise ValueError(
            f"{head.file}: config.json ties the embeddings, but {head.name} differs from {embedding.name};"
            " set tie_word_embeddings to false if the model is not tied, or remove the tensor"
        )


def read_slice(stored: Stored, window: tuple[slice, ...]) -> np.ndarray:
    """Read a window of a stored tensor, in the file's dtype."""
    # Opened for each read: the file is mapped into memory, and closing it releases the pages.
    with safe_open(stored.file, framework="np") as f:
        return f.get_slice(stored.name)[window]
