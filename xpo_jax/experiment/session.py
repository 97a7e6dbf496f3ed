"""What a loop does between two steps, whichever loop it is: evaluate, checkpoint, stop; and the end of a run.

    Ready     a run that startup.py has compiled, loaded and evaluated
    Session   what its loop works with; `startup.open_session` makes it

The loops are train.py, which samples and queries a judge, and offline.py, which learns from recorded verdicts.
"""

from __future__ import annotations

import dataclasses
import operator
import signal
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from xpo_jax.evaluation.result import ended_by
from xpo_jax.experiment import resume
from xpo_jax.experiment.early_samples import EarlySamples
from xpo_jax.experiment.evaluation_cache import CachedEvaluator, Evaluated
from xpo_jax.experiment.export import export
from xpo_jax.experiment.judge_progress import JudgeProgress
from xpo_jax.experiment.learning_watch import LearningWatch
from xpo_jax.experiment.resume import CheckpointSession, Counters, Restored, Status
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.run_recorder import RunRecorder
from xpo_jax.experiment.setup import Components
from xpo_jax.reporting import summary
from xpo_jax.reporting.writers import Writer
from xpo_jax.runtime.collectives import all_or_none, run_on_all
from xpo_jax.runtime.compilation import CompilationCounter
from xpo_jax.runtime.interruption import Signals, Stopped, Watchdog
from xpo_jax.runtime.profiling import Profiler
from xpo_jax.values import Params, TrainState


class Context(NamedTuple):
    """What a run has from its first moment; `startup.run` makes it.

    components, directory: of the run.
    inputs: fingerprints of what the config names by path or by import, see inputs.py.
    evaluation_identity: hash of the config fields and inputs that determine evaluation results.
    accept_changes: resume even if the config differs in what may not change.
    signals, watchdog, compilations: of the process.
    others: what the metrics go to besides the run directory.
    """

    # long: a table of what a run has
    components: Components
    directory: RunDir
    inputs: Mapping[str, str]
    evaluation_identity: str
    accept_changes: bool
    signals: Signals
    watchdog: Watchdog
    compilations: CompilationCounter
    others: Sequence[Writer]


class Ready(NamedTuple):
    """A run that can begin its loop; `startup.start` makes it.

    context: of the run.
    state: to begin with, until the loop's first update donates it.
    restored, identity: see resume.py.
    evaluate: held-out evaluation of a policy after some step.
    start: the evaluation before the first step.
    declared_programs: how many programs are compiled before the first step.
    compilations: how many compilations there had been then.
    """

    context: Context
    state: TrainState
    restored: Restored
    identity: Mapping[str, Any]
    evaluate: CachedEvaluator
    start: Evaluated
    declared_programs: int
    compilations: int

    @property
    def step(self) -> int:
        """The number of steps done before the loop."""
        return self.restored.step or 0


@dataclasses.dataclass
class _Step:
    """The results of the last step; status and score from when they are written, pairs: name and length of the log."""

    number: int
    state: TrainState
    metrics: dict[str, Any]
    pairs: tuple[str, int]
    drawn: EarlySamples | None = None
    status: Status | None = None
    score: float | None = None


