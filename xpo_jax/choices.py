"""Which of a few tokens a model would write next: their log-probabilities after given token sequences.

One prefill per batch, and the vocabulary is met at one position of each row. Nothing is sampled and nothing is
decoded. Text and tokenizers are the business of who asks (`judges/llm.py`).
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

from xpo_jax import hf, sharding
from xpo_jax.compilation import Program
from xpo_jax.models import qwen2
from xpo_jax.values import Array, Params


class Choices:
    """A model, its compiled programs, and once they are loaded its weights.

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
        model_config: qwen2.Qwen2Config,
        *,
        tokens: Sequence[int],
        vocab_size: int,
        dtype: Any,
        batch_size: int,
        buckets: Sequence[int],
    ):
        self.batch_size, self.buckets, self.choices = batch_size, tuple(buckets), len(tokens)
        self.weights: Params = None
        self._model_config, self._dtype, wanted = model_config, dtype, np.array(tokens)
        graphdef, abstract = nnx.split(
            nnx.eval_shape(lambda: qwen2.Qwen2(model_config, rngs=nnx.Rngs(0), stacked=False))
        )
        self._shapes = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, dtype), nnx.to_pure_dict(abstract)
        )
        # as the sampler holds its weights, so that a model can serve both
        self._sharding = sharding.shardings(mesh, self._shapes, qwen2.SHARDING, leave_out=("fsdp",))
        whole, rows = sharding.replicated(mesh), sharding.batch(mesh)

        def logps(params: Params, tokens: Array, lengths: Array) -> Array:
            # split here and not on the way in: every process brings all rows, the same ones
            tokens, lengths = (jax.lax.with_sharding_constraint(x, rows) for x in (tokens, lengths))
            model = nnx.merge(graphdef, params)
            hidden, _ = model.prefill(tokens)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
            logits = model.unembed(last)  # f32[B V]
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
            return jax.nn.log_softmax(logits, axis=-1)[:, wanted]

        self._logps = Program(
            "choices", mesh, logps, in_shardings=(self._sharding, whole, whole), out_shardings=whole
        )

    def announced(self) -> list[tuple[str, Callable[[], object]]]:
        """The compilations: what to show of each, and the call that compiles it."""
        B = self.batch_size
        out: list[tuple[str, Callable[[], object]]] = []
        for P in self.buckets:
            args = self._shapes, *(jax.ShapeDtypeStruct(shape, np.int32) for shape in ((B, P), (B,)))
            out.append((f"judge P={P}", functools.partial(self._logps.compile, *args)))
        return out

    def load(self, folder: Path) -> None:
        """Read the weights of a Hugging Face folder."""
        self.weights = hf.load_weights(
            folder, self._model_config, dtype=self._dtype, shardings=self._sharding
        )

    def __call__(self, asked: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probabilities f64[n C], nats, of the choices after each of n token sequences.

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
                lengths = np.ones(self.batch_size, np.int32)  # a row that is not real is one token
                for i, row in enumerate(chosen):
                    lengths[i] = len(asked[row])
                    tokens[i, : lengths[i]] = asked[row]
                calls.append((chosen, self._logps(self.weights, tokens, lengths)))
        out = np.full((len(asked), self.choices), np.nan)
        for chosen, logps in calls:
            out[chosen] = np.asarray(jax.device_get(logps))[: len(chosen)]
        return out
