"""What stands around the loop of a run, whichever loop it is: its start, what happens between two steps, its end.

    run       once per command: the parts, the run directory, the ledger; then a loop; then the report
    start     compile, load, evaluate before the first step
    Started   what a loop works with; `between` two of its steps, and `end` after the last

The loops are train.py, which samples and asks a judge, and offline.py, which learns from verdicts that are there.

Left out on purpose: whatever a step does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.evaluation import evaluator
from xpo_jax.experiment.resume import Ledger
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.setup import (
    Parts,
    common,
    fingerprints,
    make_evaluator,
    of_evaluations,
    origins,
    prepare,
)
from xpo_jax.judges.contract import DeviceJudge
from xpo_jax.models.hf import model_folder
from xpo_jax.reporting import model_card, report, summary
from xpo_jax.reporting.metrics import Metrics
from xpo_jax.runtime import collectives, distributed
from xpo_jax.runtime.collectives import all_or_none, run_and_gather
from xpo_jax.runtime.compilation import CompilationCounter
from xpo_jax.runtime.interruption import Signals, Watchdog
from xpo_jax.runtime.profiling import Tracing
from xpo_jax.values import Params, TrainState

Loop = Callable[[Parts, RunDir, Ledger, CompilationCounter], dict[str, Any]]


def run(config: ConfigDict, loop: Loop, *, accept_changes: bool) -> dict[str, Any]:
    """Run an experiment from its first step, or from where it was interrupted, to its export.

    Args:
      loop: gets the parts, the run directory, the ledger and the count of compilations; returns the result.
      accept_changes: go on with an interrupted run even if the config differs in what may not change.

    Returns:
      What the last line of a run shows.

    Raises:
      ValueError: whatever is wrong with config, data, model or judge, in one line. What can be known before
        the run directory exists is raised before it is made.
      Stopped: told to by a signal, and saved as far as it was.
    """
    begun, compilations = time.monotonic(), CompilationCounter()
    with Signals() as signals:

        def prepare_parts() -> tuple[Parts, dict[str, Any]]:
            parts = prepare(config)
            return parts, {"config": common(config), "prompts": fingerprints(parts)}

        p, values = run_and_gather("preparing", prepare_parts)
        collectives.require_equal(values)
        with (
            RunDir.join(p.top.run_dir, configs.serialize(config), accept_changes=accept_changes) as run_dir,
            Watchdog(p.top.max_step_seconds) as watchdog,
        ):
            if run_dir.result is not None:
                print(f"{run_dir.address} holds this run, finished; delete that folder to run it again")
                return run_dir.result
            ledger = Ledger(
                run_dir,
                p.checkpoint,
                steps=p.top.steps,
                reference_step=p.reference_step,
                evaluations=of_evaluations(config),
                devices=f"{dict(p.programs.model.mesh.shape)} of {jax.process_count()}",
                accept_changes=accept_changes,
                failure_tolerance=p.failure_tolerance,
                signals=signals,
                watchdog=watchdog,
            )
            result = loop(p, run_dir, ledger, compilations)
            result["seconds"] = round(time.monotonic() - begun, 1)
            with all_or_none("finishing"):
                run_dir.finish(result)
                if distributed.is_lead_process():
                    report.write(run_dir.path)
            run_dir.push()
            return result


def start(
    p: Parts, run: RunDir, ledger: Ledger, compilations: CompilationCounter
) -> tuple[TrainState, Params, Params, Started]:
    """Compile, load, and evaluate what there is before the first step.

    Returns:
      The state to begin with; the policy and the reference as they are sampled from; and what the loop works with,
      which keeps none of them alive but a first reference, that all evaluations need.
    """
    programs = p.programs
    device_judge = p.judge if isinstance(p.judge, DeviceJudge) else None
    declared_programs = [
        *programs.declared_programs(),
        *(device_judge.declared_programs() if device_judge else ()),
    ]
    with all_or_none("writing the environment"):
        run.write_environment(origins(p))
    described = {**ledger.described(), **p.described}
    print(summary.start_table(programs, described, compilations=len(declared_programs)), flush=True)
    with all_or_none("compiling"):
        for name, compile_program in summary.progress(declared_programs, "compiling"):
            ledger.beat(f"compiling {name}")
            compile_program()
    compiled = compilations.count

    ledger.beat("loading the models")
    renewed = _renewed(p, ledger)
    state, reference = _load(p, ledger)
    done = ledger.newest or 0
    if run.changes:  # by which somebody may have mended what made it skip
        ledger.counters.skipped_in_a_row = 0
    policy = programs.for_sampling(state.params)
    weights = {"reference": int(programs.fingerprint(reference)), "policy": int(programs.fingerprint(policy))}
    ledger.vouch(weights["reference"])
    with all_or_none("writing the environment"):
        run.add_to_environment({"weights": {**weights, "step": done}})
    if device_judge:
        with all_or_none("loading the judge"):
            device_judge.load(reference if p.reference.folder == p.model.folder else None)
    ledger.arrive(done, state, {})
    first = _first_policy(p, reference) if done else policy
    during = lambda: compilations.count - compiled  # noqa: E731
    started = Started(p, run, ledger, reference, first, len(declared_programs), during)
    return state, policy, reference if renewed is None else renewed, started


class Started:
    """A run between its start and its end.

    tracing: around the loop; `between` tells it of the steps.
    before, after: the evaluation before the first step, and the latest.
    """

    def __init__(
        self,
        p: Parts,
        run: RunDir,
        ledger: Ledger,
        reference: Params,
        first: Params,
        declared_programs: int,
        compiled_during: Callable[[], int],
    ):
        """Evaluates `first`, the policy of step 0; the last two arguments count compilations, for the result."""
        self._p, self._run, self._ledger = p, run, ledger
        self._announced, self._compiled_during = declared_programs, compiled_during
        self.tracing = Tracing(run.path / "profile" if p.logging.profile else None, ledger.newest or 0)
        self._evaluator = make_evaluator(p, reference)
        self.before = self.after = self._evaluated(first, 0)
        print(summary.evaluation_line("before", self.before), flush=True)
        # raises for what the judge does not tell
        evaluator.ended_by(self.before, self.before, **p.evaluation.stops)

    def _evaluated(self, weights: Params, step: int) -> evaluator.Evaluation:
        label = f"evaluating step {step}" if step else "evaluating the start"

        def progress(batches: Iterable[Any]) -> Iterator[Any]:
            for batch in summary.progress(batches, label):
                self._ledger.beat(label)
                yield batch

        return self._ledger.evaluation(step, lambda: self._evaluator(weights, step, progress))

    def metrics(self, first_step: int, console: Sequence[str] = summary.CONSOLE) -> Metrics:
        """The files that the run's metrics go to, for `Ledger.open`; `console` names those of its table."""
        return Metrics(
            self._run.path,
            tensorboard=self._p.logging.tensorboard,
            wandb=self._p.logging.wandb,
            first_step=first_step,
            total_steps=self._p.top.steps,
            console=console,
            console_every_steps=self._p.logging.table_every_steps,
            writes=distributed.is_lead_process(),
        )

    def between(self, done: int, policy: Params, *, asks: bool) -> str | None:
        """`done` updates are behind us. What they came to is written down, and a run can go on from here.

        Args:
          policy: as it is sampled from, for an evaluation that is due.
          asks: whether a step asks the judge.

        Returns:
          The config's field that ends the run here, if one does.

        Raises:
          FloatingPointError: too many updates in a row were skipped; the state is saved.
        """
        p, counters, every = self._p, self._ledger.counters, self._p.evaluation.every_steps
        ended = self._ended(done, asks)
        evaluates = bool(ended or done == 0 or (every and done % every == 0))
        if evaluates and done:
            self.after = self._evaluated(policy, done)
            ended = ended or evaluator.ended_by(self.before, self.after, **p.evaluation.stops)
        shown = summary.example_samples(self.after, p.top.seed) if evaluates else ()
        self._ledger.settle(score=self.after.win_rate if evaluates else None, samples=shown, last=bool(ended))
        if counters.skipped_in_a_row >= p.top.max_skipped:
            saved = self._ledger.save()
            with all_or_none("learning"):
                raise FloatingPointError(
                    f"step {done}: loss or gradient was not finite {counters.skipped_in_a_row} times in a row; the"
                    f" last good weights are in {saved}; lower optimizer.learning_rate or loss.alpha"
                )
        if not ended:
            self.tracing.at(done)
        return ended or None

    def _ended(self, done: int, asks: bool) -> str | None:
        if done >= self._p.top.steps:
            return "steps"
        rows = int(self._p.batches[done].valid.sum()) if asks else 0
        counters = self._ledger.counters
        spent = counters.queries + counters.evaluation_queries
        return None if self._p.budget.allows(spent, done, rows) else "judging.max_queries"

    def end(self, state: TrainState, done: int, ended: str) -> dict[str, Any]:
        """Export, and print what came of it; returns the result but for its seconds.

        Args:
          done: updates.
          ended: as `between` told it.
        """
        p, ledger, run, programs = self._p, self._ledger, self._run, self._p.programs
        ledger.beat("exporting")
        compiled_during, exported = self._compiled_during(), done
        if p.checkpoint.export == "best" and (best := ledger.best()) not in (None, done):
            del state
            exported = best
            state = ledger.state_of(exported, programs.abstract_state)
            self.after = self._evaluated(programs.for_sampling(state.params), exported)
        after = self.after
        measured = summary.result_fields(self.before, after)
        card = model_card.card(p.top, p.model, p.reference, measured, held_out=len(after.samples))
        model_folder.save(
            run.path / "export", state.params, p.model_config, p.model.folder, card=card, replace=True
        )
        with all_or_none("writing samples"):
            run.write_samples("held_out", after.samples)
        print(summary.end_tables(self.before, after, summary.example_samples(after, p.top.seed)), flush=True)
        if ended != "steps":
            limit = {f"evaluation.{name}": value for name, value in p.evaluation.stops.items()}
            limit["judging.max_queries"] = p.budget.max_queries
            print(f"\nended after {done} of {p.top.steps} steps: {ended} is {limit[ended]}")
        return {
            "steps": done,
            "ended_by": ended,
            "exported_step": exported,
            "judge_queries": ledger.counters.queries,
            "evaluation_queries": ledger.counters.evaluation_queries,
            **measured,
            "updates": int(state.step),
            "skipped": int(state.skipped),
            "compilations_declared": self._announced,
            "compilations_during_run": compiled_during,
            "run_dir": run.address,
            "export": f"{run.address}/export",
        }


