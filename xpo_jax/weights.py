"""The tensors of a model and the safetensors files that hold them, in and out.

Weights are read tensor by tensor from the byte ranges of the files straight into the shards that need
them, as float32; at no time is there a second copy of the model on the host. One table, TENSORS of the
model family, serves reading and writing; what it does not name is an error.

Left out on purpose: pickled weights (they can run code and are never opened) and quantised tensors. What
else a Hugging Face folder holds is `hf.py`'s, which is where the rest of the project imports these
functions from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx, traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xpo_jax import distributed
from xpo_jax.models.qwen2 import TENSORS, Qwen2, Qwen2Config
from xpo_jax.values import Params

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = ("F32", "BF16", "F16")  # safetensors' names of the dtypes that we read
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}  # that we write

EMBEDDED = Path(__file__).parent / "embedded" / "model"


class _Tensor(NamedTuple):
    """A tensor that the config asks for: our path, its layer (None: not one of a stack), shape in the file."""

    path: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    """A tensor that a file holds; dtype is safetensors' name for it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def param_shapes(model_config: Qwen2Config) -> Params:
    """The tree that `load_params` returns, as ShapeDtypeStructs; nothing is allocated."""
    model = nnx.eval_shape(lambda: Qwen2(model_config, rngs=nnx.Rngs(0), stacked=True))
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, np.float32), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )


def load_params(folder: str | Path, model_config: Qwen2Config, *, shardings: Any = None) -> Params:
    """Read the weights of a Hugging Face folder.

    Args:
      folder: holds model.safetensors, or (if it does not) the shards that model.safetensors.index.json names.
      model_config: what `read_config` made of the same folder.
      shardings: a tree of jax.sharding.Sharding like `param_shapes`; None puts all on the default device,
        uncommitted. A process reads only the byte ranges that its own devices hold.

    Returns:
      The parameters of Qwen2(stacked=True) as a nested dict of float32 arrays, layers on axis 0.

    Raises:
      ValueError: missing or damaged files; missing, unexpected, duplicate or mis-shaped tensors, all in one
        error; an lm_head.weight of a tied model that is not the embedding.
    """
    expected, stored = _checked(model_folder(folder), model_config)
    sources: dict[str, list[_Stored]] = {}
    for name, tensor in expected.items():  # layers in order
        sources.setdefault(tensor.path, []).append(stored[name])
    kinds = {tensor.path: tensor for tensor in expected.values()}
    where = {} if shardings is None else traverse_util.flatten_dict(shardings, sep=".")
    params = {}
    for path, leaf in traverse_util.flatten_dict(param_shapes(model_config), sep=".").items():
        read = _reader(sources[path], kinds[path].transposed, kinds[path].layer is not None, leaf.shape)
        if shardings is None:
            params[path] = jax.device_put(read((slice(None),) * len(leaf.shape)))
        else:
            params[path] = jax.make_array_from_callback(leaf.shape, where[path], read)
    return traverse_util.unflatten_dict(params, sep=".")


def check_params(folder: str | Path, model_config: Qwen2Config) -> None:
    """Raise what `load_params` would, from the headers of the files alone: before a run begins."""
    _checked(model_folder(folder), model_config)


def write_params(
    folder: Path, params: Params, model_config: Qwen2Config, *, dtype: str, max_shard_bytes: int
) -> None:
    """Write model.safetensors, or several shards with model.safetensors.index.json, into a folder.

    One stacked array at a time is gathered, for which all processes call this; process 0 writes.

    Args: as `hf.save` has them.

    Raises:
      ValueError: parameters that do not fit model_config, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype of the export is {dtype!r}; give one of {', '.join(DTYPES)}")
    flat = traverse_util.flatten_dict(params, sep=".")
    shapes = {
        p: leaf.shape for p, leaf in traverse_util.flatten_dict(param_shapes(model_config), sep=".").items()
    }
    wrong = sorted(p for p in shapes | flat if p not in flat or np.shape(flat[p]) != shapes.get(p))
    if wrong:
        raise ValueError(
            f"parameters do not fit the model's config: {listed(wrong)}; export with the model's own"
        )

    tensors = _expected(model_config)
    order = dict.fromkeys(
        tensor.path for tensor in tensors.values()
    )  # all layers of an array follow each other
    with distributed.wholes([flat[path] for path in order]) as arrays:
        if distributed.leads():
            _write_shards(folder, arrays, tensors, dtype, max_shard_bytes)


def _write_shards(
    folder: Path, arrays: Iterator[Any], tensors: Mapping[str, _Tensor], dtype: str, max_shard_bytes: int
) -> None:
    sizes = {name: math.prod(t.shape) * DTYPES[dtype].itemsize for name, t in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    many, weight_map = len(shards), {}
    host: tuple[str, Any] = ("", None)  # the one stacked array that is on the host
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if many == 1 else f"model-{number:05d}-of-{many:05d}.safetensors"
        pieces = {}
        for name in names:
            path, layer, transposed, _ = tensors[name]
            if host[0] != path:
                host = (path, next(arrays))
            array = host[1] if layer is None else host[1][layer]
            pieces[name] = np.ascontiguousarray(array.T if transposed else array, dtype=DTYPES[dtype])
            weight_map[name] = file
        save_file(pieces, folder / file, metadata={"format": "pt"})
    if many > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def model_folder(folder: str | Path) -> Path:
    """The path of a folder that exists, "embedded" being the project's own; ValueError otherwise."""
    path = EMBEDDED if folder == "embedded" else Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a local Hugging Face model folder, or 'embedded'")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; a ValueError names the file otherwise."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a complete Hugging Face model folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from the model's source") from error
    if type(value) is not dict:
        raise ValueError(
            f"{path} holds a {type(value).__name__}, not an object; restore it from the model's source"
        )
    return value


