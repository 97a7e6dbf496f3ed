"""Log-probabilities of responses under a model: prompts encoded once for all candidates, logits only where
a response token is predicted, in chunks of tokens. No array of shape [B T V] exists.

They are those of the distribution that was sampled: logits / temperature over the tokenizer's real ids,
log-softmax and sums in float32. Truncation (top-p and the like) is left out on purpose, see DESIGN: with
it switched on, log-probabilities still come from the full softmax.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from xpo_jax.values import Array, Params


class LogPs(NamedTuple):
    """Log-probabilities in nats.

    logps: f32[S B], summed over each response's tokens up to and including the first end token.
    entropy: f32[S B], the entropy over the whole vocabulary, summed over the same tokens.
    """

    logps: Array
    entropy: Array


def response_logps(
    graphdef: Any,
    params: Params,
    prompt_tokens: Array,
    prompt_lengths: Array,
    tokens: Array,
    lengths: Array,
    *,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
) -> LogPs:
    """Score S responses per prompt.

    Args:
      graphdef, params: the model, in either layout.
      prompt_tokens: i32[B P], right-padded. prompt_lengths: i32[B].
      tokens: i32[S B T], right-padded. lengths: i32[S B]; tokens from there on have no influence.
      temperature: of the sampling; 0 (greedy) has no distribution and is scored at 1.
      vocab_size: real tokens.
      chunk_tokens: about how many tokens' logits exist at a time.
    """
    model = nnx.merge(graphdef, params)
    hidden, caches = model.prefill(prompt_tokens)
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)
    tokens = tokens.swapaxes(0, 1)  # the model wants the batch in front, where it is sharded
    B, S, T = tokens.shape
    if T > 1:
        hidden = model.respond(tokens[..., :-1], prompt_lengths, caches)
        hidden = jnp.concatenate([jnp.broadcast_to(last[:, None], (B, S, 1, last.shape[-1])), hidden], axis=2)
    else:
        hidden = jnp.broadcast_to(last[:, None], (B, S, 1, last.shape[-1]))
    counted = jnp.arange(T) < lengths.T[..., None]

    def chunk(carry: Any, inputs: tuple[Array, Array, Array]) -> tuple[Any, LogPs]:
        hidden, targets, counted = inputs
        with jax.named_scope("logits"):
            logits = model.unembed(hidden) / (temperature or 1.0)
            # finite, so that 0 * log 0 of a masked token is 0 in the entropy and in its gradient
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -1e30)
            all_logps = jax.nn.log_softmax(logits, axis=-1)
            logps = jnp.take_along_axis(all_logps, targets[..., None], axis=-1)[..., 0]
            entropy = -jnp.sum(jnp.exp(all_logps) * all_logps, axis=-1)
        # where, not times: a padding token's log-probability may be anything
        return carry, LogPs(jnp.where(counted, logps, 0.0), jnp.where(counted, entropy, 0.0))

    # Chunks along time keep every device's share of the batch in every chunk.
    width = next(w for w in range(min(T, max(1, chunk_tokens // (B * S))), 0, -1) if T % w == 0)
    split = lambda x: jnp.moveaxis(x.reshape(B, S, T // width, width, *x.shape[3:]), 2, 0)  # noqa: E731
    # checkpoint: the backward pass computes a chunk's logits again instead of keeping all of them
    _, out = jax.lax.scan(jax.checkpoint(chunk), None, (split(hidden), split(tokens), split(counted)))
    return LogPs(*(x.sum(axis=(0, -1)).T for x in out))
