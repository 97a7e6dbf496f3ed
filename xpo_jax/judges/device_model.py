"""A model on the devices scores token sequences: a few numbers from the last position of each.

`TokenChoiceScorer` gives the log-probabilities of a few tokens that may come next, `RewardScorer` the number that a
reward model (a sequence-classification head) gives. One prefill per batch; logits are computed at one position of
each row, or not at all. Nothing is sampled or decoded. Text and tokenizers belong to the judges (`judges/llm.py`,
`judges/reward.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xpo_jax.models import registry
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime import distributed, sharding
from xpo_jax.runtime.compilation import Program
from xpo_jax.values import Array, Params


class _DeviceModel:
    """A model, its compiled programs, and once they are loaded its weights.

    Args:
      read: (model, head, hidden [B D] of each row's last token) -> f32[B C].
      head: shape of a tensor beside the model's own, or None.
      others: see `TokenChoiceScorer`.
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        model_config: ModelConfig,
        read: Callable[[Any, Array, Array], Array],
        *,
        numbers: int,
        head: tuple[int, int] | None,
        dtype: Any,
        batch_size: int,
        buckets: Sequence[int],
    ):
        self.batch_size, self.buckets, self._numbers = batch_size, tuple(buckets), numbers
        self.weights: Params = None
        self._head: Any = None  # on the devices, whole on each
        self._model_config, self._dtype = model_config, dtype
        graphdef, params = registry.abstract_model(model_config, stacked=False)
        self._shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
        self._head_shape = None if head is None else jax.ShapeDtypeStruct(head, dtype)
        # as the sampler holds its weights, so that a model can serve both
        self._sharding = sharding.shardings(
            mesh, self._shapes, registry.family(model_config).sharding, leave_out=("fsdp",)
        )
        self._whole, rows = sharding.replicated(mesh), sharding.batch(mesh)

        def last(params: Params, head: Any, tokens: Array, lengths: Array) -> Array:
            # split here and not on the way in: every process brings all rows, the same ones
            tokens, lengths = (jax.lax.with_sharding_constraint(x, rows) for x in (tokens, lengths))
            model = nnx.merge(graphdef, params)
            hidden, _ = model.prefill(tokens)
            return read(model, head, jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0])

        whole = self._whole
        self._program = Program(
            name, mesh, last, in_shardings=(self._sharding, whole, whole, whole), out_shardings=whole
        )

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """The compilations: what to show of each, and the call that compiles it."""
        B = self.batch_size
        out: list[tuple[str, Callable[[], object]]] = []
        for P in self.buckets:
            shapes = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((B, P), (B,)))
            compile_it = functools.partial(self._program.compile, self._shapes, self._head_shape, *shapes)
            out.append((f"judge P={P}", compile_it))
        return out

    def __call__(self, asked: Sequence[Sequence[int]]) -> np.ndarray:
        """The numbers f64[n C] of n token sequences.

        A sequence that no bucket holds has nan. Calls go bucket by bucket, so all processes that ask the same
        run the same programs in the same order.
        """
        calls: list[tuple[list[int], Array]] = []
        buckets = [next((P for P in self.buckets if len(tokens) <= P), None) for tokens in asked]
        for P in self.buckets:
            fitting = [i for i, bucket in enumerate(buckets) if bucket == P]
            for start in range(0, len(fitting), self.batch_size):
                chosen = fitting[start : start + self.batch_size]
                tokens = np.zeros((self.batch_size, P), np.int32)
                lengths = np.ones(self.batch_size, np.int32)  # a padding row is one token
                for i, row in enumerate(chosen):
                    lengths[i] = len(asked[row])
                    tokens[i, : lengths[i]] = asked[row]
                calls.append((chosen, self._program(self.weights, self._head, tokens, lengths)))
        out = np.full((len(asked), self._numbers), np.nan)
        for chosen, numbers in calls:
            out[chosen] = np.asarray(jax.device_get(numbers))[: len(chosen)]
        return out


class TokenChoiceScorer(_DeviceModel):
    """Log-probabilities, nats, of a few tokens that a language model may write next.

    Args:
      mesh: see `sharding.make_mesh`.
      model_config: of the model.
      tokens: ids of the C tokens to choose from.
      vocab_size: real tokens; the padded rows beyond have no probability.
      dtype: of all computing but the softmax.
      batch_size: B, rows per call; a part batch is filled up.
      buckets: the widths P that are compiled, ascending.
    """

    def __init__(
        self,
        mesh: Mesh,
        model_config: ModelConfig,
        *,
        tokens: Sequence[int],
        vocab_size: int,
        **shape: Any,
    ):
        wanted = np.array(tokens)

        def logps(model: Any, _: None, last: Array) -> Array:
            logits = model.unembed(last)  # f32[B V]
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
            return jax.nn.log_softmax(logits, axis=-1)[:, wanted]

        super().__init__("choices", mesh, model_config, logps, numbers=len(tokens), head=None, **shape)

    def load(self, folder: Path) -> None:
        """Read the weights of a Hugging Face folder."""
        self.weights = model_folder.load_weights(
            folder, self._model_config, dtype=self._dtype, shardings=self._sharding
        )


class RewardScorer(_DeviceModel):
    """One score per sequence: a sequence classifier of the model's family with a single label.

    Args: as `TokenChoiceScorer` has them; model_config is of the backbone (no lm_head).
    """

    def __init__(self, mesh: Mesh, model_config: ModelConfig, **shape: Any):
        def score(_: Any, head: Array, last: Array) -> Array:
            return jnp.einsum("bd,cd->bc", last, head, preferred_element_type=jnp.float32)

        self._head_name = registry.family(model_config).reward_head
        self._head_size = (1, model_config.hidden_size)
        super().__init__("scores", mesh, model_config, score, numbers=1, head=self._head_size, **shape)

    def load(self, folder: Path) -> None:
        """Read the weights of a Hugging Face folder, the head's too."""
        self.weights = model_folder.load_weights(
            folder,
            self._model_config,
            dtype=self._dtype,
            shardings=self._sharding,
            head={self._head_name: self._head_size},
        )
        head = model_folder.load_head(folder, self._model_config, self._head_name, self._head_size).astype(
            self._dtype
        )
        self._head = distributed.put(head, self._whole)
