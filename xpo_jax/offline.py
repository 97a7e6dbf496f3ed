"""Learning from pairs that were judged before, through the same update as train.py: offline DPO.

The pairs of a batch are a seeded permutation per epoch, random access by step, so a run that was interrupted goes on as
any other. The judge is asked in evaluations alone.

Nothing is sampled, so nothing is known here of the policy's own answers: `objective/kl` and `objective/entropy`, which
are means over fresh ones, are left out on purpose. Held-out `eval/kl` and `eval/entropy` are of fresh answers, as ever.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from xpo_jax.algorithm.update import applied_metrics, summarise
from xpo_jax.data.offline_pairs import recorded_pairs
from xpo_jax.experiment import session
from xpo_jax.experiment.resume import Ledger
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.setup import Parts
from xpo_jax.judges import ask, limits
from xpo_jax.reporting.metrics import Timer
from xpo_jax.runtime.compilation import CompilationCounter
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
    """Run an experiment whose `offline` names recorded pairs, to its export; see `session.run`."""
    return session.run(config, _learn, accept_changes=accept_changes)


def _learn(p: Parts, run: RunDir, ledger: Ledger, compilations: CompilationCounter) -> dict[str, Any]:
    state, policy, reference, started = session.start(p, run, ledger, compilations)
    programs, counters, timer = p.programs, ledger.counters, Timer(jax.profiler.TraceAnnotation)
    done = ledger.newest or 0
    metrics = lambda step: started.metrics(step, CONSOLE)  # noqa: E731
    with ledger.open(metrics), started.tracing, limits.save_on_judge_error(ledger.save):
        while not (ended := started.between(done, policy, asks=False)):
            prompts = p.batches[done]
            answers = recorded_pairs(prompts, programs.max_new_tokens, p.data.pad_id)
            with timer("update"):
                # The rows that fill up a partial batch are scored too: which rows share a micro-batch decides how
                # sums round, and runs of earlier versions scored them.
                all_rows = prompts._replace(valid=np.ones_like(prompts.valid))
                packed = programs.pack(all_rows, answers.tokens, answers.lengths)
                scored = programs.score(reference, packed)
                pairs = Pairs(
                    prompts.tokens,
                    prompts.lengths,
                    answers.tokens,
                    answers.lengths,
                    jax.device_get(scored),
                    answers.p_first,
                    answers.weight,
                    prompts.valid,
                )
                alpha, beta = p.alpha_at(done), p.beta_at(done)
                del policy  # its memory is the update's, until there are new weights
                state, sums, applied = programs.update(
                    state, pairs, packed if prompts.valid.all() else programs.pack_pairs(pairs), alpha, beta
                )
                policy = programs.for_sampling(state.params)
                sums, applied = jax.device_get((sums, applied))

            counters.skipped_in_a_row = 0 if applied["finite"] else counters.skipped_in_a_row + 1
            times, wins = timer.take(), ask.wins(answers.p_first[prompts.valid])
            learned = summarise(sums, beta).items()
            done += 1
            found = {
                **{name: value for name, value in learned if not name.startswith("objective/")},
                "pairs/first_wins": float(wins.mean()),
                "pairs/tie_rate": float(np.mean(wins == 0.5)),
                "pairs/epochs": done / p.batches.steps_per_epoch,
                "judge/queries": counters.queries,
                **applied_metrics([applied], alpha, beta),
                **times,
                "tokens_per_second": float(answers.lengths[:, prompts.valid].sum() / sum(times.values())),
            }
            ledger.arrive(done, state, found)
    del policy
    return started.end(state, done, ended)
