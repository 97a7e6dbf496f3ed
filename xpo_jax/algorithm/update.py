"""Pairs -> gradients, accumulated over micro-batches -> optax -> a new TrainState.

`accumulate` and `apply` are two functions to jit. Micro-batches divide the update batch and nothing else: the
loss is divided by the rows of the whole batch, so any split and any order gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xpo_jax.algorithm import losses
from xpo_jax.algorithm.logps import packed_logps
from xpo_jax.algorithm.packing import Packed
from xpo_jax.values import Array, Pairs, Params, TrainState


class PairTargets(NamedTuple):
    """What is known of the pairs of one packed micro-batch, in the order of its places; see `values.Pairs`.

    lengths: i32[S N Q/S]. ref_logps: f32[S N Q/S]. p_first, weight: f32[N Q/S]. real: bool[N Q/S], False where there
    is no pair.
    """

    lengths: Array
    ref_logps: Array
    p_first: Array
    weight: Array
    valid: Array


def gather_pair_targets(pairs: Pairs, index: np.ndarray) -> PairTargets:
    """What is known of these pairs, all of them on the host; `index` as `packing.pack` returns it."""
    none = index < 0
    some = lambda x: np.where(none, np.zeros((), x.dtype), x[..., index])  # noqa: E731
    return PairTargets(
        some(pairs.lengths), some(pairs.ref_logps), some(pairs.p_first), some(pairs.weight), ~none
    )


def make_accumulate(
    graphdef: Any,
    *,
    kind: losses.Kind,
    bonus_clip: float,
    entropy_weight: float,
    dtype: Any,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    """The function that adds one micro-batch to the gradient.

    Args:
      dtype: of the forward and backward pass; gradients are summed in float32.
      Others: see `losses.xpo` and `logps.packed_logps`.

    Returns:
      accumulate(params, grads, sums, packed, told, rows, policy_tokens, alpha, beta) -> (grads, sums): packed and
      told are one micro-batch, rows f32[] the valid rows of the whole batch, policy_tokens f32[] the tokens of the
      policy's responses in them. `sums` are those `summarise` reads.
    """

    def loss_of(
        params: Params,
        packed: Packed,
        told: PairTargets,
        rows: Array,
        policy_tokens: Array,
        alpha: Array,
        beta: Array,
    ) -> tuple[Array, dict[str, Array]]:
        compute = jax.tree.map(lambda p: p.astype(dtype), params)
        scored = packed_logps(
            graphdef,
            compute,
            packed,
            told.ref_logps.shape[0] * told.ref_logps.shape[2],
            temperature=temperature,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
            entropy_gradient=entropy_weight > 0,
        )
        by_candidate = lambda x: jnp.moveaxis(x.reshape(*told.valid.shape, -1), -1, 0)  # noqa: E731
        logps, entropies = by_candidate(scored.logps), by_candidate(scored.entropy)
        terms = losses.xpo(
            logps, told.ref_logps, told.p_first, beta=beta, alpha=alpha, kind=kind, clip=bonus_clip
        )
        weight = jnp.where(told.valid, told.weight, 0.0)
        entropy = jnp.sum(jnp.where(told.valid, entropies[0], 0.0))
        loss = losses.total(terms, weight, rows) - entropy_weight * entropy / policy_tokens
        return loss, _sums(terms, logps, told, weight, loss, entropy)

    def accumulate(
        params: Params,
        grads: Params,
        sums: dict[str, Array],
        packed: Packed,
        told: PairTargets,
        rows: Array,
        policy_tokens: Array,
        alpha: Array,
        beta: Array,
    ) -> tuple[Params, dict[str, Array]]:
        new, more = jax.grad(loss_of, has_aux=True)(params, packed, told, rows, policy_tokens, alpha, beta)
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
    terms: losses.LossTerms, logps: Array, told: PairTargets, weight: Array, loss: Array, entropy: Array
) -> dict[str, Array]:
    """Sums over rows, which micro-batches and processes can add up; `summarise` divides them."""
    add = lambda mask, x: jnp.sum(jnp.where(mask, x, 0.0))  # noqa: E731
    judged, valid = weight > 0, told.valid
    decisive = judged & (told.p_first != 0.5)  # a tie has no chosen and no rejected response
    won = told.p_first > 0.5
    chosen = lambda x: add(decisive, jnp.where(won, x[0], x[1]))  # noqa: E731
    rejected = lambda x: add(decisive, jnp.where(won, x[1], x[0]))  # noqa: E731
    values = {
        "loss": loss,
        "preference": add(judged, weight * terms.preference),
        "bonus": add(judged, weight * terms.bonus),
        "clipped": add(judged, terms.clipped),
        "entropy": entropy,
        "kl": add(valid, logps[0] - told.ref_logps[0]),
        "policy_tokens": add(valid, told.lengths[0]),
        "rows": add(valid, jnp.ones_like(logps[0])),
        "decisive": add(decisive, jnp.ones_like(logps[0])),
        "correct": add(decisive, jnp.where(won, terms.z > 0, terms.z < 0)),
        "policy_chosen": chosen(logps),
        "policy_rejected": rejected(logps),
        "reference_chosen": chosen(told.ref_logps),
        "reference_rejected": rejected(told.ref_logps),
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
      told: what `Programs.learn` returns beside state and sums, on the host, of each; the padding is the share of the
        update's slots that was empty.
    """
    return {
        "alpha": alpha,
        "beta": beta,
        "alpha_over_beta": alpha / beta,
        "learning_rate": told[0]["learning_rate"],
        "grad_norm": told[0]["grad_norm"],
        "skipped": sum(not each["finite"] for each in told),
        "update/padding": told[0]["padding"],
    }


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0."""
    return TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params))
