"""Pairs -> gradients, accumulated over micro-batches -> optax -> a new TrainState.

`accumulate` and `apply` are two functions to jit. Chunks divide the update batch and nothing else: the
loss is divided by the rows of the whole batch, so any split gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xpo_jax import losses
from xpo_jax.logps import response_logps
from xpo_jax.values import Array, Pairs, Params, TrainState


def make_accumulate(
    graphdef: Any,
    *,
    kind: losses.Kind,
    bonus_clip: float,
    entropy_weight: float,
    chunks: int,
    dtype: Any,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    """The function that adds one micro-batch to the gradient.

    Args:
      chunks: micro-batches per update batch.
      dtype: of the forward and backward pass; gradients are summed in float32.
      Others: see `losses.xpo` and `logps.response_logps`.

    Returns:
      accumulate(params, grads, sums, pairs, index, rows, policy_tokens, alpha, beta) -> (grads, sums):
      pairs is the whole batch, index i32[] the micro-batch, rows f32[] its real rows, policy_tokens f32[]
      the tokens of the policy's real responses. `sums` are those `summarise` reads.
    """

    def loss_of(
        params: Params, pairs: Pairs, rows: Array, policy_tokens: Array, alpha: Array, beta: Array
    ) -> tuple[Array, dict[str, Array]]:
        compute = jax.tree.map(lambda p: p.astype(dtype), params)
        scored = response_logps(
            graphdef,
            compute,
            pairs.prompt_tokens,
            pairs.prompt_lengths,
            pairs.tokens,
            pairs.lengths,
            temperature=temperature,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
        )
        terms = losses.xpo(
            scored.logps, pairs.ref_logps, pairs.p_first, beta=beta, alpha=alpha, kind=kind, clip=bonus_clip
        )
        weight = jnp.where(pairs.real, pairs.weight, 0.0)
        entropy = jnp.sum(jnp.where(pairs.real, scored.entropy[0], 0.0))
        loss = losses.total(terms, weight, rows) - entropy_weight * entropy / policy_tokens
        return loss, _sums(terms, scored.logps, pairs, weight, loss, entropy)

    def accumulate(
        params: Params,
        grads: Params,
        sums: dict[str, Array],
        pairs: Pairs,
        index: Array,
        rows: Array,
        policy_tokens: Array,
        alpha: Array,
        beta: Array,
    ) -> tuple[Params, dict[str, Array]]:
        def part(x: Array, axis: int) -> Array:
            # strided, so that every device keeps its share of every micro-batch
            shape = x.shape[:axis] + (x.shape[axis] // chunks, chunks) + x.shape[axis + 1 :]
            return jax.lax.dynamic_index_in_dim(x.reshape(shape), index, axis + 1, keepdims=False)

        by_candidate = ("tokens", "lengths", "ref_logps")
        mine = Pairs(**{k: part(v, int(k in by_candidate)) for k, v in pairs._asdict().items()})
        new, more = jax.grad(loss_of, has_aux=True)(params, mine, rows, policy_tokens, alpha, beta)
        return jax.tree.map(jnp.add, grads, new), jax.tree.map(jnp.add, sums, more)

    return accumulate


SUMS = (
    "loss",
    "preference",
    "bonus",
    "clipped",
    "entropy",
    "kl",
    "policy_tokens",
    "rows",
    "decisive",
    "correct",
    "policy_chosen",
    "policy_rejected",
    "reference_chosen",
    "reference_rejected",
)


def zeros(params: Params) -> tuple[Params, dict[str, Array]]:
    """What the first `accumulate` of a batch adds to."""
    return jax.tree.map(jnp.zeros_like, params), {name: jnp.float32(0) for name in SUMS}


def _sums(
    terms: losses.LossTerms, logps: Array, pairs: Pairs, weight: Array, loss: Array, entropy: Array
) -> dict[str, Array]:
    """Sums over rows, which micro-batches and processes can add up; `summarise` divides them."""
    add = lambda mask, x: jnp.sum(jnp.where(mask, x, 0.0))  # noqa: E731
    judged, real = weight > 0, pairs.real
    decisive = judged & (pairs.p_first != 0.5)  # a tie has no chosen and no rejected response
    won = pairs.p_first > 0.5
    chosen = lambda x: add(decisive, jnp.where(won, x[0], x[1]))  # noqa: E731
    rejected = lambda x: add(decisive, jnp.where(won, x[1], x[0]))  # noqa: E731
    values = {
        "loss": loss,
        "preference": add(judged, weight * terms.preference),
        "bonus": add(judged, weight * terms.bonus),
        "clipped": add(judged, terms.clipped),
        "entropy": entropy,
        "kl": add(real, logps[0] - pairs.ref_logps[0]),
        "policy_tokens": add(real, pairs.lengths[0]),
        "rows": add(real, jnp.ones_like(logps[0])),
        "decisive": add(decisive, jnp.ones_like(logps[0])),
        "correct": add(decisive, jnp.where(won, terms.z > 0, terms.z < 0)),
        "policy_chosen": chosen(logps),
        "policy_rejected": rejected(logps),
        "reference_chosen": chosen(pairs.ref_logps),
        "reference_rejected": rejected(pairs.ref_logps),
    }
    return jax.tree.map(jax.lax.stop_gradient, {name: jnp.float32(values[name]) for name in SUMS})


def summarise(sums: Mapping[str, Any], beta: float) -> dict[str, float]:
    """Metrics of one update from the sums of its micro-batches, on the host.

    Means over chosen and rejected responses leave ties out; a mean over nothing is nan. KL is of the fresh
    policy samples at the parameters that drew them, in nats.
    """
    s = {name: float(value) for name, value in sums.items()}
    mean = lambda name, over: s[name] / s[over] if s[over] else float("nan")  # noqa: E731
    out = {
        "loss/total": s["loss"],
        "loss/dpo": mean("preference", "rows"),
        "loss/xpo": mean("bonus", "rows"),
        "loss/clipped_share": mean("clipped", "rows"),
        "objective/kl": mean("kl", "rows"),
        "objective/kl_per_token": mean("kl", "policy_tokens"),
        "objective/entropy": mean("entropy", "policy_tokens"),
        "rewards/accuracies": mean("correct", "decisive"),
    }
    for side in ("chosen", "rejected"):
        policy, reference = mean(f"policy_{side}", "decisive"), mean(f"reference_{side}", "decisive")
        out[f"logps/policy_{side}"], out[f"logps/reference_{side}"] = policy, reference
        out[f"rewards/{side}"] = beta * (policy - reference)
    out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
    return out


def make_apply(
    optimizer: optax.GradientTransformation, rate: optax.Schedule
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The function that applies an accumulated gradient.

    Args:
      optimizer, rate: as `optimizer.make_optimizer` returns them.

    Returns:
      apply(state, grads, loss f32[]) -> (state, {"grad_norm", "finite", "learning_rate"}). A loss or
      gradient that is not finite leaves params and optimizer untouched and is counted in `skipped`.
    """

    def apply(state: TrainState, grads: Params, loss: Array) -> tuple[TrainState, dict[str, Array]]:
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), new, (state.params, state.opt_state)
        )
        # optax counts the updates it was given, and a skipped one is not among them
        used = jnp.asarray(rate(state.step - state.skipped), jnp.float32)
        state = TrainState(state.step + 1, state.skipped + ~finite, params, opt_state)
        return state, {"grad_norm": norm, "finite": finite, "learning_rate": used}

    return apply


def applied_metrics(told: Sequence[Mapping[str, Any]], alpha: float, beta: float) -> dict[str, Any]:
    """Metrics of how a step's updates were applied; rate and norm are the first one's.

    Args:
      told: what `make_apply`'s function returns beside the state, on the host, of each.
    """
    return {
        "alpha": alpha,
        "beta": beta,
        "alpha_over_beta": alpha / beta,
        "learning_rate": told[0]["learning_rate"],
        "grad_norm": told[0]["grad_norm"],
        "skipped": sum(not each["finite"] for each in told),
    }


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0."""
    return TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params))


def trim(tokens: np.ndarray, lengths: np.ndarray, buckets: tuple[int, ...]) -> np.ndarray:
    """Cut i32[... T] to the smallest of the ascending `buckets` that holds the longest response."""
    longest = int(lengths.max(initial=1))
    return tokens[..., : next(bucket for bucket in buckets if bucket >= longest)]
