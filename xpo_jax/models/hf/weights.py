"""The numbers of a model, from safetensors files into arrays and back.

They are read from the byte ranges of the files, a block at a time, straight into the shards that need them,
in the dtype they are wanted in; at no time is there a second copy of the model on the host. One table,
`Family.tensors`, serves reading and writing.

Left out on purpose: whether files and config fit each other, which is `tensors.py`'s. What else a Hugging
Face folder holds is `model_folder.py`'s, which is where the rest of the project imports these functions from.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from xpo_jax.models import registry
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf.tensors import (
    INDEX,
    WEIGHTS,
    Stored,
    Tensor,
    checked,
    expected_tensors,
    listed,
    model_folder,
    read_slice,
)
from xpo_jax.models.registry import param_shapes
from xpo_jax.runtime import distributed
from xpo_jax.values import Params

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}  # that we write
Reader = Callable[[tuple[slice, ...] | None], np.ndarray]  # of the piece of an array at an index
BLOCK_BYTES = 2**25  # of a file, mapped at a time: mapped pages count as resident memory


def load_params(folder: str | Path, model_config: ModelConfig, *, shardings: Any = None) -> Params:
    """Read the weights of a Hugging Face folder.

    Args:
      folder: holds model.safetensors, or (if it does not) the shards that model.safetensors.index.json names.
      model_config: what `read_config` made of the same folder.
      shardings: a tree of jax.sharding.Sharding like `param_shapes`; None puts all on the default device,
        uncommitted. A process reads only the byte ranges that its own devices hold.

    Returns:
      The parameters, stacked, as a nested dict of float32 arrays, layers on axis 0.

    Raises:
      ValueError: missing or damaged files; missing, unexpected, duplicate or mis-shaped tensors, all in one
        error; an lm_head.weight of a tied model that is not the embedding.
    """
    return _load(folder, model_config, param_shapes(model_config), shardings)


def load_weights(
    folder: str | Path,
    model_config: ModelConfig,
    *,
    dtype: Any,
    shardings: Any = None,
    head: Mapping[str, tuple[int, ...]] | None = None,
) -> Params:
    """Read the weights of a Hugging Face folder in the form in which they are sampled and scored with.

    Each number is cast when it is read: there is no float32 copy, neither on the host nor on a device.

    Args:
      folder, model_config: as `load_params` has them.
      dtype: of the arrays.
      shardings: a tree of jax.sharding.Sharding like the result, see `Programs.weights_sharding`; None puts
        all on the default device, uncommitted.
      head: see `tensors.checked`; it is not read here.

    Returns:
      The parameters, unstacked, bit for bit what `Programs.for_sampling` makes of `load_params`.

    Raises:
      ValueError: as `load_params` does.
    """
    shapes = jax.eval_shape(registry.family(model_config).unstack, param_shapes(model_config))
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    return _load(folder, model_config, wanted, shardings, head)


def check_params(
    folder: str | Path, model_config: ModelConfig, head: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Raise what `load_params` would, from the headers of the files alone: before a run begins."""
    checked(model_folder(folder), model_config, head)


