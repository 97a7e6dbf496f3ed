"""The preference losses: log-probabilities and verdicts in, loss terms out. No loss has access to a model.

`LOSSES` names them for the config. With a bonus they are XPO (arXiv 2405.21046, Algorithm 1); with alpha 0 they are
online DPO (arXiv 2402.04792), or offline DPO (arXiv 2305.18290) on recorded pairs; "ipo" is arXiv 2310.12036.

A new loss is a class like these: its fields are its hyperparameters, which a config gives beside `loss.name`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from xpo_jax.values import Array


class LossTerms(NamedTuple):
    """Per pair, unweighted: z f32[*B] in nats, preference f32[*B], bonus f32[*B], clipped bool[*B].

    *B is any shape: [B] of a batch, [G Q/S] of a packed micro-batch.
    """

    z: Array
    preference: Array
    bonus: Array
    clipped: Array


@runtime_checkable
class LossFn(Protocol):
    """A loss of pairs."""

    def __call__(
        self,
        policy_logps: Float[Array, " S *B"],
        ref_logps: Float[Array, " S *B"],
        p_first: Float[Array, "*B"],
        *,
        alpha: Array | float,
        beta: Array | float,
    ) -> LossTerms:
        """Compute the loss terms of each pair.

        Args:
          policy_logps: f32[S *B], nats per sequence: the policy's sample, then the reference's.
          ref_logps: f32[S *B], the same under the reference.
          p_first: f32[*B] in [0, 1], 1 where the policy's sample won.
          alpha: coefficient of the optimism bonus.
          beta: strength of the regularisation towards the reference.
        """
        ...

    def check(self, alpha: float, beta: float) -> None:
        """Raise ValueError if the loss has no minimum with these coefficients."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BonusLoss:
    """p * l(z) + (1 - p) * l(-z), plus the optimism bonus; subclasses define l.

    The bonus is + alpha * log pi(reference's sample). Minimising it lowers the probability of what the reference
    already generates. Several public implementations have this sign wrong.

    Args:
      bonus_clip: nats of |log pi - log ref| of the reference's sample beyond which the bonus is constant. Without
        it the bonus is unbounded below (the paper's appendix clips at 500).
    """

    bonus_clip: float

    def __post_init__(self) -> None:
        if not self.bonus_clip > 0:
            raise ValueError(f"bonus_clip is {self.bonus_clip}, must be positive")

    def preference(self, z: Float[Array, "*B"], beta: Array | float) -> Float[Array, "*B"]:
        """Return l(z) of each pair, for z the log-ratio by which the preferred response leads."""
        raise NotImplementedError

    def __call__(
        self,
        policy_logps: Float[Array, " S *B"],
        ref_logps: Float[Array, " S *B"],
        p_first: Float[Array, "*B"],
        *,
        alpha: Array | float,
        beta: Array | float,
    ) -> LossTerms:
        """Compute the loss terms of each pair, see `LossFn`."""
        log_ratio = policy_logps - ref_logps
        z = log_ratio[0] - log_ratio[1]
        preference = p_first * self.preference(z, beta) + (1 - p_first) * self.preference(-z, beta)
        clipped = jnp.abs(log_ratio[1]) > self.bonus_clip
        # where, so that the gradient is exactly zero beyond (jnp.clip would pass half of it at the edge)
        ratio = jnp.where(clipped, jnp.sign(log_ratio[1]) * self.bonus_clip, log_ratio[1])
        return LossTerms(z, preference, alpha * (ref_logps[1] + ratio), clipped)

    def check(self, alpha: float, beta: float) -> None:
        """Raise ValueError unless beta is positive and alpha is not negative."""
        if not beta > 0:
            raise ValueError(f"beta is {beta}, must be positive")
        if not alpha >= 0:
            raise ValueError(f"alpha is {alpha}, must be 0 (online DPO) or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid(BonusLoss):
    """DPO's l(z) = softplus(-beta z)."""

    def preference(self, z: Float[Array, "*B"], beta: Array | float) -> Float[Array, "*B"]:
        """Return l(z)."""
        return jax.nn.softplus(-beta * z)

    def check(self, alpha: float, beta: float) -> None:
        """Raise ValueError if the loss has no minimum.

        From alpha >= beta on, the bonus pushes away from the reference's samples harder than any verdict pulls back.
        """
        super().check(alpha, beta)
        if alpha >= beta:
            raise ValueError(
                f"alpha {alpha:g} >= beta {beta:g}, where the loss has no minimum; lower loss.alpha"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPO(BonusLoss):
    """IPO's l(z) = (z - 1 / (2 beta))^2."""

    def preference(self, z: Float[Array, "*B"], beta: Array | float) -> Float[Array, "*B"]:
        """Return l(z)."""
        return (z - 0.5 / beta) ** 2


LOSSES = {"sigmoid": Sigmoid, "ipo": IPO}


def total(terms: LossTerms, weight: Float[Array, "*B"], rows: Array | float) -> Float[Array, ""]:
    """Return sum(weight * (preference + bonus)) / rows.

    Args:
      weight: f32[B], 0 where there is no verdict.
      rows: number of valid rows of the global batch. Dividing by the sum of weights instead would let one judged
        pair of 64 count 64 times.
    """
    # where, so that a pair without a verdict cannot bring in a nan
    return jnp.sum(jnp.where(weight > 0, weight * (terms.preference + terms.bonus), 0.0)) / rows
