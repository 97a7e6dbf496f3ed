"""Log-probabilities of responses under a model: prompts encoded once for all candidates, logits only where
a response token is predicted, in chunks of tokens. No array of shape [B T V] exists.

They are those of the sampled distribution at the sampling temperature: logits / temperature over the tokenizer's real
ids, log-softmax and sums in float32.

Left out on purpose: truncation (top-p and the like). With it, samples come from a truncated distribution, and
log-probabilities still come from the full softmax.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Int

from xpo_jax.algorithm.batch_shapes import Auto
from xpo_jax.algorithm.packing import Packed
from xpo_jax.models.layers import narrow, wide
from xpo_jax.runtime.sharding import ROWS, constrain
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
    results: int,
    *,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
    entropy_gradient: bool = True,
    table_gradient: bool = True,
    split_vocabulary: bool = False,
) -> LogPs:
    """Score the responses of one micro-batch.

    Args:
      graphdef, params: the model, in either layout.
      packed: the micro-batch.
      results: Q, the number of results of each shard.
      temperature: of sampling; 0 (greedy) defines no distribution and is scored at 1.
      vocab_size: number of real tokens.
      chunk_tokens: at most this many tokens' logits exist at a time; chunks without a token are not computed.
      entropy_gradient: False if the loss does not contain the entropy, whose backward pass is then left out.
      table_gradient: False if the table of the logits is not trained.
      split_vocabulary: split a chunk's logits over fsdp by vocabulary instead of by rows, see `splits_vocabulary`.

    Returns:
      Sums f32[G Q], 0 for results that no response has.
    """
    model = nnx.merge(graphdef, params)
    hidden = model.packed(packed.tokens, packed.positions, packed.part, packed.prompt)
    G, U = packed.source.shape
    # Chunks along U leave every shard its part of every chunk. At least four: a chunk without tokens costs nothing.
    width = min(max(1, chunk_tokens // G), -(-U // 4))

    def padded(x: Array, empty: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, -U % width)), constant_values=empty)

    hidden = jnp.take_along_axis(
        hidden.reshape(G, -1, hidden.shape[-1]), padded(packed.source, 0)[..., None], axis=1
    )
    response = padded(packed.response, -1)
    last = jnp.max(jnp.where(response >= 0, jnp.arange(1, response.shape[1] + 1)[None], 0))

    head = _Head(temperature or 1.0, vocab_size, width, entropy_gradient, table_gradient, split_vocabulary)
    targets, chunks = padded(packed.target, 0), -(-last // width)
    table = head.constrain(model.unembedding(), VOCABULARY, None)
    logps, entropy = _token_logps(head, hidden, table, targets, chunks)
    at = jnp.where(response < 0, results, response)  # what an empty slot holds is dropped

    def add(at: Array, x: Array) -> Array:
        return jnp.zeros(results, x.dtype).at[at].add(x, mode="drop")

    return LogPs(jax.vmap(add)(at, logps), jax.vmap(add)(at, entropy))


VOCABULARY = ("tensor", "fsdp")  # the mesh axes that split a vocabulary, where fsdp does not split the rows


def splits_vocabulary(mesh: Mesh | AbstractMesh, vocab_size: int, platform: str) -> bool:
    """Return whether `packed_logps` should split the vocabulary over fsdp.

    Split by rows, every shard needs the complete table, and adds a gradient of the complete table, in float32, to that
    of the others for each chunk. Split by vocabulary, it needs only its part of the table, of which the gradient is its
    own; the hidden states of a chunk, which are few, move instead. A CPU keeps the sums of before.
    """
    shards = mesh.shape["tensor"] * mesh.shape["fsdp"]
    return platform != "cpu" and mesh.shape["fsdp"] > 1 and vocab_size % shards == 0


# Bytes of a chunk's logits on each device, with "auto". A chunk reads and writes its part of the table's gradient,
# eight bytes a number. Computing hides that from four times FLOPs / bandwidth of the memory on: 960 tokens with 197
# TFLOP/s and 819 GB/s (TPU v5e), or 1,200 with 990 and 3,350 (H100). 640 MiB are 1,024 tokens of Qwen2.5's vocabulary.
_CHUNK_BYTES = {"cpu": 64 * 2**20}
_CHUNK_BYTES_OF_ACCELERATORS = 640 * 2**20
_MOST_CHUNK_TOKENS = 4096


def logits_chunk(chunk_tokens: int | Auto, mesh: Mesh | AbstractMesh, vocab_size: int, platform: str) -> int:
    """Return how many tokens' logits exist at a time, over all devices.

    Args:
      chunk_tokens: see `settings.Layout`; "auto" is a power of two for each part of a chunk, and there is one for each
        shard of the rows, or of the data axis where fsdp splits the vocabulary instead.
      vocab_size: of the table. mesh, platform: of the devices.
    """
    if isinstance(chunk_tokens, int):
        return chunk_tokens
    parts = mesh.shape["data"]
    if not splits_vocabulary(mesh, vocab_size, platform):
        parts *= mesh.shape["fsdp"]
    tokens = _CHUNK_BYTES.get(platform, _CHUNK_BYTES_OF_ACCELERATORS) // (4 * vocab_size)
    return parts * min(_MOST_CHUNK_TOKENS, 2 ** (max(1, tokens).bit_length() - 1))


class _Head(NamedTuple):
    """Computes logits [G width V] from hidden states [G U D] and a table [V D], one chunk of U at a time."""

    temperature: float
    vocab_size: int
    width: int
    entropy_gradient: bool
    table_gradient: bool
    split: bool = False

    def constrain(self, x: Array, *axes: Any) -> Array:
        return constrain(x, *axes) if self.split else x

    def chunk(self, x: Array, number: Array) -> Array:
        chunk = jax.lax.dynamic_slice_in_dim(x, number * self.width, self.width, axis=1)
        rest = [None] * (x.ndim - 1)
        # twice: with the second alone, all chunks are gathered before one is taken
        return self.constrain(self.constrain(chunk, ROWS, *rest), "data", *rest)

    def write(self, x: Array, new: Array, number: Array) -> Array:
        new = self.constrain(new.astype(x.dtype), ROWS, *[None] * (x.ndim - 1))
        return jax.lax.dynamic_update_slice_in_dim(x, new, number * self.width, axis=1)

    def logits(self, hidden: Array, table: Array) -> Array:
        logits = jnp.einsum("gud,vd->guv", hidden, table, preferred_element_type=wide(hidden.dtype))
        logits = self.constrain(logits, "data", None, VOCABULARY)
        # finite, so that 0 * log 0 of a masked token is 0 in the entropy and in its gradient
        real = jnp.arange(len(table))[None, None] < self.vocab_size
        return jnp.where(real, logits / self.temperature, -1e30)


# A custom VJP: differentiating through a scan would save or recompute every chunk, and a while loop, which stops after
# the last token, has no reverse mode.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logps(
    head: _Head, hidden: Array, table: Array, targets: Array, chunks: Array
) -> tuple[Array, Array]:
    """Return the log-probability of each target i32[G U] and the entropy there, f32[G U]; 0 from chunk `chunks` on."""
    return _forward(head, hidden, table, targets, chunks)[0]


def _forward(head: _Head, hidden: Array, table: Array, targets: Array, chunks: Array) -> Any:
    def body(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        with jax.named_scope("logits"):
            logits = head.logits(head.chunk(hidden, number), table)
            total = jax.nn.logsumexp(logits, axis=-1)
            target = jnp.take_along_axis(logits, head.chunk(targets, number)[..., None], axis=-1)[..., 0]
            all_logps = logits - total[..., None]
            entropy = -jnp.sum(jnp.exp(all_logps) * all_logps, axis=-1)
        new = (target - total, entropy, total)
        return tuple(head.write(x, y, number) for x, y in zip(carry, new, strict=True))

    zeros = jnp.zeros(targets.shape, wide(hidden.dtype))
    logps, entropy, total = jax.lax.fori_loop(0, chunks, body, (zeros,) * 3)
    return (logps, entropy), (hidden, table, targets, chunks, entropy, total)


def _backward(head: _Head, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    hidden, table, targets, chunks, entropy, total = residuals
    sums = wide(hidden.dtype)

    def body(number: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        def column(x: Array) -> Array:
            return head.chunk(x, number)[..., None]

        with jax.named_scope("logits"):
            chunk = head.chunk(hidden, number)
            all_logps = head.logits(chunk, table) - column(total)
            probs = jnp.exp(all_logps)
            one_hot = (jnp.arange(len(table))[None, None] == column(targets)).astype(probs.dtype)
            d_logits = column(cotangents[0]) * (one_hot - probs)
            if head.entropy_gradient:
                d_logits -= column(cotangents[1]) * probs * (all_logps + column(entropy))
            d_logits = narrow(d_logits / head.temperature, hidden.dtype)
            d_hidden = jnp.einsum("guv,vd->gud", d_logits, table)
            d_hidden = head.write(carry[0], d_hidden, number)
            if not head.table_gradient:
                return d_hidden, None
            # [D V], which takes a CPU half as long as [V D]; in float32, because the chunks are added up
            d_table = jnp.einsum("gud,guv->dv", chunk, d_logits, preferred_element_type=sums)
        return d_hidden, carry[1] + d_table

    no_table = jnp.zeros(table.shape[::-1], sums) if head.table_gradient else None
    zeros = jnp.zeros_like(hidden), None if no_table is None else head.constrain(no_table, None, VOCABULARY)
    d_hidden, d_table = jax.lax.fori_loop(0, chunks, body, zeros)
    return d_hidden, None if d_table is None else narrow(d_table.T, table.dtype), None, None


_token_logps.defvjp(_forward, _backward)


def response_logps(
    graphdef: Any,
    params: Params,
    prompt_tokens: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    tokens: Int[Array, "S B T"],
    lengths: Int[Array, "S B"],
    **options: Any,
) -> LogPs:
    """Score S responses per prompt without packing: one row per prompt, laid out on the device.

    Args:
      graphdef, params: the model, in either layout.
      prompt_tokens, prompt_lengths: prompts, right-padded.
      tokens, lengths: responses, right-padded; tokens beyond a length have no influence.
      options: as for `packed_logps`.
    """
    (B, P), (S, _, T) = prompt_tokens.shape, tokens.shape
    tokens = jnp.asarray(tokens).swapaxes(0, 1)
    in_response = jnp.arange(T)[None, None] < jnp.asarray(lengths).T[..., None]
    fed = T - 1  # the first token needs only the prompt, the last is never read
    in_prompt = jnp.arange(P)[None] < prompt_lengths[:, None]

    def joined(prompt: Array, responses: Array) -> Array:
        prompt = jnp.broadcast_to(prompt, (B, P))
        responses = jnp.broadcast_to(responses, (B, S, fed)).reshape(B, -1)
        return jnp.concatenate([prompt, responses], axis=1).astype(jnp.int32)

    numbers = jnp.arange(S)[None, :, None]
    ends = (prompt_lengths - 1)[:, None, None]
    step = jnp.arange(T)[None, None]
    source = jnp.where(step == 0, ends, P + numbers * fed + step - 1)
    response = jnp.where(in_response, numbers, -1)
    slots = (
        jnp.broadcast_to(x, (B, S, T)).reshape(B, S * T).astype(jnp.int32) for x in (source, tokens, response)
    )
    packed = Packed(
        joined(prompt_tokens, tokens[..., :-1]),
        joined(jnp.arange(P)[None], prompt_lengths[:, None, None] + jnp.arange(fed)[None, None]),
        joined(jnp.where(in_prompt, 0, -1), jnp.where(in_response[..., 1:], 1 + numbers, -1)),
        joined(jnp.where(in_prompt, 0, -1), jnp.where(in_response[..., 1:], 0, -1)),
        *slots,
    )
    scored = packed_logps(graphdef, params, packed, S, **options)
    return LogPs(scored.logps.T, scored.entropy.T)
