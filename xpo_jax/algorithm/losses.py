"""The preference losses: log-probabilities and verdicts in, loss terms out. No loss has access to a model.

`LOSSES` names them for the config. With a bonus they are XPO (arXiv 2405.21046: Algorithm 1 where the reference draws
the second sample, Algorithm 2 where the policy draws both); with alpha 0 they are online DPO (arXiv 2402.04792), or
offline DPO (arXiv 2305.18290) on recorded pairs; "ipo" is arXiv 2310.12036. Each has a choice of bonuses, and may take
flipped verdicts into account, see `BonusLoss`.

A new loss is a class like these: its fields are its hyperparameters, which a config gives beside `loss.name`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

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
          policy_logps: f32[S *B], nats per sequence: the policy's sample, then the second one.
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
    """q * l(z) + (1 - q) * l(-z), plus a bonus b(r) for exploration; subclasses define l.

    z is the difference of the two samples' log-ratios r = log pi - log ref, and q the verdict p_first. b increases with
    r: minimising it lowers the probability of the sample that it acts on. Several public implementations have this sign
    wrong.

    Args:
      bonus: b. "linear" is XPO's, alpha * log pi, here alpha * (log ref + clip(r)). "bounded" is SE-POPO's (arXiv
        2502.00666), alpha * (sigmoid(beta * r) - 1/2) / beta: at most alpha / (2 beta) in size, and alpha / 4 in slope.
        That is the form of the authors' published code (loss type "popo" in github.com/MYC000801/SE-POPO), which
        applies it to the first of two policy samples.
      bonus_sample: the sample that b acts on. "second" is the pair's second one: the reference's in Algorithm 1; one of
        two that are alike, chosen without regard to the verdict, where the policy drew both. "rejected" is the one that
        lost, b(second) * p_first + b(first) * (1 - p_first), so that a tie acts on both by half. General Exploratory
        Bonus (arXiv 2510.03269) chooses the rejected one; its bonuses, which are functions of pi itself, are left out.
      bonus_clip: nats of |r| beyond which the linear bonus is constant. Without it that bonus is unbounded below (500
        is by report the value in XPO's appendix). Without effect on the bounded one.
      flip_rate: the fraction e < 1/2 of verdicts that are flipped at random. Then q = (p_first - e) / (1 - 2 e), which
        gives ((1 - e) l(z) - e l(-z)) / (1 - 2 e) for a won pair: its mean over flips is the loss on the true verdict
        (robust DPO, arXiv 2403.00409). Assumes that every verdict is equally likely to be flipped.
        0: verdicts are taken as they are.
    """

    bonus_clip: float
    bonus: Literal["linear", "bounded"] = "linear"
    bonus_sample: Literal["second", "rejected"] = "second"
    flip_rate: float = 0.0

    def __post_init__(self) -> None:
        if not self.bonus_clip > 0:
            raise ValueError(f"bonus_clip is {self.bonus_clip}, must be positive")
        if not 0 <= self.flip_rate < 0.5:
            raise ValueError(
                f"flip_rate is {self.flip_rate}, must be from 0 (off) to below 0.5, where verdicts carry no information"
            )

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
        q = (p_first - self.flip_rate) / (1 - 2 * self.flip_rate) if self.flip_rate else p_first
        preference = q * self.preference(z, beta) + (1 - q) * self.preference(-z, beta)
        bonus, clipped = self._bonus(log_ratio[1], ref_logps[1], alpha, beta)
        if self.bonus_sample == "rejected":
            of_first, first_clipped = self._bonus(log_ratio[0], ref_logps[0], alpha, beta)
            bonus = p_first * bonus + (1 - p_first) * of_first
            clipped = jnp.where(
                p_first == 0.5, clipped | first_clipped, jnp.where(p_first > 0.5, clipped, first_clipped)
            )
        return LossTerms(z, preference, bonus, clipped)

    def _bonus(
        self,
        log_ratio: Float[Array, "*B"],
        ref_logps: Float[Array, "*B"],
        alpha: Array | float,
        beta: Array | float,
    ) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
        """Return b(r) of one sample of each pair, and whether it is clipped."""
        if self.bonus == "bounded":
            # sigmoid(x) - 1/2, without the difference of two nearly equal numbers where x is small
            return alpha * 0.5 * jnp.tanh(0.5 * beta * log_ratio) / beta, jnp.zeros_like(log_ratio, bool)
        clipped = jnp.abs(log_ratio) > self.bonus_clip
        # where, so that the gradient is exactly zero beyond (jnp.clip would pass half of it at the edge)
        ratio = jnp.where(clipped, jnp.sign(log_ratio) * self.bonus_clip, log_ratio)
        return alpha * (ref_logps + ratio), clipped

    def check(self, alpha: float, beta: float) -> None:
        """Raise ValueError unless beta is positive and alpha is not negative."""
        if not beta > 0:
            raise ValueError(f"beta is {beta}, must be positive")
        if not alpha >= 0:
            raise ValueError(f"alpha is {alpha}, must be 0 (online DPO) or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid(BonusLoss):
    """DPO's l(z) = softplus(-beta z).

    With a flip_rate e the loss of a hard verdict is unbounded below, with slope e * beta / (1 - 2 e): it is the mean
    over many pairs that has a minimum. Where few pairs are learned from often (replay, offline), prefer "ipo", whose
    loss has a minimum for every pair.
    """

    def preference(self, z: Float[Array, "*B"], beta: Array | float) -> Float[Array, "*B"]:
        """Return l(z)."""
        return jax.nn.softplus(-beta * z)

    def check(self, alpha: float, beta: float) -> None:
        """Raise ValueError if the loss has no minimum.

        The slope of l is at most beta. From alpha >= beta on, the linear bonus pushes away from its sample harder than
        any verdict pulls back. The bounded bonus is refused nowhere: its slope vanishes where z is large, so that any
        verdict with 0 < q < 1 pulls back in the end. From alpha >= 2 beta on, though, it outweighs even a clear verdict
        for its sample where pi = ref (alpha / 4 against beta / 2).
        """
        super().check(alpha, beta)
        if self.bonus == "linear" and alpha >= beta:
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
