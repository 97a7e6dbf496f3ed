"""The work of a benchmarked step: its size, response lengths and FLOPs, and a model whose responses have those lengths.

Left out on purpose: response lengths recorded from real use.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tools.planner import estimate, work
from xpo_jax.algorithm.batch_shapes import Auto
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.registry import family

SEED = 0
END = 0  # the token that ends a response


@dataclasses.dataclass(frozen=True)
class Workload:
    """The size of a step.

    Args:
      prompts, prompt_tokens: B, and the tokens of each prompt, P.
      lengths: i[S B], tokens of the responses.
      new_tokens: the most tokens that a response may have, T.
      micro_batch_rows: per device. chunk_tokens, remat, reference_steps: see `settings.Layout`.
    """

    prompts: int
    prompt_tokens: int
    lengths: np.ndarray
    new_tokens: int
    micro_batch_rows: int | Auto
    chunk_tokens: int | Auto
    remat: bool
    reference_steps: int = 1


def response_lengths(kind: str, B: int, T: int) -> np.ndarray:
    """Return i64[S B]: all T ("fixed"), or drawn with mean 40 and a long tail, at most T ("lognormal")."""
    if kind == "fixed":
        return np.full((estimate.CANDIDATES, B), T)
    sigma = 0.6
    drawn = np.random.default_rng(SEED).lognormal(np.log(40) - sigma**2 / 2, sigma, (estimate.CANDIDATES, B))
    return np.clip(np.rint(drawn), 2, T).astype(np.int64)


def part_flops(model: ModelConfig, P: int, lengths: np.ndarray) -> dict[str, int]:
    """Return the model FLOPs of a step's parts for responses of lengths i[S B]; `work.flops` if all are equal.

    Prefill and decode are those of both candidates.
    """
    S, B = lengths.shape
    last, total = lengths - 1, int(lengths.sum())  # the first token needs only the prompt
    fed = int(last.sum())
    prefill = work.forward_flops(model, S * B * P, S * B * P * P, S * B)
    decode = work.forward_flops(model, fed, int((last * (P + lengths)).sum()), fed)
    pairs = B * P * P + int((last * (P + last)).sum())
    score = work.forward_flops(model, B * P + fed, pairs, total)
    return {"prefill": prefill, "decode": decode, "score": score, "accumulate": 3 * score}


class Ending(nnx.Module):
    """A model whose rows end at prescribed lengths: only there is the end token possible, and nothing else is.

    Hidden states carry one more feature: whether the next token is the row's last. The length of each row is stored
    beside its prompt's keys and values, which stay with the row when the sampler moves it.
    """

    def __init__(self, config: ModelConfig, B: int):
        self.config, self.model = config, family(config).module(config, rngs=nnx.Rngs(0), stacked=False)
        self.lengths = nnx.Param(jnp.zeros(B, jnp.int32))

    def prefill(self, tokens: Any) -> Any:
        """Run the model's prefill with the feature off: no response is shorter than two tokens."""
        hidden, caches = self.model.prefill(tokens)
        return jnp.pad(hidden, ((0, 0), (0, 0), (0, 1))), (caches, self.lengths[...])

    def decode(self, token: Any, t: Any, prompt_lengths: Any, prompt_caches: Any, caches: Any) -> Any:
        """Run the model's decode step; the token drawn from its result is number t + 1."""
        prompt_caches, lengths = prompt_caches
        hidden, caches = self.model.decode(token, t, prompt_lengths, prompt_caches, caches)
        ends = (lengths == t + 2).astype(hidden.dtype)
        return jnp.concatenate([hidden, ends[:, None]], axis=1), caches

    def empty_caches(self, B: int, T: int) -> Any:
        """Return the model's empty caches."""
        return self.model.empty_caches(B, T)

    def unembed(self, hidden: Any) -> Any:
        """Return the model's logits, masked to the end token alone or to everything else."""
        logits = self.model.unembed(hidden[:, :-1])
        return jnp.where((jnp.arange(logits.shape[-1]) == END) == (hidden[:, -1:] > 0), logits, -jnp.inf)
