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

from xpo_jax.models.layers import wide
from xpo_jax.packing import Packed
from xpo_jax.values import Array, Params


class LogPs(NamedTuple):
    """Log-probabilities in nats.

    logps: f32[S B], summed over each response's tokens up to and including the first end token.
    entropy: f32[S B], the entropy over the whole vocabulary, summed over the same tokens.
    """

    logps: Array
    entropy: Array


def packed_logps(
    graphdef: Any,
    params: Params,
    packed: Packed,
    places: int,
    *,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
    entropy_gradient: bool = True,
) -> LogPs:
    """Score the responses of one micro-batch.

    Args:
      graphdef, params: the model, in either layout.
      packed: the micro-batch. places: Q, its places for results on each device.
      temperature: of the sampling; 0 (greedy) has no distribution and is scored at 1.
      vocab_size: real tokens.
      chunk_tokens: about how many tokens' logits exist at a time; chunks that hold no token are not computed.
      entropy_gradient: False where nothing is learned from the entropy; its backward pass is then left out.

    Returns:
      Sums f32[N Q], 0 in the places that no response has.
    """
    model = nnx.merge(graphdef, params)
    hidden = model.packed(packed.tokens, packed.positions, packed.part, packed.prompt)
    N, U = packed.source.shape
    width = min(U, max(1, chunk_tokens // N))  # chunks along U keep every device's share in every chunk
    parts = -(-U // width)
    padded = lambda x, empty: jnp.pad(x, ((0, 0), (0, parts * width - U)), constant_values=empty)  # noqa: E731
    hidden = jnp.take_along_axis(
        hidden.reshape(N, -1, hidden.shape[-1]), padded(packed.source, 0)[..., None], axis=1
    )
    split = lambda x: jnp.moveaxis(x.reshape(N, parts, width, *x.shape[2:]), 1, 0)  # noqa: E731
    response = padded(packed.response, -1)

    def token_logps(hidden: Array, targets: Array, counted: Array) -> LogPs:
        with jax.named_scope("logits"):
            logits = model.unembed(hidden) / (temperature or 1.0)
            # finite, so that 0 * log 0 of a masked token is 0 in the entropy and in its gradient
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -1e30)
            all_logps = jax.nn.log_softmax(logits, axis=-1)
            logps = jnp.take_along_axis(all_logps, targets[..., None], axis=-1)[..., 0]
            if not entropy_gradient:
                all_logps = jax.lax.stop_gradient(all_logps)
            entropy = -jnp.sum(jnp.exp(all_logps) * all_logps, axis=-1)
        # where, not times: what stands in an empty place may be anything
        return LogPs(jnp.where(counted, logps, 0.0), jnp.where(counted, entropy, 0.0))

    def chunk(carry: Any, inputs: tuple[Array, ...]) -> tuple[Any, LogPs]:
        hidden, targets, counted, used = inputs
        nothing = jnp.zeros((N, width), wide(hidden.dtype))
        return carry, jax.lax.cond(
            used, token_logps, lambda *_: LogPs(nothing, nothing), hidden, targets, counted
        )

    counted = split(response >= 0)
    inputs = (split(hidden), split(padded(packed.target, 0)), counted, counted.any((1, 2)))
    # checkpoint: the backward pass computes a chunk's logits again instead of keeping all of them
    _, found = jax.lax.scan(jax.checkpoint(chunk), None, inputs)
    at = jnp.where(response < 0, places, response)
    add = jax.vmap(lambda at, x: jnp.zeros(places, x.dtype).at[at].add(x, mode="drop"))
    return LogPs(*(add(at, jnp.moveaxis(x, 0, 1).reshape(N, -1)) for x in found))


def response_logps(
    graphdef: Any,
    params: Params,
    prompt_tokens: Array,
    prompt_lengths: Array,
    tokens: Array,
    lengths: Array,
    **options: Any,
) -> LogPs:
    """Score S responses per prompt where nothing is packed: a row for each prompt, laid out by the device.

    Args:
      graphdef, params: the model, in either layout.
      prompt_tokens: i32[B P], right-padded. prompt_lengths: i32[B].
      tokens: i32[S B T], right-padded. lengths: i32[S B]; tokens from there on have no influence.
      options: as of `packed_logps`.
    """
    (B, P), (S, _, T) = prompt_tokens.shape, tokens.shape
    tokens, counted = tokens.swapaxes(0, 1), jnp.arange(T) < lengths.T[..., None]
    fed = T - 1  # the first token needs only the prompt, the last is never read
    lead = jnp.arange(P) < prompt_lengths[:, None]
    joined = lambda of_prompt, of_responses: jnp.concatenate(  # noqa: E731
        [jnp.broadcast_to(of_prompt, (B, P)), jnp.broadcast_to(of_responses, (B, S, fed)).reshape(B, -1)],
        axis=1,
    ).astype(jnp.int32)
    numbers = jnp.arange(S)[:, None]
    ends = (prompt_lengths - 1)[:, None, None]
    source = jnp.where(jnp.arange(T) == 0, ends, P + numbers * fed + jnp.arange(T) - 1)
    packed = Packed(
        joined(prompt_tokens, tokens[..., :-1]),
        joined(jnp.arange(P), prompt_lengths[:, None, None] + jnp.arange(fed)),
        joined(jnp.where(lead, 0, -1), jnp.where(counted[..., 1:], 1 + numbers, -1)),
        joined(jnp.where(lead, 0, -1), jnp.where(counted[..., 1:], 0, -1)),
        *(
            jnp.broadcast_to(x, (B, S, T)).reshape(B, S * T).astype(jnp.int32)
            for x in (source, tokens, jnp.where(counted, numbers, -1))
        ),
    )
    scored = packed_logps(graphdef, params, packed, S, **options)
    return LogPs(scored.logps.T, scored.entropy.T)
