"""Log-probabilities of responses under a model: prompts encoded once for all candidates, logits only where
a response token is predicted, in chunks of tokens. No array of shape [B T V] exists.

They are those of the distribution that was sampled: logits / temperature over the tokenizer's real ids,
log-softmax and sums in float32. Truncation (top-p and the like) is left out on purpose, see DESIGN: with
it switched on, log-probabilities still come from the full softmax.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from xpo_jax.algorithm.packing import Packed
from xpo_jax.models.layers import wide
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
      chunk_tokens: so many tokens' logits exist at a time, at most; chunks that hold no token are not computed.
      entropy_gradient: False where nothing is learned from the entropy; its backward pass is then left out.

    Returns:
      Sums f32[N Q], 0 in the places that no response has.
    """
    model = nnx.merge(graphdef, params)
    hidden = model.packed(packed.tokens, packed.positions, packed.part, packed.prompt)
    N, U = packed.source.shape
    # Chunks along U keep every device's share in every chunk; four at least, for an empty one costs nothing.
    width = min(max(1, chunk_tokens // N), -(-U // 4))
    padded = lambda x, empty: jnp.pad(x, ((0, 0), (0, -U % width)), constant_values=empty)  # noqa: E731
    hidden = jnp.take_along_axis(
        hidden.reshape(N, -1, hidden.shape[-1]), padded(packed.source, 0)[..., None], axis=1
    )
    response = padded(packed.response, -1)
    last = jnp.max(jnp.where(response >= 0, jnp.arange(1, response.shape[1] + 1), 0))

    head = _Head(temperature or 1.0, vocab_size, width, entropy_gradient)
    targets, turns = padded(packed.target, 0), -(-last // width)
    logps, entropy = _token_logps(head, hidden, model.unembedding(), targets, turns)
    at = jnp.where(response < 0, places, response)  # nowhere, whatever stands in an empty place
    add = jax.vmap(lambda at, x: jnp.zeros(places, x.dtype).at[at].add(x, mode="drop"))
    return LogPs(add(at, logps), add(at, entropy))


class _Head(NamedTuple):
    """How logits [N width V] are computed of hidden [N U D] and a table [V D], a part of U at a time."""

    temperature: float
    vocab_size: int
    width: int
    entropy_gradient: bool

    def part(self, x: Array, number: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, number * self.width, self.width, axis=1)

    def write(self, x: Array, new: Array, number: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), number * self.width, axis=1)

    def logits(self, hidden: Array, table: Array) -> Array:
        found = jnp.einsum("nud,vd->nuv", hidden, table, preferred_element_type=wide(hidden.dtype))
        # finite, so that 0 * log 0 of a masked token is 0 in the entropy and in its gradient
        return jnp.where(jnp.arange(len(table)) < self.vocab_size, found / self.temperature, -1e30)


# Its own gradient: that of a scan keeps what all parts compute, or computes all of them in full again, and there is
# none of a loop that ends with the tokens.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logps(
    head: _Head, hidden: Array, table: Array, targets: Array, turns: Array
) -> tuple[Array, Array]:
    """Log-probability of each target i32[N U] and entropy there, f32[N U]; 0 from part number `turns` on."""
    return _forward(head, hidden, table, targets, turns)[0]


def _forward(head: _Head, hidden: Array, table: Array, targets: Array, turns: Array) -> Any:
    def turn(number: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        with jax.named_scope("logits"):
            logits = head.logits(head.part(hidden, number), table)
            total = jax.nn.logsumexp(logits, axis=-1)
            drawn = jnp.take_along_axis(logits, head.part(targets, number)[..., None], axis=-1)[..., 0]
            all_logps = logits - total[..., None]
            entropy = -jnp.sum(jnp.exp(all_logps) * all_logps, axis=-1)
        new = (drawn - total, entropy, total)
        return tuple(head.write(x, y, number) for x, y in zip(found, new, strict=True))

    nothing = jnp.zeros(targets.shape, wide(hidden.dtype))
    logps, entropy, total = jax.lax.fori_loop(0, turns, turn, (nothing,) * 3)
    return (logps, entropy), (hidden, table, targets, turns, entropy, total)


def _backward(head: _Head, kept: Any, to: tuple[Array, Array]) -> Any:
    hidden, table, targets, turns, entropy, total = kept

    def turn(number: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        of = lambda x: head.part(x, number)[..., None]  # noqa: E731
        with jax.named_scope("logits"):
            some = head.part(hidden, number)
            all_logps = head.logits(some, table) - of(total)
            probs = jnp.exp(all_logps)
            to_logits = of(to[0]) * ((jnp.arange(len(table)) == of(targets)) - probs)
            if head.entropy_gradient:
                to_logits -= of(to[1]) * probs * (all_logps + of(entropy))
            to_logits = (to_logits / head.temperature).astype(hidden.dtype)
            to_hidden = jnp.einsum("nuv,vd->nud", to_logits, table)
            # [D V], which takes a CPU half as long as [V D]
            to_table = jnp.einsum("nud,nuv->dv", some, to_logits)
        return head.write(found[0], to_hidden, number), found[1] + to_table

    nothing = jnp.zeros_like(hidden), jnp.zeros_like(table, shape=table.shape[::-1])
    to_hidden, to_table = jax.lax.fori_loop(0, turns, turn, nothing)
    return to_hidden, to_table.T, None, None


_token_logps.defvjp(_forward, _backward)


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
