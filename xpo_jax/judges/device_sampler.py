"""Let a model on the devices write answers to token sequences, with the run's own sampler (algorithm/sampler.py).

Every sequence brings its own random key, so what is drawn for it does not depend on the others in its batch. Text and
tokenizers belong to the judge (`reasoning.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from xpo_jax.algorithm.sampler import make_sampler
from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.judges.device_model import DeviceModel
from xpo_jax.models.family import ModelConfig
from xpo_jax.runtime.compilation import Program
from xpo_jax.values import Array, Params, Samples


class Completion(NamedTuple):
    """What the model wrote: token ids, the end token included, and whether it ended by itself."""

    tokens: list[int]
    finished: bool


class CompletionSampler(DeviceModel):
    """Samples the continuation of token sequences.

    Args:
      mesh, model_config, options: see `DeviceModel`.
      sampling: how tokens are drawn, and how many at most.
      vocab_size, end_tokens, pad_token: see `make_sampler`.

    Raises:
      ValueError: the last bucket and the new tokens exceed the model's positions.
    """

    def __init__(
        self,
        mesh: Mesh,
        model_config: ModelConfig,
        *,
        sampling: Sampling,
        vocab_size: int,
        end_tokens: tuple[int, ...],
        pad_token: int,
        **options: Any,
    ):
        super().__init__(mesh, model_config, new_tokens=sampling.max_new_tokens, **options)
        sampler = make_sampler(
            self._graphdef, sampling, vocab_size=vocab_size, end_tokens=end_tokens, pad_token=pad_token
        )

        def sample(params: Params, tokens: Array, lengths: Array, valid: Array, words: Array) -> Samples:
            tokens, lengths, valid = (self._by_rows(x) for x in (tokens, lengths, valid))
            keys = jax.vmap(lambda w: jax.random.fold_in(jax.random.key(w[0]), w[1]))(self._by_rows(words))
            return sampler(params, tokens, lengths, valid, keys)

        replicated = self._replicated
        self._program = Program(
            "judge",
            mesh,
            sample,
            in_shardings=(self._sharding, *[replicated] * 4),
            out_shardings=replicated,
        )

    def _compile(self, P: int) -> object:
        B = self.batch_size
        shapes = [((B, P), np.int32), ((B,), np.int32), ((B,), np.bool_), ((B, 2), np.uint32)]
        return self._program.compile(self._shapes, *[jax.ShapeDtypeStruct(*shape) for shape in shapes])

    def __call__(self, sequences: Sequence[Sequence[int]], words: Sequence[np.ndarray]) -> list[Completion]:
        """Return one completion for each sequence; see `DeviceModel.batches` for the order of the calls.

        Args:
          sequences: token ids, none longer than the last bucket.
          words: u32[2] for each sequence, from which its random key is made.
        """
        results: list[tuple[list[int], Samples]] = []
        for rows, tokens, lengths in self.batches(sequences):
            drawn = np.zeros((self.batch_size, 2), np.uint32)
            drawn[: len(rows)] = [words[row] for row in rows]
            valid = np.arange(self.batch_size) < len(rows)
            results.append((rows, self._program(self.weights, tokens, lengths, valid, drawn)))
        completions = [Completion([], False)] * len(sequences)
        for rows, result in results:
            samples = jax.device_get(result)
            for i, row in enumerate(rows):
                written = samples.tokens[i, : samples.lengths[i]].tolist()
                completions[row] = Completion(written, bool(samples.finished[i]))
        return completions
