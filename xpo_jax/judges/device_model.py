"""Score token sequences with a model on the devices: a few numbers, computed at the last position of each.

`TokenChoiceScorer` returns the log-probabilities of a few tokens that may come next, `RewardScorer` the reward of a
sequence-classification model. A batch takes one prefill. Logits are computed at one position of each row, or not at
all. Nothing is sampled or decoded. Text and tokenizers belong to the judges (`llm.py`, `reward.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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


class _DeviceModel:
    """A model with its compiled programs and, once they are loaded, its weights.

    Args:
      mesh: see `sharding.make_mesh`.
      model_config: of the model.
      readout: what is computed from the hidden states.
      dtype: of all computation but the softmax.
      batch_size: B, rows per call; partial batches are padded.
      buckets: the sequence lengths P to compile for, increasing.
    """

    def __init__(
        self,
        mesh: Mesh,
        model_config: ModelConfig,
        readout: _Readout,
        *,
        dtype: Any,
        batch_size: int,
        buckets: Sequence[int],
    ):
        if buckets[-1] > model_config.max_position_embeddings:
            raise ValueError(
                f"judge.buckets: the last holds {buckets[-1]} tokens, but the judge's model has only"
                f" {model_config.max_position_embeddings} positions; lower it"
            )
        self.batch_size, self.buckets, self._size = batch_size, tuple(buckets), readout.size
        self.weights: Params = None
        self._head: Any = None  # replicated
        self._model_config, self._dtype = model_config, dtype
        kernels = attention_kernels.choose_for(
            attention_kernels.AUTO, mesh.devices.flat[0], dtype=dtype, head_dim=model_config.head_dim
        )
        graphdef, params = registry.abstract_model(model_config, stacked=False, kernels=kernels)
        self._shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
        self._head_shape = None if readout.head is None else jax.ShapeDtypeStruct(readout.head, dtype)
        # the sampler's layout, so that it can share its weights
        self._sharding = sharding.shardings(
            mesh, self._shapes, registry.family(model_config).sharding, leave_out=("fsdp",)
        )
        self._replicated, row_sharding = sharding.replicated(mesh), sharding.batch(mesh)

        def last(params: Params, head: Any, tokens: Array, lengths: Array) -> Array:
            # the rows arrive replicated, since every process passes all of them, and are sharded here
            tokens, lengths = (jax.lax.with_sharding_constraint(x, row_sharding) for x in (tokens, lengths))
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

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """Return a label and a compile function for each bucket."""
        B = self.batch_size
        programs: list[tuple[str, Callable[[], object]]] = []
        for P in self.buckets:
            shapes = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((B, P), (B,)))
            compile_it = functools.partial(self._program.compile, self._shapes, self._head_shape, *shapes)
            programs.append((f"judge P={P}", compile_it))
        return programs

    def __call__(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the numbers, f64[n C], of n token sequences; nan for a sequence longer than the last bucket.

        Batches are run bucket by bucket, so processes that pass the same sequences run the same programs in the same
        order.
        """
        batches: list[tuple[list[int], Array]] = []
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
                batches.append((rows, self._program(self.weights, self._head, tokens, lengths)))
        numbers = np.full((len(sequences), self._size), np.nan)
        for rows, result in batches:
            numbers[rows] = np.asarray(jax.device_get(result))[: len(rows)]
        return numbers


class TokenChoiceScorer(_DeviceModel):
    """Computes the log-probabilities, nats, of C given tokens to follow each sequence.

    Args:
      mesh, model_config, options: see `_DeviceModel`.
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

    def load(self, folder: Path) -> None:
        """Read the weights of a Hugging Face folder."""
        self.weights = model_folder.load_weights(
            folder, self._model_config, dtype=self._dtype, shardings=self._sharding
        )


class RewardScorer(_DeviceModel):
    """Computes the reward of each sequence with a sequence-classification model of a single label.

    Args:
      mesh, options: see `_DeviceModel`.
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
