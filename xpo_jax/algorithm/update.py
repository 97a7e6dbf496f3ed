"""Pairs -> gradients, accumulated over micro-batches -> optax -> a new TrainState.

`accumulate` and `apply` are two functions to jit. Micro-batches only divide the batch of an update: the loss is divided
by the rows of the whole batch, so any split and any order gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from xpo_jax.algorithm import losses
from xpo_jax.algorithm.logps import packed_logps
from xpo_jax.algorithm.losses import LossFn
from xpo_jax.algorithm.packing import Packed
from xpo_jax.models import lora
from xpo_jax.models.layers import narrow
from xpo_jax.values import Array, Pairs, Params, TrainState


class PairTargets(NamedTuple):
    """Per-pair training targets of one packed micro-batch, in slot order; see `values.Pairs`.

    lengths: i32[S G Q/S]. ref_logps: f32[S G Q/S]. p_first, weight: f32[G Q/S]. valid: bool[G Q/S], False where there
    is no pair.
    """

    lengths: Array
    ref_logps: Array
    p_first: Array
    weight: Array
    valid: Array


def gather_pair_targets(pairs: Pairs, index: Int[np.ndarray, "G Q"]) -> PairTargets:
    """Gather the targets of a micro-batch, on the host; `index` is `MicroBatch.pairs`."""
    absent = index < 0

    def gather(x: Any) -> np.ndarray:
        return np.where(absent, np.zeros((), x.dtype), x[..., index])

    return PairTargets(
        lengths=gather(pairs.lengths),
        ref_logps=gather(pairs.ref_logps),
        p_first=gather(pairs.p_first),
        weight=gather(pairs.weight),
        valid=~absent,
    )


def make_accumulate(
    graphdef: Any,
    loss_fn: LossFn,
    *,
    entropy_weight: float,
    dtype: Any,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
    table_gradient: bool = True,
    split_vocabulary: bool = False,
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    """Make the function that adds one micro-batch to the gradient.

    Args:
      graphdef: of the model in its training layout.
      loss_fn: the loss of pairs.
      entropy_weight: weight of the policy's mean entropy per token, which is subtracted from the loss.
      dtype: of the forward and backward pass; gradients are summed in float32.
      temperature, vocab_size, chunk_tokens, table_gradient, split_vocabulary: see `logps.packed_logps`.

    Returns:
      accumulate(params, frozen, grads, sums, packed, targets, rows, policy_tokens, alpha, beta) -> (grads, sums), where
      frozen are the weights that are not trained, stacked and in `dtype`, or {}; packed and targets are of one
      micro-batch; rows f32[] is the number of valid rows of the whole batch and policy_tokens f32[] the number of
      tokens of the policy's responses in them. `sums` are what `summarise` reads.
    """

    def objective(
        params: Params,
        frozen: Params,
        packed: Packed,
        targets: PairTargets,
        rows: Array,
        policy_tokens: Array,
        alpha: Array,
        beta: Array,
    ) -> tuple[Array, dict[str, Array]]:
        compute = lora.join(frozen, jax.tree.map(lambda p: narrow(p, jnp.dtype(dtype)), params))
        scored = packed_logps(
            graphdef,
            compute,
            packed,
            targets.ref_logps.shape[0] * targets.ref_logps.shape[2],
            temperature=temperature,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
            entropy_gradient=entropy_weight > 0,
            table_gradient=table_gradient,
            split_vocabulary=split_vocabulary,
        )

        def per_candidate(x: Array) -> Array:
            return jnp.moveaxis(x.reshape(*targets.valid.shape, -1), -1, 0)

        logps, entropies = per_candidate(scored.logps), per_candidate(scored.entropy)
        terms = loss_fn(logps, targets.ref_logps, targets.p_first, alpha=alpha, beta=beta)
        weight = jnp.where(targets.valid, targets.weight, 0.0)
        entropy = jnp.sum(jnp.where(targets.valid, entropies[0], 0.0))
        loss = losses.total(terms, weight, rows) - entropy_weight * entropy / policy_tokens
        return loss, _sums(terms, logps, targets, weight, loss, entropy)

    def accumulate(
        params: Params,
        frozen: Params,
        grads: Params,
        sums: dict[str, Array],
        packed: Packed,
        targets: PairTargets,
        rows: Array,
        policy_tokens: Array,
        alpha: Array,
        beta: Array,
    ) -> tuple[Params, dict[str, Array]]:
        new, more = jax.grad(objective, has_aux=True)(
            params, frozen, packed, targets, rows, policy_tokens, alpha, beta
        )
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
    """Return the zeros that the first `accumulate` of a batch adds to."""
    return jax.tree.map(jnp.zeros_like, params), {name: jnp.float32(0) for name in SUMS}


def _sums(
    terms: losses.LossTerms, logps: Array, targets: PairTargets, weight: Array, loss: Array, entropy: Array
) -> dict[str, Array]:
    """Sum over rows, so that micro-batches and processes can add up; `summarise` divides."""
    judged, valid = weight > 0, targets.valid
    decisive = judged & (targets.p_first != 0.5)  # a tie has no chosen and no rejected response
    won = targets.p_first > 0.5

    def add(mask: Array, x: Array) -> Array:
        x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
        return jnp.sum(jnp.where(mask, x, 0.0))

    def chosen(x: Array) -> Array:
        return add(decisive, jnp.where(won, x[0], x[1]))

    def rejected(x: Array) -> Array:
        return add(decisive, jnp.where(won, x[1], x[0]))

    values = {
        "loss": loss,
        "preference": add(judged, weight * terms.preference),
        "bonus": add(judged, weight * terms.bonus),
        "clipped": add(judged, terms.clipped),
        "entropy": entropy,
        "kl": add(valid, logps[0] - targets.ref_logps[0]),
        "policy_tokens": add(valid, targets.lengths[0]),
        "rows": add(valid, jnp.ones_like(logps[0])),
        "decisive": add(decisive, jnp.ones_like(logps[0])),
        "correct": add(decisive, jnp.where(won, terms.z > 0, terms.z < 0)),
        "policy_chosen": chosen(logps),
        "policy_rejected": rejected(logps),
        "reference_chosen": chosen(targets.ref_logps),
        "reference_rejected": rejected(targets.ref_logps),
    }
    return jax.tree.map(jax.lax.stop_gradient, {name: jnp.float32(values[name]) for name in SUMS})


def summarise(sums: Mapping[str, Any], beta: float) -> dict[str, float]:
    """Compute the metrics of one update from the sums of its micro-batches, on the host.

    Means over chosen and rejected responses leave ties out; a mean over nothing is nan. KL is that of the fresh policy
    samples at the parameters that sampled them, in nats.
    """
    s = {name: float(value) for name, value in sums.items()}

    def mean(name: str, over: str) -> float:
        return s[name] / s[over] if s[over] else float("nan")

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
    """Make the function that applies an accumulated gradient.

    Args:
      optimizer, rate: as `optimizer.make_optimizer` returns them.

    Returns:
      apply(state, grads, loss f32[]) -> (state, {"grad_norm", "finite", "learning_rate"}). An update whose loss or
      gradient is not finite leaves parameters and optimizer untouched and is counted in `skipped`.
    """

    def apply(state: TrainState, grads: Params, loss: Array) -> tuple[TrainState, dict[str, Array]]:
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), new, (state.params, state.opt_state)
        )
        # optax counts the updates that it was passed; a skipped one is not among them
        with jax.numpy_dtype_promotion("standard"):
            used = jnp.asarray(rate(state.step - state.skipped), jnp.float32)
        state = TrainState(state.step + 1, state.skipped + (~finite).astype(jnp.int32), params, opt_state)
        return state, {"grad_norm": norm, "finite": finite, "learning_rate": used}

    return apply


def applied_metrics(applied: Sequence[Mapping[str, Any]], alpha: float, beta: float) -> dict[str, Any]:
    """Return the metrics of how a step's updates were applied; rate, norm and padding are those of the first.

    Args:
      applied: per update, `Programs.update`'s third result on the host.
    """
    return {
        "alpha": alpha,
        "beta": beta,
        "alpha_over_beta": alpha / beta,
        "learning_rate": applied[0]["learning_rate"],
        "grad_norm": applied[0]["grad_norm"],
        "skipped": sum(not update["finite"] for update in applied),
        "update/padding": applied[0]["padding"],
    }


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first update."""
    return TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params))
