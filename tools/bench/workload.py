"""What tools.bench gives a step to do: lengths of responses, the FLOPs that they take, and a model that keeps to them.

Left out on purpose: lengths of anybody's real responses.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tools.planner import estimate
from xpo_jax.models import qwen2

SEED = 0
END = 0  # the token that ends a response of a given length


def response_lengths(kind: str, B: int, T: int) -> np.ndarray:
    """i32[S B]: all T ("fixed"), or drawn with mean 40 and a long tail, at most T ("lognormal")."""
    if kind == "fixed":
        return np.full((estimate.CANDIDATES, B), T)
    sigma = 0.6
    drawn = np.random.default_rng(SEED).lognormal(np.log(40) - sigma**2 / 2, sigma, (estimate.CANDIDATES, B))
    return np.clip(np.rint(drawn), 2, T).astype(np.int64)


def work(model: qwen2.Qwen2Config, P: int, lengths: np.ndarray) -> dict[str, int]:
    """Model FLOPs of a step's parts for responses of these lengths i[S B]; `estimate.flops` where all are equal.

    Prefill and decode are of both candidates together.
    """
    S, B = lengths.shape
    last, total = lengths - 1, int(lengths.sum())  # the first token needs only the prompt
    fed = int(last.sum())
    prefill = estimate.forward_flops(model, S * B * P, S * B * P * P, S * B)
    decode = estimate.forward_flops(model, fed, int((last * (P + lengths)).sum()), fed)
    pairs = B * P * P + int((last * (P + last)).sum())
    score = estimate.forward_flops(model, B * P + fed, pairs, total)
    return {"prefill": prefill, "decode": decode, "score": score, "accumulate": 3 * score}


class Ending(nnx.Module):
    """A model whose rows end where they are told to, and nowhere else: the end token is the only one there.

    Hidden states carry one more feature, whether the next token is the row's last. How long each row is to become
    stands beside its prompt's keys and values, which stay with the row where the sampler moves it.
    """

    def __init__(self, config: qwen2.Qwen2Config, B: int):
        self.config, self.model = config, qwen2.Qwen2(config, rngs=nnx.Rngs(0), stacked=False)
        self.lengths = nnx.Param(jnp.zeros(B, jnp.int32))

    def prefill(self, tokens: Any) -> Any:
        """As the model, with the feature off: no response is shorter than two tokens."""
        hidden, caches = self.model.prefill(tokens)
        return jnp.pad(hidden, ((0, 0), (0, 0), (0, 1))), (caches, self.lengths[...])

    def decode(self, token: Any, t: Any, prompt_lengths: Any, prompt_caches: Any, caches: Any) -> Any:
        """As the model; the token drawn from its result is number t + 1."""
        prompt_caches, lengths = prompt_caches
        hidden, caches = self.model.decode(token, t, prompt_lengths, prompt_caches, caches)
        ends = (lengths == t + 2).astype(hidden.dtype)
        return jnp.concatenate([hidden, ends[:, None]], axis=1), caches

    def empty_caches(self, B: int, T: int) -> Any:
        """The model's."""
        return self.model.empty_caches(B, T)

    def unembed(self, hidden: Any) -> Any:
        """The model's logits, with all ruled out but the end token, or that alone."""
        logits = self.model.unembed(hidden[:, :-1])
        return jnp.where((jnp.arange(logits.shape[-1]) == END) == (hidden[:, -1:] > 0), logits, -jnp.inf)
