"""A loss with a hyperparameter, as CONTRIBUTING.md shows it."""

import dataclasses

import jax.numpy as jnp

from xpo_jax.algorithm.losses import BonusLoss
from xpo_jax.values import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hinge(BonusLoss):
    """The hinge loss l(z) = max(0, margin - beta z), as in RSO (arXiv 2309.06657, where margin is 1).

    Args:
      margin: nats by which beta z must exceed 0 before a pair no longer counts.
    """

    margin: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.margin > 0:
            raise ValueError(f"margin is {self.margin}, must be positive")

    def preference(self, z: Array, beta: Array | float) -> Array:
        """Return l(z)."""
        return jnp.maximum(0.0, self.margin - beta * z)

    def check(self, alpha: float, beta: float) -> None:
        """Raise ValueError if the bonus is at least as steep as the loss, which then has no minimum."""
        super().check(alpha, beta)
        if alpha >= beta:
            raise ValueError(f"alpha {alpha:g} >= beta {beta:g}; lower loss.alpha")
