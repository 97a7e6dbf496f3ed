"""Export the policy of a finished loop: the model folder with its card, held-out samples, and the closing tables."""

from __future__ import annotations

from typing import Any

from xpo_jax.evaluation.result import Evaluation
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.setup import Components
from xpo_jax.models.hf import adapter, model_folder
from xpo_jax.reporting import model_card, summary
from xpo_jax.runtime.collectives import all_or_none
from xpo_jax.values import Params


def export(
    components: Components,
    directory: RunDir,
    params: Params,
    start: Evaluation,
    latest: Evaluation,
    *,
    step: int,
) -> dict[str, Any]:
    """Write the export and print the tables of the end.

    Args:
      components, directory: of the run.
      params: float32 master weights; with adapters theirs, which are exported merged and, in adapter/, alone.
      start, latest: the evaluation before the first step, and that of `params`. step: of `params`.

    Returns:
      The part of the run's result that the evaluations give.
    """
    config, models = components.config, components.models
    selection = components.selection
    measured = {**summary.result_fields(start, latest), **selection.result(latest)}
    card = model_card.card(
        config.top, models.policy, models.reference, measured, held_out=len(latest.samples), step=step
    )
    sampling = config.sampling
    generation = {
        # a server that reads these samples as the policy was trained
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or None,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": list(models.end_tokens(sampling)),
        "max_new_tokens": sampling.max_new_tokens,
    }
    weights = params
    if config.lora.rank:
        folder, shapes = models.policy.folder, models.config
        weights = adapter.merged(folder, shapes, params, config.lora)
        adapter.save_adapter(directory.path / "adapter", params, shapes, config.lora, models.policy.name)
    model_folder.save(
        directory.path / "export",
        weights,
        models.config,
        models.policy.folder,
        generation=generation,
        card=card,
        replace=True,
    )
    with all_or_none("writing samples"):
        directory.write_samples("held_out", latest.samples)
    print(summary.end_tables(start, latest, summary.example_samples(latest, config.top.seed)), flush=True)
    if line := selection.line(step, latest):
        print(f"\n{line}", flush=True)
    return measured
