"""A run before its loop: components and run directory, compilation, loading, and the evaluation before the first step.

run            once per command: prepares; then the loop; then the report
start          compile, load and evaluate
open_session   open the logs; gives the loop its `Session`
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.evaluation.result import ended_by
from xpo_jax.experiment import descriptions, resume, setup, starting_weights
from xpo_jax.experiment.evaluation_cache import CachedEvaluator, EvaluationCache
from xpo_jax.experiment.inputs import evaluation_identity, input_fingerprints
from xpo_jax.experiment.resume import CheckpointSession
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.run_recorder import open_logs
from xpo_jax.experiment.save_on_error import save_on_error
from xpo_jax.experiment.session import Context, Ready, Session
from xpo_jax.experiment.setup import Components
from xpo_jax.experiment.starting_weights import Weights
from xpo_jax.judges import contract, outcomes
from xpo_jax.judges.contract import DeviceJudge
from xpo_jax.reporting import report, summary, writers
from xpo_jax.reporting.metrics import Metrics
from xpo_jax.reporting.writers import Writer
from xpo_jax.runtime import collectives, distributed
from xpo_jax.runtime.collectives import all_or_none, run_and_gather
from xpo_jax.runtime.compilation import CompilationCounter
from xpo_jax.runtime.interruption import Signals, Watchdog
from xpo_jax.runtime.profiling import Profiler
from xpo_jax.values import Params, TrainState

Loop = Callable[[Context], dict[str, Any]]


def run(config: ConfigDict, loop: Loop, *, accept_changes: bool) -> dict[str, Any]:
    """Run an experiment from its first step, or from where it was interrupted, to its export.

    Args:
      config: of the experiment.
      loop: calls `start`, and returns what `Session.end` returns.
      accept_changes: resume an interrupted run even if the config differs in what may not change.

    Returns:
      What the last line of a run shows.

    Raises:
      ValueError: anything wrong with config, data, model or judge, in one line. What can be known before the run
        directory exists is raised before it is made.
      Stopped: a signal stopped the run, which is saved as far as it came.
    """
    started, compilations = time.monotonic(), CompilationCounter()

    def prepare() -> tuple[tuple[Components, dict[str, str]], dict[str, str]]:
        components = setup.prepare(config)
        inputs = input_fingerprints(config, components)
        return (components, inputs), {"config": descriptions.shared_config(config), **inputs}

    with Signals() as signals:
        (components, inputs), values = run_and_gather("preparing", prepare)
        collectives.require_equal(values)
        top = components.config.top
        with (
            RunDir.join(
                top.run_dir, configs.serialize(config), inputs, accept_changes=accept_changes
            ) as directory,
            Watchdog(top.max_step_seconds) as watchdog,
        ):
            if directory.result is not None:
                print(f"{directory.address} holds this run, finished; delete that folder to run it again")
                return directory.result
            with _writers(components, directory) as others:
                context = Context(
                    components,
                    directory,
                    inputs,
                    evaluation_identity(config, inputs),
                    accept_changes,
                    signals,
                    watchdog,
                    compilations,
                    others,
                )
                try:
                    result = loop(context)
                except (ValueError, FloatingPointError):
                    _report_failure(directory)
                    raise
                result["seconds"] = round(time.monotonic() - started, 1)
                with all_or_none("finishing"):
                    directory.finish(result)
                    if distributed.is_lead_process():
                        report.write(directory.path)
                directory.push()
            return result


def _report_failure(directory: RunDir) -> None:
    """Write the report of a run that ends early, which shows why one that learns nothing does."""
    if distributed.is_lead_process():
        with contextlib.suppress(Exception):  # before the first evaluation there is nothing to show
            report.write(directory.path)


class Start(NamedTuple):
    """What a loop starts with.

    state: to update. base: what is not trained, see `Programs.policy`. policy, reference: as they are sampled from.
    ready: for `open_session`. It keeps no weights alive but the first reference's, which all evaluations need.
    """

    state: TrainState
    base: Params
    policy: Params
    reference: Params
    ready: Ready


def start(context: Context) -> Start:
    """Compile and load everything, and evaluate before the first step."""
    components, directory = context.components, context.directory
    programs, judge = components.programs, components.judging.judge
    newest = resume.find_newest(directory, components.config.top.steps)
    declared = _compile(context, newest)
    compilations = context.compilations.count

    context.watchdog.beat("loading the models")
    weights = starting_weights.load(components, directory, newest)
    policy = programs.policy(weights.base, weights.state.params)
    checksums = {
        "reference": int(programs.fingerprint(weights.first_reference)),
        "policy": int(programs.fingerprint(policy)),
    }
    identity = resume.check_identity(
        directory, weights.restored, checksums["reference"], accept_changes=context.accept_changes
    )
    with all_or_none("writing the environment"):
        directory.add_to_environment({"weights": {**checksums, "step": newest or 0}})
    starts_as_reference = components.models.starts_as_reference
    if isinstance(judge, DeviceJudge):
        with all_or_none("loading the judge"):
            judge.load(weights.base or (weights.first_reference if starts_as_reference else None))
    first_policy = policy if weights.first_policy is None else weights.first_policy
    if newest and weights.first_policy is None:
        first_policy = (
            weights.first_reference
            if starts_as_reference
            else starting_weights.load_for_sampling(components, components.models.policy.folder)
        )
    evaluate = _evaluator(context, weights)
    start_evaluation = evaluate(first_policy, 0)
    print(summary.evaluation_line("before", start_evaluation.evaluation), flush=True)
    summary.warn(outcomes.problem(start_evaluation.evaluation.outcomes), "before the first step")
    summary.warn(contract.doubt(components.judging.evaluation_judge), "before the first step")
    summary.warn(components.coefficients.doubt, "before the first step")
    # both raise if a criterion, of stopping or of the export, uses a metric that this judge does not report
    ended_by(start_evaluation.evaluation, start_evaluation.evaluation, **components.config.evaluation.stops)
    components.selection.check(start_evaluation.evaluation)
    ready = Ready(
        context, weights.state, weights.restored, identity, evaluate, start_evaluation, declared, compilations
    )
    return Start(weights.state, weights.base, policy, weights.reference, ready)


@contextlib.contextmanager
def open_session(ready: Ready, console: Sequence[str], *, asks_judge: bool) -> Iterator[Session]:
    """Open logs and checkpoints for the loop, and hold signals back until the end of a step.

    Args:
      ready: what `start` prepared.
      console: names of the metrics in the console's table.
      asks_judge: whether a step queries the judge.
    """
    config, directory = ready.context.components.config, ready.context.directory

    def metrics(first_step: int) -> Metrics:
        return Metrics(
            directory.path,
            others=ready.context.others,
            first_step=first_step,
            total_steps=config.top.steps,
            console=console,
            console_every_steps=config.logging.table_every_steps,
            writes=distributed.is_lead_process(),
        )

    checkpoints = CheckpointSession(
        directory,
        config.checkpoint,
        ready.context.components.selection,
        reference_step=config.model.reference_step,
        identity=ready.identity,
        restored_step=ready.restored.step,
    )
    profile = directory.path / "profile" if config.logging.profile else None
    with (
        open_logs(directory, ready.restored, metrics) as recorder,
        checkpoints,
        ready.context.signals.deferred(),
        Profiler(profile, ready.step) as profiler,
    ):
        session = Session(ready, recorder, checkpoints, profiler, asks_judge=asks_judge)
        with save_on_error(session.save_if_possible):
            yield session


@contextlib.contextmanager
def _writers(components: Components, directory: RunDir) -> Iterator[Sequence[Writer]]:
    """Open what the metrics go to besides the run directory, before anything is paid for, and on process 0 alone."""
    logging, is_lead = components.config.logging, distributed.is_lead_process()
    enabled = {name: is_lead and getattr(logging, name) for name in ("tensorboard", "wandb")}
    with contextlib.ExitStack() as stack:
        with all_or_none("opening TensorBoard and Weights & Biases"):
            others = stack.enter_context(writers.opened(directory.path, **enabled))
        yield others


def _compile(context: Context, newest: int | None) -> int:
    """Print what the run is, compile its programs, and return how many there are."""
    components, directory = context.components, context.directory
    judge = components.judging.judge
    judge_programs = judge.declared_programs() if isinstance(judge, DeviceJudge) else ()
    declared = [*components.programs.declared_programs(), *judge_programs]
    with all_or_none("writing the environment"):
        directory.write_environment(descriptions.provenance(components) | {"inputs": context.inputs})
    resumed = "" if newest is None else f"after step {newest}, whose checkpoint is complete"
    fields = {"run": directory.address, "resumes": resumed, "changed": "; ".join(directory.changes)}
    fields = {name: text for name, text in fields.items() if text} | descriptions.summary_rows(components)
    print(summary.start_table(components.programs, fields, compilations=len(declared)), flush=True)
    with all_or_none("compiling"):
        for name, compile_program in summary.progress(declared, "compiling"):
            context.watchdog.beat(f"compiling {name}")
            compile_program()
    return len(declared)


def _evaluator(context: Context, weights: Weights) -> CachedEvaluator:
    """Return the held-out evaluation against the first reference."""
    components = context.components
    cache = EvaluationCache(
        context.directory.path,
        identity=context.evaluation_identity,
        devices=f"{dict(components.programs.model.mesh.shape)} of {jax.process_count()}",
        restored_step=weights.restored.step,
    )
    return CachedEvaluator(
        setup.make_evaluator(components, weights.first_reference),
        cache,
        components.judging.failure_tolerance,
        context.watchdog.beat,
    )
