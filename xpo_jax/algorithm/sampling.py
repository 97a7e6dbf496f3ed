"""How one token is drawn: the settings, what they truncate, and the draw by inversion.

The sampler (sampler.py) calls these in its decode loop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from xpo_jax.values import Array


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateSampling(Sampling):
    """How the candidates of a run are sampled.

    Args:
      second_temperature: in place of `temperature`, for the candidate that `loss.second_candidate` samples, in training
        alone. With more candidates, the rule that pairs them may choose that one or not. Log-probabilities stay those
        at `temperature`: the preference part of a loss is right for pairs of any origin, but XPO's bonus is then no
        longer an average over samples of the reference. None: the same temperature.
    """

    second_temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        second = self.second_temperature
        if second is not None and not 0 < second < math.inf:
            raise ValueError(
                f"second_temperature is {second}, must be positive, or None for that of the others"
            )

    def check(self, *, offline: bool) -> None:
        """Check the settings against those of the run.

        Raises:
          ValueError: a temperature of samples that are not drawn.
        """
        if offline and self.second_temperature is not None:
            raise ValueError(
                f"sampling.second_temperature is {self.second_temperature}, but offline names recorded pairs, and"
                " nothing is sampled; set it to None"
            )


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
