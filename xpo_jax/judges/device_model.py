"""Score token sequences with a model on the devices: a few numbers, computed at the last position of each.

`TokenChoiceScorer` returns the log-probabilities of a few tokens that may come next, `RewardScorer` the reward of a
sequence-classification model. A batch takes one prefill. Logits are computed at one position of each row, or not at
all. Nothing is sampled or decoded here (`device_sampler.py` does). Text and tokenizers belong to the judges (`llm.py`,
`reward.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xpo_jax.models import attention_kernels, registry
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime import distributed, sharding
from xpo_jax.runtime.compilation import Program
from xpo_jax.values import Array, Params


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError unless the mesh divides the rows of a call evenly."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise ValueError(
            f"judge.batch_size {batch_size} is not divisible by mesh.data x mesh.fsdp = {shards}"
        )


class DeviceModel:
    """A model on a mesh, its buckets and, once they are loaded, its weights; subclasses make and call programs.

    Args:
      mesh: see `sharding.make_mesh`.
      model_config: of the model.
      dtype: of all computation but the softmax.
      batch_size: B, rows per call; partial batches are padded.
      buckets: the sequence lengths P to compile for, increasing.
      new_tokens: that follow a sequence, at most.

    Raises:
      ValueError: the last bucket, with the new tokens, exceeds the model's positions.
    """

    def __init__(
        self,
        mesh: Mesh,
        model_config: ModelConfig,
        *,
        dtype: Any,
        batch_size: int,
        buckets: Sequence[int],
        new_tokens: int = 0,
    ):
        if buckets[-1] + new_tokens > model_config.max_position_embeddings:
            beside = f" and {new_tokens} new ones follow" if new_tokens else ""
            raise ValueError(
                f"judge.buckets: the last holds {buckets[-1]} tokens{beside}, but the judge's model has only"
                f" {model_config.max_position_embeddings} positions; lower it"
            )
        self.batch_size, self.buckets = batch_size, tuple(buckets)
        self.weights: Params = None
        self._model_config, self._dtype = model_config, dtype
        kernels = attention_kernels.choose_for(
            attention_kernels.AUTO, mesh.devices.flat[0], dtype=dtype, head_dim=model_config.head_dim
        )
        self._graphdef, params = registry.abstract_model(model_config, stacked=False, kernels=kernels)
        self._shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
        # the sampler's layout, so that it can share its weights
        self._sharding = sharding.shardings(
            mesh, self._shapes, registry.family(model_config).sharding, leave_out=("fsdp",)
        )
        self._replicated, self._rows = sharding.replicated(mesh), sharding.batch(mesh)

    def _by_rows(self, x: Array) -> Array:
        """Shard rows, inside a program: they arrive replicated, since every process passes all of them."""
        return jax.lax.with_sharding_constraint(x, self._rows)

    def _compile(self, P: int) -> object:
        """Compile for a bucket."""
        raise NotImplementedError

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """Return a label and a compile function for each bucket."""
        return [(f"judge P={P}", functools.partial(self._compile, P)) for P in self.buckets]

    def load(self, folder: Path) -> None:
        """Read the weights of a Hugging Face folder."""
        self.weights = model_folder.load_weights(
            folder, self._model_config, dtype=self._dtype, shardings=self._sharding
        )

    def batches(
        self, sequences: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yield the rows of each batch, and their tokens i32[B P], right-padded, with lengths i32[B].

        They come bucket by bucket, so processes that pass the same sequences run the same programs in the same order.
        A sequence longer than the last bucket is in no batch.
        """
        buckets = [next((P for P in self.buckets if len(tokens) <= P), None) for tokens in sequences]
        for P in self.buckets:
            in_bucket = [i for i, bucket in enumerate(buckets) if bucket == P]
            for start in range(0, len(in_bucket), self.batch_size):
                rows = in_bucket[start : start + self.batch_size]
                tokens = np.zeros((self.batch_size, P), np.int32)
                lengths = np.ones(self.batch_size, np.int32)  # a padding row is one token
                for i, row in enumerate(rows):
                    lengths[i] = len(sequences[row])
                    tokens[i, : lengths[i]] = sequences[row]
                yield rows, tokens, lengths


