"""Sample responses in one jitted program: prefill, then decode loops over batches that shrink.

When half of the rows have ended, the others are gathered into a batch of half the size, each with its random key and
its keys and values, so that a few long responses do not cost the time of all. On a mesh every shard does so with its
own rows, at the same token; only one number per shard is communicated.

The sampler handles token ids and has no tokenizer; the ids that end a response and the padding id are arguments. It
returns no log-probabilities: those in the loss must come from the same kind of pass for policy and reference
(`logps.py`).

Left out on purpose: beam search, stop strings, and new prompts in the place of rows that have ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as PS
from jaxtyping import Bool, Float, Int, Key

from xpo_jax.algorithm.sampling import Sampling, draw, truncate
from xpo_jax.models.layers import wide
from xpo_jax.runtime.sharding import ROWS, constrain, row_shards
from xpo_jax.values import Array, Params, Samples


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The sizes and ids of a tokenizer: number of real tokens, ids that end a response, padding id."""

    size: int
    end_tokens: tuple[int, ...]
    pad_token: int


# Stages of the decode loop: all rows, half, a quarter; no shard has fewer than SMALLEST rows in a later stage. Every
# stage compiles the decoder once more; a fourth gave no measurable gain on CPU.
STAGES, SMALLEST = 3, 4


class Prompt(NamedTuple):
    """What the decoding of rows reads.

    Random keys, prompt lengths i32[B], the prompts' keys and values, and temperatures f32[B], or None for that of the
    settings.
    """

    key: Array
    length: Array
    caches: Any
    temperature: Array | None


class Drawn(NamedTuple):
    """State of the decode loop.

    The last token i32[B], all tokens so far i32[B T], lengths i32[B], done bool[B], for the repetition penalty the
    tokens seen bool[B V], and the responses' keys and values.
    """

    token: Array
    tokens: Array
    lengths: Array
    done: Array
    seen: Array
    caches: Any


