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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int, Key

from xpo_jax.runtime.sharding import row_shards
from xpo_jax.values import Array, Params, Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled.

    Args:
      max_new_tokens: tokens, end token included; a response of this length without an end token is unfinished.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keep the k likeliest tokens (and ties with the last of them); 0 is off.
      top_p: keep the smallest set of likeliest tokens with at least this mass; 1 is off.
      min_p: keep tokens at least this times as likely as the likeliest; 0 is off.
      repetition_penalty: divides positive and multiplies negative logits of tokens already in prompt or
        response (Keskar et al. 2019, arXiv 1909.05858); 1 is off. For chat and evaluation: training
        with it would sample from another distribution than the one it computes.
      end_tokens: the tokens that end a response, as the tokenizer's vocabulary writes them; None takes those of the
        chat template and of the model's files, see models/hf/end_tokens.py.

    The order is transformers': penalty, temperature, top-k, top-p, min-p.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    end_tokens: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for bad, text in (
            (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}, must be at least 1"),
            (self.temperature < 0, f"temperature is {self.temperature}, must be 0 (greedy) or more"),
            (self.top_k < 0, f"top_k is {self.top_k}, must be 0 (off) or more"),
            (not 0 < self.top_p <= 1, f"top_p is {self.top_p}, must be in (0, 1]; 1 is off"),
            (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}, must be in [0, 1]; 0 is off"),
            (
                self.repetition_penalty <= 0,
                f"repetition_penalty is {self.repetition_penalty}, must be positive",
            ),
        ):
            if bad:
                raise ValueError(text)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The sizes and ids of a tokenizer: number of real tokens, ids that end a response, padding id."""

    size: int
    end_tokens: tuple[int, ...]
    pad_token: int


def truncate(logits: Float[Array, "B V"], settings: Sampling) -> Float[Array, "B V"]:
    """Set logits f32[B V], already divided by the temperature, to -inf where top-k, top-p or min-p excludes them."""
    if settings.top_k and settings.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, settings.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if settings.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        # a token stays if the mass before it is below top_p, so the first always does
        nucleus = jnp.cumsum(probs, axis=-1) - probs < settings.top_p
        last = jnp.min(jnp.where(nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    if settings.min_p > 0:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(settings.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def draw(logits: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Draw one token per row by inverting the distribution function.

    One uniform per row instead of a Gumbel variate per token, which would cost more than the softmax.
    Two levels, blocks of 256 tokens and then the tokens of the chosen block, keep the float32 sums short, so that the
    error does not grow with the vocabulary.

    A token of probability 0 is never drawn, however the sums round: only what has mass is chosen from.

    Args:
      logits: f32[B V]; -inf has probability 0.
      uniform: f32[B] in [0, 1).

    Returns:
      i32[B].
    """
    B, V = logits.shape
    block = 256
    p = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, -V % block))).reshape(B, -1, block)
    of_blocks = p.sum(-1)
    mass = jnp.cumsum(of_blocks, axis=-1)
    target = uniform[:, None] * mass[:, -1:]
    chosen = _first_beyond(target, mass, of_blocks)
    before = jnp.where(chosen > 0, jnp.take_along_axis(mass, (chosen - 1)[:, None], 1)[:, 0], 0.0)
    of_tokens = jnp.take_along_axis(p, chosen[:, None, None], 1)[:, 0]
    token = _first_beyond(target - before[:, None], jnp.cumsum(of_tokens, axis=-1), of_tokens)
    return (chosen * block + token).astype(jnp.int32)


def _first_beyond(
    target: Float[Array, "B 1"], sums: Float[Array, "B N"], masses: Float[Array, "B N"]
) -> Int[Array, " B"]:
    """Return the first entry with mass whose running sum exceeds the target, or the last one with mass.

    Rounding moves the running sums across entries without mass, carries the target past the total, and leaves a
    difference of two sums below zero.
    """
    has_mass = masses > 0
    beyond = has_mass & (sums > target)
    last = has_mass.shape[-1] - 1 - jnp.argmax(has_mass[:, ::-1], axis=-1)
    return jnp.where(beyond.any(axis=-1), jnp.argmax(beyond, axis=-1), last)


# Stages of the decode loop: all rows, half, a quarter; no shard has fewer than SMALLEST rows in a later stage. Every
# stage compiles the decoder once more; a fourth gave no measurable gain on CPU.
STAGES, SMALLEST = 3, 4


class Prompt(NamedTuple):
    """What the decoding of rows reads: random keys, prompt lengths i32[B], and the prompts' keys and values."""

    key: Array
    length: Array
    caches: Any


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
) -> Callable[[Params, Array, Array, Array, Array], Samples]:
    """Make the function to jit: (params, tokens i32[B P], lengths i32[B], valid bool[B], keys key[B]) -> Samples.

    Args:
      graphdef: of the model in its decoding layout (layers unstacked).
      vocab_size: number of real tokens; logits beyond are masked.
      end_tokens: ids that end a response.
      pad_token: id written after the end.
    """
    # long: one jitted loop, whose steps close over the same settings and model
    T = settings.max_new_tokens
    penalised = settings.repetition_penalty != 1

    def sample(
        params: Params,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        valid: Bool[Array, " B"],
        keys: Key[Array, " B"],
    ) -> Samples:
        model = nnx.merge(graphdef, params)
        B, P = tokens.shape
        shards = row_shards()

        def choose(hidden: Array, t: Array, keys: Array, seen: Array) -> Array:
            logits = model.unembed(hidden)
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
            if penalised:
                factor = settings.repetition_penalty
                logits = jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)
            if settings.temperature == 0:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)
            logits = truncate(logits / settings.temperature, settings)
            uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys)
            return draw(logits, uniform)

        def record(prompt: Prompt, state: Drawn, hidden: Array, t: Array) -> Drawn:
            """Draw token t and add it to the state."""
            token = jnp.where(state.done, pad_token, choose(hidden, t, prompt.key, state.seen))
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
            hidden, caches = model.prefill(tokens)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        seen = jnp.zeros((B, model.config.vocab_size if penalised else 1), bool)
        if penalised:
            in_prompt = jnp.where(jnp.arange(P)[None] < lengths[:, None], tokens, tokens[:, :1])
            seen = seen.at[jnp.arange(B)[:, None], in_prompt].set(True)
        zeros, empty = jnp.zeros(B, jnp.int32), jnp.full((B, T), pad_token, jnp.int32)
        prompt, state = (
            Prompt(keys, lengths, caches),
            Drawn(zeros, empty, zeros, ~valid, seen, model.empty_caches(B, T)),
        )
        with jax.named_scope("decode"):
            drawn = decode(prompt, record(prompt, state, last, jnp.int32(0)), jnp.int32(0), STAGES)
        return Samples(drawn.tokens, drawn.lengths, drawn.done & valid)

    return sample


RESULTS = ("tokens", "lengths", "done")


def take(tree: Any, rows: Array) -> Any:
    """Take rows i32[G b] of each shard: arrays [G*B ...] become [G*b ...], and nothing leaves its shard."""

    def one(x: Array) -> Array:
        grouped = x.reshape(len(rows), -1, *x.shape[1:])
        return jax.vmap(lambda x, rows: x[rows])(grouped, rows).reshape(-1, *x.shape[1:])

    return jax.tree.map(one, tree)


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
