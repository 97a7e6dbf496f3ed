"""The weights that a run starts with: loaded for a new run, or restored from a checkpoint.

With adapters, the base is loaded once, in the form in which it is sampled from; policy, reference and an LLM judge of
the same model share its arrays, and checkpoints hold adapters only. A resumed run makes or reads the first adapter
again, because the first reference has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from xpo_jax.experiment import resume
from xpo_jax.experiment.resume import Restored
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.setup import Components
from xpo_jax.models import lora
from xpo_jax.models.hf import adapter, model_folder
from xpo_jax.runtime import distributed
from xpo_jax.runtime.collectives import all_or_none
from xpo_jax.values import Params, TrainState


class Weights(NamedTuple):
    """The weights a run starts with.

    state: to update. restored: where it comes from.
    base: the weights that are not trained, see `Programs.policy`; {} without adapters.
    first_policy: the policy before the first step; None without adapters, where a resumed run may have to read it.
    first_reference, reference: the first and the current reference, as they are sampled from; the same unless the
      policy has become the reference since.
    """

    state: TrainState
    restored: Restored
    base: Params
    first_policy: Params
    first_reference: Params
    reference: Params


def load(components: Components, directory: RunDir, newest: int | None) -> Weights:
    """Load the weights of a new run, or restore those of step `newest`."""
    loading = _adapters if components.config.lora.rank else _all_weights
    return loading(components, directory, newest)


def load_for_sampling(components: Components, folder: Path) -> Params:
    """Load a model without adapters in the form it is sampled from, the only one a reference is held in."""
    spec = components.programs.model
    return model_folder.load_weights(
        folder, components.models.config, dtype=spec.dtype, shardings=spec.model_sharding
    )


def _all_weights(components: Components, directory: RunDir, newest: int | None) -> Weights:
    programs, models = components.programs, components.models
    # A policy that has become the reference is loaded first: its checkpoint holds a large optimizer state, too.
    renewed = _renewed(components, directory, newest, {})
    reference, masters = None, None
    with all_or_none("loading the models"):
        if newest is None:
            masters = model_folder.load_params(
                models.policy.folder, models.config, shardings=programs.model.params_sharding
            )
        if newest is not None or not models.starts_as_reference:
            reference = load_for_sampling(components, models.reference.folder)
    state, restored = _state(components, directory, newest, masters)
    first = programs.for_sampling(state.params) if reference is None else reference
    return Weights(state, restored, {}, None, first, first if renewed is None else renewed)


def _adapters(components: Components, directory: RunDir, newest: int | None) -> Weights:
    programs, models = components.programs, components.models
    with all_or_none("loading the models"):
        base = load_for_sampling(components, models.policy.folder)
        of_reference = base
        if models.reference.folder != models.policy.folder:
            of_reference = load_for_sampling(components, models.reference.folder)
        first = _first_adapter(components)
    renewed = _renewed(components, directory, newest, base)
    split = programs.model.params_sharding
    first_policy = first_reference = programs.policy(base, distributed.put(first, split))
    if not models.starts_as_reference:
        off = distributed.put(lora.switched_off(first), split)
        first_reference = programs.policy(of_reference, off)
    state, restored = _state(components, directory, newest, distributed.put(first, split))
    reference = first_reference if renewed is None else renewed
    return Weights(state, restored, base, first_policy, first_reference, reference)


def _first_adapter(components: Components) -> Params:
    """Return the adapter before the first step, on the host."""
    models, groups = components.models, components.config
    if models.start is not None:
        return adapter.load_adapter(models.start, models.config, groups.lora)
    return lora.initial(components.programs.model.params, groups.top.seed)


def _renewed(components: Components, directory: RunDir, newest: int | None, base: Params) -> Params:
    """Return the policy that has become the reference; None if none has."""
    step = components.config.model.reference_step(newest or 0)
    if not step:
        return None
    programs = components.programs
    return programs.policy(base, resume.restore_state(directory, step, programs.abstract_state).params)


def _state(
    components: Components, directory: RunDir, newest: int | None, masters: Params
) -> tuple[TrainState, Restored]:
    """Return the state before the first step, of these masters, which are donated; or that of step `newest`."""
    programs = components.programs
    if newest is None:
        return programs.init(masters), Restored()
    state, restored = resume.restore(directory, newest, programs.abstract_state)
    assert restored.status is not None
    components.judging.failure_tolerance.state = restored.status.failure_tolerance
    return state, restored