def _load(p: Parts, ledger: Ledger) -> tuple[TrainState, Params]:
    """The state to begin with, and the reference's weights as they are sampled from: the only form it is held in."""
    programs, reference, fresh = p.programs, None, ledger.newest is None
    with all_or_none("loading the models"):
        if fresh:
            masters = model_folder.load_params(
                p.model.folder, p.model_config, shardings=programs.model.params_sharding
            )
        if not fresh or p.reference.folder != p.model.folder:
            reference = _weights(p, p.reference.folder)
    state: TrainState = programs.init(masters) if fresh else ledger.restore(programs.abstract_state)
    return state, programs.for_sampling(state.params) if reference is None else reference


def _renewed(p: Parts, ledger: Ledger) -> Params | None:
    """The reference as it is sampled from, where a run goes on with one that was its policy once.

    Before anything else is loaded: what comes with it, an optimizer's state, is large.
    """
    step = p.reference_step(ledger.newest or 0)
    return p.programs.for_sampling(ledger.state_of(step, p.programs.abstract_state).params) if step else None


def _first_policy(p: Parts, reference: Params) -> Params:
    """The policy of step 0 as it is sampled from, where a run goes on from a later step."""
    return reference if p.reference.folder == p.model.folder else _weights(p, p.model.folder)


def _weights(p: Parts, folder: Path) -> Params:
    programs = p.programs
    return model_folder.load_weights(
        folder, p.model_config, dtype=programs.model.dtype, shardings=programs.model.weights_sharding
    )