def make_sampler(
    graphdef: Any,
    settings: Sampling,
    *,
    vocab_size: int,
    end_tokens: tuple[int, ...],
    pad_token: int,
    prefill_rows: int | None = None,
) -> Callable[..., Samples]:
    """Make the function to jit: (params, tokens i32[B P], lengths i32[B], valid bool[B], keys key[B*C]) -> Samples.

    It draws C candidates of each prompt, from one prefill: B*C rows, those of a prompt next to each other. Each has a
    copy of its prompt's keys and values. A sixth argument, temperatures f32[B*C], replaces that of the settings.

    Args:
      graphdef: of the model in its decoding layout (layers unstacked).
      vocab_size: number of real tokens; logits beyond are masked.
      end_tokens: ids that end a response.
      pad_token: id written after the end.
      prefill_rows: see `prefill`.
    """
    # long: one jitted loop, whose steps close over the same settings and model
    T = settings.max_new_tokens
    penalised = settings.repetition_penalty != 1

    def sample(
        params: Params,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        valid: Bool[Array, " B"],
        keys: Key[Array, " BC"],
        temperature: Float[Array, " BC"] | None = None,
    ) -> Samples:
        # norms and biases are computed with in float32: converted here, they are not at every layer of every token
        wider = jax.tree.map(lambda p: p.astype(wide(p.dtype)) if p.ndim == 1 else p, params)
        model = nnx.merge(graphdef, wider)
        B, P = tokens.shape
        shards = row_shards()

        def choose(hidden: Array, t: Array, prompt: Prompt, seen: Array) -> Array:
            logits = model.unembed(hidden)
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
            if penalised:
                factor = settings.repetition_penalty
                logits = jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)
            if settings.temperature == 0:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)
            divisor = settings.temperature if prompt.temperature is None else prompt.temperature[:, None]
            logits = truncate(logits / divisor, settings)
            uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(prompt.key)
            return draw(logits, uniform)

        def record(prompt: Prompt, state: Drawn, hidden: Array, t: Array) -> Drawn:
            """Draw token t and add it to the state."""
            token = jnp.where(state.done, pad_token, choose(hidden, t, prompt, state.seen))
            rows = jnp.arange(len(token))
            return state._replace(
                token=token,
                tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], t, axis=1),
                lengths=state.lengths + (~state.done).astype(jnp.int32),
                done=state.done | jnp.isin(token, jnp.array(end_tokens)),
                seen=state.seen.at[rows, token].set(True) if penalised else state.seen,
            )

        def decode(prompt: Prompt, state: Drawn, t: Array, stages: int) -> Drawn:
            """Decode from token t + 1 to the end, in batches that shrink."""
            half = len(state.done) // shards // 2  # of a shard's rows
            next_rows = half if half >= SMALLEST and stages > 1 else 0  # of the next stage

            def step(carry: tuple[Array, Drawn]) -> tuple[Array, Drawn]:
                t, state = carry
                hidden, caches = model.decode(state.token, t, prompt.length, prompt.caches, state.caches)
                return t + 1, record(prompt, state._replace(caches=caches), hidden, t + 1)

            def crowded(carry: tuple[Array, Drawn]) -> Array:
                unfinished = (~carry[1].done).reshape(shards, -1).sum(1)
                return (carry[0] < T - 1) & jnp.any(unfinished > next_rows)

            t, state = jax.lax.while_loop(crowded, step, (t, state))
            if next_rows == 0:
                return state
            rows = jnp.argsort(state.done.reshape(shards, -1), axis=1, stable=True)[:, :next_rows]
            rows_prompt, rows_state = take((prompt, state), rows)
            rest = decode(rows_prompt, rows_state, t, stages - 1)
            return state._replace(
                **{name: put(getattr(state, name), rows, getattr(rest, name)) for name in RESULTS}
            )

        with jax.named_scope("prefill"):
            last, caches = prefill(model, tokens, lengths, prefill_rows)
        if (candidates := len(keys) // B) > 1:
            B, prompts = len(keys), (tokens, lengths, valid, last, caches)
            tokens, lengths, valid, last, caches = jax.tree.map(
                lambda x: jnp.repeat(x, candidates, axis=0), prompts
            )
        seen = jnp.zeros((B, model.config.vocab_size if penalised else 1), bool)
        if penalised:
            in_prompt = jnp.where(jnp.arange(P)[None] < lengths[:, None], tokens, tokens[:, :1])
            seen = seen.at[jnp.arange(B)[:, None], in_prompt].set(True)
        zeros, empty = jnp.zeros(B, jnp.int32), jnp.full((B, T), pad_token, jnp.int32)
        prompt = Prompt(keys, lengths, caches, temperature)
        state = Drawn(zeros, empty, zeros, ~valid, seen, model.empty_caches(B, T))
        with jax.named_scope("decode"):
            drawn = decode(prompt, record(prompt, state, last, jnp.int32(0)), jnp.int32(0), STAGES)
        return Samples(drawn.tokens, drawn.lengths, drawn.done & valid)

    return sample


RESULTS = ("tokens", "lengths", "done")


def prefill(
    model: Any, tokens: Int[Array, "B P"], lengths: Int[Array, " B"], rows: int | None
) -> tuple[Array, Any]:
    """Encode prompts, in sub-batches whose activations exist one after the other.

    Args:
      tokens, lengths: the prompts, right-padded.
      rows: of each shard in a sub-batch, at most; None encodes all rows at once.

    Returns:
      hidden [B D] of each prompt's last token, and the prompts' keys and values.
    """

    def encode(tokens: Array, lengths: Array) -> tuple[Array, Any]:
        hidden, caches = model.prefill(tokens)
        return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], caches

    shards = row_shards()
    shard_rows = len(tokens) // shards
    if rows is None or rows >= shard_rows:
        return encode(tokens, lengths)

    def by_shard(x: Array) -> Array:
        """Split the rows [G*b ...] of G shards: [G b ...]."""
        x = x.reshape(shards, -1, *x.shape[1:])
        return constrain(x, ROWS, *[PS.UNCONSTRAINED] * (x.ndim - 1))

    def body(number: Array, encoded: Any) -> Any:
        # where sub-batches do not divide the rows, the last one begins earlier and encodes some rows again
        start = jnp.minimum(number * rows, shard_rows - rows)

        def read(x: Array) -> Array:
            chosen = jax.lax.dynamic_slice_in_dim(by_shard(x), start, rows, axis=1)
            return chosen.reshape(-1, *x.shape[1:])

        def write(x: Array, new: Array) -> Array:
            written = jax.lax.dynamic_update_slice_in_dim(by_shard(x), by_shard(new), start, axis=1)
            return written.reshape(x.shape)

        return jax.tree.map(write, encoded, encode(read(tokens), read(lengths)))

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(encode, tokens, lengths))
    encoded: tuple[Array, Any] = jax.lax.fori_loop(0, -(-shard_rows // rows), body, empty)
    return encoded


def take(tree: Any, rows: Array) -> Any:
    """Take rows i32[G b] of each shard: arrays [G*B ...] become [G*b ...], and nothing leaves its shard."""

    @jax.jit  # traced once for the caches of all layers
    def one(x: Array, rows: Array) -> Array:
        grouped = x.reshape(len(rows), -1, *x.shape[1:])
        return jax.vmap(lambda x, rows: x[rows])(grouped, rows).reshape(-1, *x.shape[1:])

    return jax.tree.map(lambda x: one(x, rows), tree)


def put(x: Array, rows: Array, new: Array) -> Array:
    """Replace in x [G*B ...] the rows that `take` took by `new` [G*b ...]."""
    grouped, new = (y.reshape(len(rows), -1, *y.shape[1:]) for y in (x, new))
    return jax.vmap(lambda x, rows, new: x.at[rows].set(new))(grouped, rows, new).reshape(x.shape)


def row_keys(
    seed: int,
    stream: Array | int,
    step: Array | int,
    position: Int[Array, " B"],
    candidate: Array | int,
) -> Key[Array, " B"]:
    """Derive keys key[B] from (seed, stream, step, position in the global batch, candidate).

    They do not depend on how the batch is split over chunks, devices or processes. The sampler folds in the
    token index.

    Args:
      stream: i32[], what the draw is for, see `rng.Stream`. candidate: i32[].
      step: i32[B], or i32[] for all rows.
      position: i32[B].
    """
    stream_key = jax.random.fold_in(jax.random.key(seed), stream)

    def one(step: Array, position: Array) -> Array:
        key = jax.random.fold_in(stream_key, step)
        return jax.random.fold_in(jax.random.fold_in(key, position), candidate)

    return jax.vmap(one)(jnp.broadcast_to(step, jnp.shape(position)), position)
