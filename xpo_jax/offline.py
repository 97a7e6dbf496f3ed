"""Learn from pairs that were judged before, through the same update as train.py: offline DPO.

The batches of an epoch are a seeded permutation of the pairs, with random access by step, so an interrupted run resumes
as any other. The judge is queried in evaluations alone.

Left out on purpose: `objective/kl` and `objective/entropy`, which are means over fresh samples of the policy, because
nothing is sampled here. Held-out `eval/kl` and `eval/entropy` are over fresh samples, as in any run.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xpo_jax.data.offline_pairs import recorded_pairs
from xpo_jax.experiment import startup
from xpo_jax.experiment.session import Context
from xpo_jax.experiment.step import step_metrics, update_policy
from xpo_jax.judges import ask
from xpo_jax.reporting.metrics import Timer
from xpo_jax.values import Pairs

# The columns of the console's table, the most important first.
CONSOLE = (
    "pairs/epochs",
    "rewards/margins",
    "rewards/accuracies",
    "loss/total",
    "grad_norm",
    "tokens_per_second",
)


def learn(config: ConfigDict, *, accept_changes: bool = False) -> dict[str, Any]:
    """Run an experiment whose `offline` names recorded pairs, to its export; see `startup.run`."""
    return startup.run(config, _learn, accept_changes=accept_changes)


def _learn(context: Context) -> dict[str, Any]:
    components = context.components
    programs, data = components.programs, components.data
    timer = Timer(jax.profiler.TraceAnnotation)

    state, base, policy, reference, ready = startup.start(context)
    done = ready.step
    with startup.open_session(ready, CONSOLE, asks_judge=False) as session:
        while True:
            # Between two steps.
            session.evaluate_if_due(done, policy)
            session.checkpoint_if_due(done)
            if session.should_stop():
                break
            session.begin_step(done)

            # Update on the recorded pairs of this step.
            prompts = data.batches[done]
            responses = recorded_pairs(prompts, programs.max_new_tokens, data.prompts.pad_id)
            policy = None  # frees the memory of the old weights for the update
            with timer("update"):
                # The rows that fill up a partial batch are scored too: which rows share a micro-batch decides how sums
                # round, and runs of earlier versions scored them.
                all_rows = prompts._replace(valid=np.ones_like(prompts.valid))
                micro_batches = programs.pack(all_rows, responses.tokens, responses.lengths)
                pairs = Pairs(
                    prompts.tokens,
                    prompts.lengths,
                    responses.tokens,
                    responses.lengths,
                    jax.device_get(programs.score(reference, micro_batches)),
                    responses.p_first,
                    responses.weight,
                    prompts.valid,
                )
                update = update_policy(
                    programs,
                    state,
                    base,
                    pairs,
                    micro_batches if prompts.valid.all() else programs.pack_pairs(pairs),
                    alpha=components.coefficients.alpha(done),
                    beta=components.coefficients.beta(done),
                )
            state, policy = update.state, update.policy

            # Metrics.
            done += 1
            wins = ask.wins(responses.p_first[prompts.valid])
            metrics = step_metrics(
                update,
                session.counters,
                data={
                    "pairs/first_wins": float(wins.mean()),
                    "pairs/tie_rate": float(np.mean(wins == 0.5)),
                    "pairs/epochs": done / data.batches.steps_per_epoch,
                },
                times=timer.take(),
                tokens=responses.lengths[:, prompts.valid].sum(),
            )
            del update  # or it would hold these weights during the next update
            known = {name: value for name, value in metrics.items() if not name.startswith("objective/")}
            session.record_step(done, state, known)

    policy = reference = None  # frees their memory for the export
    return session.end(state, base, done)
