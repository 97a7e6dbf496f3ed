"""Samples that were drawn before their step, as a checkpoint keeps them: their policy is gone when a run resumes."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from xpo_jax.values import Prompts, Samples


class EarlySamples(NamedTuple):
    """The samples of a step's prompts: the policy's candidates, and the second one.

    prompts: `fingerprint` of the prompts and the length of a response that they were drawn for.
    """

    step: int
    prompts: str
    samples: tuple[Samples, Samples]

    def encoded(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "step": self.step,
            "prompts": self.prompts,
            "samples": [{name: _encoded(x) for name, x in s._asdict().items()} for s in self.samples],
        }

    @classmethod
    def decoded(cls, value: Mapping[str, Any]) -> Self | None:
        """Return what `encoded` returned; None for {}."""
        if not value:
            return None
        first, second = (
            Samples(**{name: _decoded(x) for name, x in sample.items()}) for sample in value["samples"]
        )
        return cls(value["step"], value["prompts"], (first, second))


def fingerprint(prompts: Prompts, max_new_tokens: int) -> str:
    """Return a hash of the prompts as the policy sees them; tokens beyond a prompt's length do not count."""
    inside = np.arange(prompts.tokens.shape[1]) < np.asarray(prompts.lengths)[:, None]
    digest = hashlib.sha256(f"{max_new_tokens} {len(prompts.valid)} ".encode())
    for array in (np.asarray(prompts.tokens)[inside], prompts.lengths, prompts.valid, prompts.position):
        digest.update(np.asarray(array, np.int32).tobytes())
    return digest.hexdigest()


def _encoded(array: np.ndarray) -> dict[str, Any]:
    array = np.asarray(array)
    data = zlib.compress(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return {"dtype": array.dtype.name, "shape": array.shape, "data": base64.b64encode(data).decode()}


def _decoded(value: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(value["dtype"])
    data = zlib.decompress(base64.b64decode(value["data"]))
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(value["shape"])
