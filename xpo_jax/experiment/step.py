"""What the steps of both loops have in common: the update, and the metrics of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from xpo_jax.algorithm.packing import MicroBatch
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.update import applied_metrics, summarise
from xpo_jax.experiment.resume import Counters
from xpo_jax.values import Pairs, Params, TrainState


class Update(NamedTuple):
    """The updates of one step.

    state, policy: after the last of them; the policy as it is sampled from.
    summaries: metrics of each update, see `update.summarise`.
    applied: how each was applied, see `update.applied_metrics`; on the host.
    alpha, beta: the coefficients of all of them.
    """

    state: TrainState
    policy: Params
    summaries: list[dict[str, float]]
    applied: list[Mapping[str, Any]]
    alpha: float
    beta: float


def update_policy(
    programs: Programs,
    state: TrainState,
    base: Params,
    fresh: Pairs,
    micro_batches: list[MicroBatch],
    *,
    replayed: Iterable[Pairs] = (),
    alpha: float,
    beta: float,
) -> Update:
    """Update the policy on the fresh pairs, then once on each batch of replayed ones; wait for the results.

    Args:
      programs: of the run.
      state: its buffers are donated, so only the returned state can be used afterwards.
      base: the weights that are not trained, see `Programs.policy`.
      fresh: the pairs of this step. micro_batches: the same, packed.
      replayed: see `ReplayBuffer.minibatches`.
      alpha, beta: see losses.py.
    """
    frozen = programs.for_update(base)
    state, *result = programs.update(state, frozen, fresh, micro_batches, alpha, beta)
    results = [result]
    for pairs in replayed:
        state, *result = programs.update(state, frozen, pairs, programs.pack_pairs(pairs), alpha, beta)
        results.append(result)
    del frozen
    policy = programs.policy(base, state.params)
    results = jax.device_get(results)
    summaries = [summarise(sums, beta) for sums, _ in results]
    return Update(state, policy, summaries, [applied for _, applied in results], alpha, beta)


def step_metrics(
    update: Update,
    counters: Counters,
    *,
    data: Mapping[str, float],
    times: Mapping[str, float],
    tokens: int,
) -> dict[str, Any]:
    """Count the skipped updates of a step, and return its metrics in the order of metrics.jsonl.

    Args:
      update: of the step.
      counters: of the run; `skipped_in_a_row` is counted here.
      data: metrics of the prompts, verdicts and pairs that the step learned from.
      times: seconds of its parts, see `metrics.Timer`.
      tokens: of the valid responses that it learned from.
    """
    for applied in update.applied:
        counters.skipped_in_a_row = 0 if applied["finite"] else counters.skipped_in_a_row + 1
    return {
        **update.summaries[0],
        **data,
        "judge/queries": counters.queries,
        **applied_metrics(update.applied, update.alpha, update.beta),
        **times,
        "tokens_per_second": float(tokens / sum(times.values())),
    }