class Session:
    """A run in its loop.

    counters: what the run has counted; a loop adds its queries and skipped updates. recorder: the logs. learning,
    progress: take what became of each step's pairs.
    ended_by: the config's field that ends the run at the current step, or "".
    """

    def __init__(
        self,
        ready: Ready,
        recorder: RunRecorder,
        checkpoints: CheckpointSession,
        profiler: Profiler,
        *,
        asks_judge: bool,
    ):
        self._ready, self._checkpoints, self._profiler = ready, checkpoints, profiler
        self._components, self._directory = ready.context.components, ready.context.directory
        self._asks_judge, self.recorder, self.ended_by = asks_judge, recorder, ""
        status = ready.restored.status
        self.counters = Counters() if status is None else Counters(**status.counters)
        if self._directory.changes:  # which may have fixed what made the run skip updates or learn nothing
            self.counters.skipped_in_a_row = self.counters.indecisive_in_a_row = 0
        limit = self._components.config.judging.max_indecisive_steps
        self.learning = LearningWatch(self.counters, limit, self._components.judging.judge)
        self.progress = JudgeProgress(self._components, ready.start.evaluation, self.counters)
        self._latest, self._evaluated = ready.start.evaluation, False
        self._step = _Step(ready.step, ready.state, {}, recorder.pairs_offset())
        if ready.step == 0:
            self._record_evaluation(ready.start)

    # ---- between two steps ----

    def evaluate_if_due(self, done: int, policy: Params) -> None:
        """Evaluate the policy, as it is sampled from, if that is due, and determine whether the run ends here."""
        limits = self._components.config.evaluation
        self.ended_by, self._evaluated = self._exhausted(done), self.evaluates(done)
        if self._evaluated and done:
            evaluated = self._ready.evaluate(policy, done)
            self._record_evaluation(evaluated)
            self._latest = evaluated.evaluation
            start = self._ready.start.evaluation
            self.ended_by = self.ended_by or ended_by(start, self._latest, **limits.stops)
        self.progress.show(policy, done, self._latest if self._evaluated else None)

    def evaluates(self, done: int) -> bool:
        """Return whether the policy after `done` steps is evaluated."""
        every = self._components.config.evaluation.every_steps
        return done == 0 or bool(self._exhausted(done)) or (every > 0 and done % every == 0)

    def may_begin(self, steps: range) -> bool:
        """Return whether there are such steps, and the queries suffice for them."""
        return steps.stop <= self._components.config.top.steps and self._affords(steps, evaluated=True)

    def checkpoint_if_due(self, done: int) -> None:
        """Write the metrics of step `done`, and save a checkpoint if one is due.

        Raises:
          Stopped: a process received a signal; the state is saved.
          FloatingPointError: too many updates in a row were skipped; the state is saved.
          ValueError: too many steps in a row without a verdict that prefers a response; the state is saved.
        """
        self._settle(evaluated=self._evaluated)
        if self.counters.skipped_in_a_row >= self._components.config.top.max_skipped:
            folder = self.save_now()
            with all_or_none("learning"):
                raise FloatingPointError(
                    f"step {done}: loss or gradient was not finite {self.counters.skipped_in_a_row} times in a row;"
                    f" the last good weights are in {folder}; lower optimizer.learning_rate or loss.alpha"
                )
        if problem := self.learning.problem():
            folder = self.save_now()
            with all_or_none("learning"):
                raise ValueError(f"step {done}: {problem}; the last weights are in {folder}, see report.html")

    def should_stop(self) -> bool:
        """Return whether the run ends after this step; `ended_by` says why."""
        return bool(self.ended_by)

    def begin_step(self, done: int) -> None:
        """Start or stop the profiler, after `done` steps and before another one."""
        self._profiler.at(done)

    def record_step(
        self, done: int, state: TrainState, metrics: Mapping[str, Any], drawn: EarlySamples | None = None
    ) -> None:
        """Take the results of a step; `checkpoint_if_due` writes them.

        Args:
          done: steps so far. metrics: of this one. state: after it, to be saved until the next update donates it.
          drawn: see `resume.Status`.
        """
        self._step = _Step(done, state, dict(metrics), self.recorder.pairs_offset(), drawn)

    def save_now(self) -> epath.Path:
        """Save the state after the last recorded step, wait for it, and return the checkpoint's folder."""
        if self._step.status is None:
            self._settle(evaluated=False)
        self._save()
        self._checkpoints.wait()
        return self._checkpoints.folder(self._step.number)

    def save_if_possible(self) -> epath.Path | None:
        """Do what `save_now` does, but return None where an update has taken the state's memory already."""
        arrays = [leaf for leaf in jax.tree.leaves(self._step.state) if isinstance(leaf, jax.Array)]
        return None if any(array.is_deleted() for array in arrays) else self.save_now()

    def _exhausted(self, done: int) -> str:
        """Return "steps" or "judging.max_queries" where there may be no further step, else ""."""
        if done >= self._components.config.top.steps:
            return "steps"
        counted = done == self._ready.step  # whether the evaluation that is due here is in the counters
        return "" if self._affords(range(done, done + 1), evaluated=counted) else "judging.max_queries"

    def _affords(self, steps: range, *, evaluated: bool) -> bool:
        counters, batches, judging = self.counters, self._components.data.batches, self._components.judging
        rows = [int(batches[step].valid.sum()) if self._asks_judge else 0 for step in steps]
        spent = judging.spent(counters.queries, counters.evaluation_queries)
        return judging.budget.allows(spent, steps.start, *rows, evaluated=evaluated)

    def _record_evaluation(self, evaluated: Evaluated) -> None:
        if evaluated.is_new:
            self._step.metrics |= evaluated.evaluation.metrics()
            self._step.metrics |= self._components.selection.metrics(evaluated.evaluation)
            self.counters.evaluation_queries += evaluated.evaluation.queries

    def _settle(self, *, evaluated: bool) -> None:
        """Write the metrics of the last recorded step, and save it if that is due or a signal was received."""
        step, seed = self._step, self._components.config.top.seed
        samples = summary.example_samples(self._latest, seed) if evaluated else ()

        def write() -> list[Any]:
            self.recorder.write_step(step.number, step.metrics, samples)
            return [self._ready.context.signals.received, *step.pairs]

        values = run_on_all("writing metrics", write)
        stop = next((number for number, _, _ in values if number), None)
        step.status = Status(
            dataclasses.asdict(self.counters),
            self._components.judging.failure_tolerance.state,
            self._ready.restored.offsets_after({name: offset for _, name, offset in values}),
            step.drawn,
        )
        step.score = self._components.selection.score(self._latest) if evaluated else None
        if self.should_stop() or stop or self._checkpoints.is_due(step.number, evaluated=evaluated):
            self._save()
        if stop:
            self._checkpoints.wait()
            name, steps = signal.Signals(stop).name, self._components.config.top.steps
            saved = f"stopped by {name} after step {step.number} of {steps}, which is saved"
            raise Stopped(stop, f"{saved}; run the same command to resume", on_all_processes=True)
        self._ready.context.watchdog.beat(f"step {step.number + 1}")

    def _save(self) -> None:
        step = self._step
        assert step.status is not None
        self._checkpoints.save(step.number, step.state, step.status, score=step.score)

    # ---- after the last step ----

    def end(self, state: TrainState, base: Params, done: int) -> dict[str, Any]:
        """Export, and print the results.

        Args:
          state: after the last step. done: steps. base: what is not trained, see `Programs.policy`.

        Returns:
          The result of the run, except for its seconds.
        """
        components, context, config = self._components, self._ready.context, self._components.config
        context.watchdog.beat("exporting")
        compiled, exported = context.compilations.count - self._ready.compilations, done
        best = self._checkpoints.best() if components.selection.chooses else None
        if best is not None and best != done:
            exported = best
            state = resume.restore_state(self._directory, exported, components.programs.abstract_state)
            policy = components.programs.policy(base, state.params)
            self._latest = self._ready.evaluate(policy, exported).evaluation
        start = self._ready.start.evaluation
        measured = export(components, self._directory, state.params, start, self._latest, step=exported)
        if self.ended_by != "steps":
            limit = operator.attrgetter(self.ended_by)(config)
            print(f"\nended after {done} of {config.top.steps} steps: {self.ended_by} is {limit}")
        return {
            "steps": done,
            "ended_by": self.ended_by,
            "exported_step": exported,
            "judge_queries": self.counters.queries,
            "evaluation_queries": self.counters.evaluation_queries,
            **measured,
            "updates": int(jax.device_get(state.step)),
            "skipped": int(jax.device_get(state.skipped)),
            "compilations_declared": self._ready.declared_programs,
            "compilations_during_run": compiled,
            "run_dir": self._directory.address,
            "export": f"{self._directory.address}/export",
        }
