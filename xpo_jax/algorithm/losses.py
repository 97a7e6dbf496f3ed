"""The preference losses: log-probabilities and verdicts in, loss terms out. They know no model.

One function serves XPO (arXiv 2405.21046, Algorithm 1), online DPO (alpha 0, arXiv 2402.04792), offline
DPO (arXiv 2305.18290, alpha 0 on recorded pairs) and IPO (arXiv 2310.12036, kind "ipo").
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from xpo_jax.values import Array

Kind = Literal["sigmoid", "ipo"]


class LossTerms(NamedTuple):
    """Per pair, unweighted: z f32[B] in nats, preference f32[B], bonus f32[B], clipped bool[B]."""

    z: Array
    preference: Array
    bonus: Array
    clipped: Array


def xpo(
    policy_logps: Array,
    ref_logps: Array,
    p_first: Array,
    *,
    beta: Array | float,
    alpha: Array | float,
    kind: Kind,
    clip: float,
) -> LossTerms:
    """The XPO loss of each pair.

    Args:
      policy_logps: f32[2 B], nats per sequence, of the policy's own sample and of the reference's.
      ref_logps: f32[2 B], the same under the reference.
      p_first: f32[B] in [0, 1], 1 where the policy's sample won.
      beta: strength of the pull towards the reference.
      alpha: strength of the optimism bonus. Minimising + alpha * log pi(reference's sample) lowers what
        the reference already says (the sign that several implementations have wrong).
      kind: "sigmoid" (DPO's) or "ipo".
      clip: nats; beyond it log pi - log ref of the reference's sample no longer counts. Without it the
        bonus is unbounded below (the paper's appendix clips at 500).
    """
    log_ratio = policy_logps - ref_logps
    z = log_ratio[0] - log_ratio[1]
    if kind == "sigmoid":
        first, second = jax.nn.softplus(-beta * z), jax.nn.softplus(beta * z)
    else:
        first, second = (z - 0.5 / beta) ** 2, (-z - 0.5 / beta) ** 2
    clipped = jnp.abs(log_ratio[1]) > clip
    # where, so that the gradient is exactly zero beyond (jnp.clip would pass half of it at the edge)
    bonus = alpha * (ref_logps[1] + jnp.where(clipped, jnp.sign(log_ratio[1]) * clip, log_ratio[1]))
    return LossTerms(z, p_first * first + (1 - p_first) * second, bonus, clipped)


def total(terms: LossTerms, weight: Array, rows: Array | float) -> Array:
    """sum(weight * (preference + bonus)) / rows.

    Args:
      weight: f32[B], 0 where there is no verdict.
      rows: valid rows of the global batch, not the sum of weights: one survivor of 64 must not get 64
        times its say.
    """
    # where, so that a pair without verdict cannot bring in a nan
    return jnp.sum(jnp.where(weight > 0, weight * (terms.preference + terms.bonus), 0.0)) / rows


def check_strengths(alpha: float, beta: float, kind: Kind, where: str) -> None:
    """Refuse strengths for which the loss has no minimum.

    Raises:
      ValueError: beta not positive, alpha negative, or alpha >= beta for the sigmoid loss: there the pull
        away from the reference's samples is stronger than the loss's own at any verdict.
    """
    if not beta > 0:
        raise ValueError(f"{where}: beta is {beta}, must be positive")
    if not alpha >= 0:
        raise ValueError(f"{where}: alpha is {alpha}, must be 0 (online DPO) or more")
    if kind == "sigmoid" and alpha >= beta:
        raise ValueError(
            f"{where}: alpha {alpha:g} >= beta {beta:g}, where the loss has no minimum; lower loss.alpha"
        )