def load_head(folder: str | Path, model_config: ModelConfig, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor beside the model's own, as float32; checked as `load_weights` does."""
    _, stored = checked(model_folder(folder), model_config, {name: shape})
    return read_slice(stored[name], (slice(None),) * len(shape)).astype(np.float32)


def write_params(
    folder: Path, params: Params, model_config: ModelConfig, *, dtype: str, max_shard_bytes: int
) -> None:
    """Write model.safetensors, or several shards with model.safetensors.index.json, into a folder.

    One stacked array at a time is gathered, for which all processes call this; process 0 writes.

    Args: as `model_folder.save` has them.

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

    tensors = expected_tensors(model_config)
    order = dict.fromkeys(tensor.path for tensor in tensors.values())  # an array's layers follow each other
    with distributed.fetched_to_lead([flat[path] for path in order]) as arrays:
        if distributed.is_lead_process():
            _write_shards(folder, arrays, tensors, dtype, max_shard_bytes)


def _write_shards(
    folder: Path, arrays: Iterator[Any], tensors: Mapping[str, Tensor], dtype: str, max_shard_bytes: int
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
        save_tensors(folder / file, pieces)
    if many > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file of contiguous arrays, as readable as any new file; ValueError if the disk is full."""
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be written ({error}); free space or fix the permissions") from error
    file.chmod(mode)  # safetensors makes its files readable only by their owner


def _load(
    folder: str | Path,
    model_config: ModelConfig,
    wanted: Params,
    shardings: Any,
    head: Mapping[str, tuple[int, ...]] | None = None,
) -> Params:
    """Return arrays like `wanted`, whose layers are stacked on axis 0, or separate under their numbers."""
    where = {} if shardings is None else traverse_util.flatten_dict(shardings)
    loaded = {}
    for path, (leaf, reader) in readers(folder, model_config, wanted, head).items():
        read = reader()
        if shardings is None:
            loaded[path] = jax.device_put(read((slice(None),) * len(leaf.shape)))
        else:
            loaded[path] = jax.make_array_from_callback(leaf.shape, where[path], read)
    return traverse_util.unflatten_dict(loaded)


def readers(
    folder: str | Path,
    model_config: ModelConfig,
    wanted: Params,
    head: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[tuple[str | int, ...], tuple[jax.ShapeDtypeStruct, Callable[[], Reader]]]:
    """Return, by path, each leaf of `wanted` with what makes its `Reader`, which holds the pieces that it has read."""
    expected, stored = checked(model_folder(folder), model_config, head)
    sources: dict[tuple[str | int, ...], list[Stored]] = {}
    transposed = {}
    for name, tensor in expected.items():  # layers in order
        path: tuple[str | int, ...] = tuple(tensor.path.split("."))
        if tensor.layer is not None and tensor.layer in wanted["layers"]:
            path = (path[0], tensor.layer, *path[1:])
        sources.setdefault(path, []).append(stored[name])
        transposed[path] = tensor.transposed
    return {
        path: (leaf, functools.partial(_reader, sources[path], transposed[path], leaf))
        for path, leaf in traverse_util.flatten_dict(wanted).items()
    }


def _reader(sources: Sequence[Stored], transposed: bool, leaf: jax.ShapeDtypeStruct) -> Reader:
    """Make a function that reads the piece of an array at an index from the files, in the array's dtype.

    The array is either the one source or, with an additional axis, the stack of all of them.
    """
    stacked = len(leaf.shape) > len(sources[0].shape)
    pieces: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        if bounds not in pieces:  # devices that hold the same piece share one reading
            piece = np.empty([stop - start for start, stop in bounds], leaf.dtype)
            window = bounds[1:] if stacked else bounds
            layers = sources[slice(*bounds[0])] if stacked else sources
            for target, source in zip(piece if stacked else [piece], layers, strict=True):
                if transposed:
                    _fill(target.T, source, window[::-1])
                else:
                    _fill(target, source, window)
            pieces[bounds] = piece
        return pieces[bounds]

    return read


def _fill(target: np.ndarray, source: Stored, window: Sequence[tuple[int, int]]) -> None:
    """Copy a window of a stored tensor, some rows at a time, casting to the target's dtype."""
    (first, stop), *rest = window
    columns = tuple(slice(*bounds) for bounds in rest)
    rows = max(1, BLOCK_BYTES // (4 * math.prod(source.shape[1:])))  # 4: no dtype that we read is wider
    for start in range(first, stop, rows):
        end = min(start + rows, stop)
        block = read_slice(source, (slice(start, end), *columns))
        if not _is_finite(block):
            raise ValueError(
                f"{source.file}: tensor {source.name} holds a number that is not finite; restore the file, or export"
                " the model again from a checkpoint before its training diverged"
            )
        target[start - first : end - first] = block


# The exponent's bits, which are all set in infinity and nan, of a number as an unsigned integer. Reading these bits is
# several times faster than np.isfinite, which widens a bfloat16.
_EXPONENTS: dict[np.dtype[Any], np.uint16 | np.uint32] = {
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float16): np.uint16(0x7C00),
}


def _is_finite(block: np.ndarray) -> bool:
    exponent = _EXPONENTS[block.dtype]
    return not ((block.view(exponent.dtype) & exponent) == exponent).any()
