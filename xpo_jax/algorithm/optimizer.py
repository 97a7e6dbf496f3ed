"""The optimizer of a run, from optax: AdamW or Adafactor, behind the same clipping and learning rate schedule.

Left out on purpose: optax's other optimizers, and Adafactor's step sizes relative to the size of each parameter (its
`multiply_by_parameter_scale`): a learning rate here is the size of a step, with either optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

from xpo_jax.values import Params


class Optimizer(NamedTuple):
    """An optimizer of optax, and its learning rate by the number of updates applied."""

    transformation: optax.GradientTransformation
    rate: optax.Schedule


def make_optimizer(
    *,
    name: Literal["adamw", "adafactor"],
    learning_rate: float,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_steps: float,
    b1: float | None,
    b2: float | None,
    eps: float | None,
    mu_dtype: Literal["float32", "bfloat16"] | None,
    weight_decay: float,
    clip_norm: float,
    steps: int,
) -> Optimizer:
    """Build clipping by global norm, then AdamW or Adafactor, with linear warm-up and decay of the learning rate.

    Args:
      name: "adamw" keeps two numbers per weight; "adafactor" (Shazeer and Stern 2018, arXiv 1804.04235) keeps
        one per row and one per column of a matrix with at least 128 of each, and one per weight of others.
      learning_rate: the peak.
      schedule: after the warm-up: constant, or linear or cosine decay to 0 at the last step.
      warmup_steps: updates from 0 to the peak; below 1 it is that fraction of `steps`, rounded.
      b1, b2, eps: AdamW's; None for adafactor, which has optax's defaults (second moments' decay 1 - t^-0.8).
      mu_dtype: of AdamW's first moments; bfloat16 saves two bytes per weight. None for adafactor.
      weight_decay: of matrices only, times the learning rate; biases and norms do not decay.
      clip_norm: largest global norm of a gradient.
      steps: updates of the run.

    Raises:
      ValueError: values out of range, or that contradict each other.
    """
    of_adamw = {"b1": b1, "b2": b2, "eps": eps, "mu_dtype": mu_dtype}
    missing = [field for field, value in of_adamw.items() if value is None]
    present = [field for field, value in of_adamw.items() if value is not None]
    warmup = round(warmup_steps * steps) if warmup_steps < 1 else warmup_steps
    for bad, text in (
        (name == "adamw" and bool(missing), f"adamw needs {', '.join(missing)}; None is for adafactor"),
        (
            name == "adafactor" and bool(present),
            f"adafactor has no {', '.join(present)}; set to None what another optimizer needs",
        ),
        (not learning_rate > 0, f"learning_rate is {learning_rate}, must be positive"),
        (warmup_steps < 0, f"warmup_steps is {warmup_steps}, must be 0 or more"),
        (
            warmup != math.floor(warmup),
            f"warmup_steps is {warmup_steps}; from 1 on it must be an integer, below 1 it is a fraction of the steps",
        ),
        (
            warmup >= steps,
            f"warmup_steps {warmup_steps:g} >= steps {steps}: the run would end before the peak; lower it",
        ),
        (b1 is not None and not 0 <= b1 < 1, f"b1 is {b1}, must be in [0, 1)"),
        (b2 is not None and not 0 <= b2 < 1, f"b2 is {b2}, must be in [0, 1)"),
        (eps is not None and not eps > 0, f"eps is {eps}, must be positive"),
        (weight_decay < 0, f"weight_decay is {weight_decay}, must be 0 or more"),
        (not clip_norm > 0, f"clip_norm is {clip_norm}, must be positive"),
    ):
        if bad:
            raise ValueError(text)
    rate = _rate(learning_rate, schedule, int(warmup), steps)
    scale: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.chain(
            scale[name](),
            optax.add_decayed_weights(weight_decay, mask=_matrices),
            optax.scale_by_learning_rate(rate),
        ),
    )
    return Optimizer(optimizer, rate)


def _rate(peak: float, schedule: str, warmup: int, steps: int) -> optax.Schedule:
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, steps - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup),
    }[schedule]()

    def rising(step: Any) -> Any:
        # the first update already moves: step 0 of a warm-up over n steps has 1/n of the peak
        return peak * (step + 1) / max(1, warmup)

    return optax.join_schedules([rising, after], [warmup])


_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")


def _matrices(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)