class _Readout(NamedTuple):
    """How the numbers are computed.

    name: of the program.
    size: C, numbers per sequence.
    head: shape of a tensor besides the model's own, or None.
    compute: (model, head, hidden [B D] at the last position of each row) -> f32[B C].
    """

    name: str
    size: int
    head: tuple[int, int] | None
    compute: Callable[[Any, Array, Array], Array]


class _Scorer(DeviceModel):
    """A model of which a few numbers at the last position of each sequence are read.

    Args:
      mesh, model_config, options: see `DeviceModel`.
      readout: what is computed from the hidden states.
    """

    def __init__(self, mesh: Mesh, model_config: ModelConfig, readout: _Readout, **options: Any):
        super().__init__(mesh, model_config, **options)
        self._size, graphdef = readout.size, self._graphdef
        self._head: Any = None  # replicated
        self._head_shape = None if readout.head is None else jax.ShapeDtypeStruct(readout.head, self._dtype)

        def last(params: Params, head: Any, tokens: Array, lengths: Array) -> Array:
            tokens, lengths = self._by_rows(tokens), self._by_rows(lengths)
            model = nnx.merge(graphdef, params)
            hidden, _ = model.prefill(tokens)
            at_end = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
            return readout.compute(model, head, at_end)

        replicated = self._replicated
        self._program = Program(
            readout.name,
            mesh,
            last,
            in_shardings=(self._sharding, replicated, replicated, replicated),
            out_shardings=replicated,
        )

    def _compile(self, P: int) -> object:
        shapes = (
            jax.ShapeDtypeStruct(shape, np.int32) for shape in ((self.batch_size, P), (self.batch_size,))
        )
        return self._program.compile(self._shapes, self._head_shape, *shapes)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the numbers, f64[n C], of n token sequences; nan for a sequence longer than the last bucket.

        See `DeviceModel.batches` for the order of the calls.
        """
        results = [
            (rows, self._program(self.weights, self._head, tokens, lengths))
            for rows, tokens, lengths in self.batches(sequences)
        ]
        numbers = np.full((len(sequences), self._size), np.nan)
        for rows, result in results:
            numbers[rows] = np.asarray(jax.device_get(result))[: len(rows)]
        return numbers


class TokenChoiceScorer(_Scorer):
    """Computes the log-probabilities, nats, of C given tokens to follow each sequence.

    Args:
      mesh, model_config, options: see `DeviceModel`.
      tokens: ids of the C tokens.
      vocab_size: of the tokenizer; the padding beyond it has no probability.
    """

    def __init__(
        self,
        mesh: Mesh,
        model_config: ModelConfig,
        *,
        tokens: Sequence[int],
        vocab_size: int,
        **options: Any,
    ):
        ids = np.array(tokens)

        def logps(model: Any, _: None, hidden: Array) -> Array:
            logits = model.unembed(hidden)  # f32[B V]
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
            return jax.nn.log_softmax(logits, axis=-1)[:, ids]

        super().__init__(mesh, model_config, _Readout("choices", len(tokens), None, logps), **options)


class RewardScorer(_Scorer):
    """Computes the reward of each sequence with a sequence-classification model of a single label.

    Args:
      mesh, options: see `DeviceModel`.
      model_config: of the model without its head (no lm_head).
    """

    def __init__(self, mesh: Mesh, model_config: ModelConfig, **options: Any):
        def reward(_: Any, head: Array, hidden: Array) -> Array:
            return jnp.einsum("bd,cd->bc", hidden, head, preferred_element_type=jnp.float32)

        self._head_name = registry.family(model_config).reward_head
        self._head_size = (1, model_config.hidden_size)
        super().__init__(mesh, model_config, _Readout("scores", 1, self._head_size, reward), **options)

    def load(self, folder: Path) -> None:
        """Read the weights of a Hugging Face folder, including the head."""
        self.weights = model_folder.load_weights(
            folder,
            self._model_config,
            dtype=self._dtype,
            shardings=self._sharding,
            head={self._head_name: self._head_size},
        )
        head = model_folder.load_head(folder, self._model_config, self._head_name, self._head_size)
        self._head = distributed.put(head.astype(self._dtype), self._replicated)