def _expected(model_config: Qwen2Config) -> dict[str, _Tensor]:
    """Hugging Face's name of every tensor of this model, layers in order."""
    shapes = traverse_util.flatten_dict(param_shapes(model_config), sep=".")
    tensors: dict[str, _Tensor] = {}
    for path, name, how in TENSORS:
        if path not in shapes:
            continue  # a tied model has no lm_head
        shape = shapes[path].shape
        layers: Sequence[int | None] = range(shape[0]) if "{layer}" in name else (None,)
        shape = shape[1:] if "{layer}" in name else shape
        for layer in layers:
            theirs = shape[::-1] if how == "transpose" else shape
            tensors[name.format(layer=layer)] = _Tensor(path, layer, how == "transpose", theirs)
    return tensors


def _stored(folder: Path) -> tuple[dict[str, _Stored], list[str]]:
    """Every tensor of the folder's weight files, and a line for each that is there twice."""
    found: dict[str, _Stored] = {}
    duplicates = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="np") as f:
                for name in f.keys():  # noqa: SIM118 (it is no dict)
                    view = f.get_slice(name)
                    if name in found:
                        duplicates.append(f"{name} in {found[name].file.name} and {file.name}")
                    found[name] = _Stored(file, name, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); download it again") from error
    return found, duplicates


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
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, Mapping) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensor to file; download it again")
    files = sorted(set(names.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise ValueError(
            f"{folder / INDEX} names files outside its folder: {listed(outside)}; mend the index"
        )
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder} lacks {listed(absent)}, which {INDEX} names; download the rest of the model"
        )
    return [folder / name for name in files]


def _checked(folder: Path, model_config: Qwen2Config) -> tuple[Mapping[str, _Tensor], Mapping[str, _Stored]]:
    """What the config asks for and what the files hold, which are the same tensors."""
    stored, duplicates = _stored(folder)
    expected = _expected(model_config)
    if model_config.tie_word_embeddings and HEAD in stored and EMBEDDING in stored:
        _check_tied(stored[HEAD], stored[EMBEDDING])
        del stored[HEAD]
    _check(folder, expected, stored, duplicates)
    return expected, stored


def _check(
    folder: Path, expected: Mapping[str, _Tensor], stored: Mapping[str, _Stored], duplicates: Sequence[str]
) -> None:
    """Raise one error for all tensors that are not as they should be."""
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
    told = [f"{len(lines)} {kind}: {listed(lines)}" for kind, lines in problems.items() if lines]
    if told:
        raise ValueError(
            f"{folder}: the weights do not fit config.json; {'; '.join(told)}."
            " Take weights and config.json from one and the same model"
        )


def listed(lines: Sequence[str], limit: int = 6) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")


def _check_tied(head: _Stored, embedding: _Stored) -> None:
    """transformers sometimes writes a tied model's lm_head; it must then be the embedding."""
    same = head.shape == embedding.shape
    rows_all, block = head.shape[0] if same else 0, 8192  # in blocks: neither is held whole
    for start in range(0, rows_all, block):
        rows = (slice(start, min(start + block, rows_all)),)
        same = same and np.array_equal(_slice(head, rows), _slice(embedding, rows))
    if not same:
        raise ValueError(
            f"{head.file}: config.json ties the embeddings, but {HEAD} differs from {EMBEDDING};"
            " set tie_word_embeddings to false if the model is not tied, or remove the tensor"
        )


def _slice(stored: _Stored, window: tuple[slice, ...]) -> np.ndarray:
    # Opened anew each time: the file is mapped into memory, and closing it gives the pages back.
    with safe_open(stored.file, framework="np") as f:
        return f.get_slice(stored.name)[window]


def _reader(
    sources: Sequence[_Stored], transposed: bool, stacked: bool, shape: tuple[int, ...]
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """A function from an index into our array to that piece of it, float32, read from the files."""
    pieces: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in pieces:  # devices that hold the same piece share one reading
            piece = np.empty([stop - start for start, stop in bounds], np.float32)
            window = tuple(slice(*b) for b in (bounds[1:] if stacked else bounds))
            layers = sources[slice(*bounds[0])] if stacked else sources
            for target, source in zip(piece if stacked else [piece], layers, strict=True):
                target[...] = _slice(source, window[::-1]).T if transposed else _slice(source, window)
            pieces[bounds] = piece
        return pieces[bounds]

    return read
