"""The programs that a run declares, made from a plan's shapes for devices that need not be attached.

They are those of `experiment.setup`, without data or weights: every bucket of the config counts as used. The size and
end tokens of the tokenizer, which are constants in some programs, are read if model.path is a folder that has one;
otherwise a program has the bytes and operations of the run's, but not all of its constants. A judge's never are read.

Left out on purpose: the gathers of runs with several processes, which move a few tokens, and judges that are neither
"llm" nor "reasoning".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.model_spec import ModelSpec, compute_dtype, make_model_spec
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import Vocabulary
from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.config import loader as configs
from xpo_jax.experiment.groups import check_groups
from xpo_jax.io.user_paths import expand
from xpo_jax.judges.device_model import TokenChoiceScorer
from xpo_jax.judges.device_sampler import CompletionSampler
from xpo_jax.models import attention_kernels
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.runtime import sharding

from .estimate import Setup

Declared = tuple[str, Callable[[], object]]


class Declaration(NamedTuple):
    """All programs of a run.

    programs: each with its label and the call that compiles it.
    spec: of the model that they are for.
    has_tokenizer: whether their constants are those of the run.
    """

    programs: list[Declared]
    spec: ModelSpec
    has_tokenizer: bool


def declare(planned: Setup, config: ConfigDict, devices: Sequence[Any]) -> Declaration:
    """Declare the programs of a run of `config` on these devices.

    Args:
      planned, config: as `fit.setup` returns them.
      devices: of a topology.

    Raises:
      ValueError: sizes that do not divide, or a kernel that these devices lack.
    """
    checked = check_groups(config)
    groups = checked.groups
    top, model, layout, sampling = groups.top, groups.model, groups.layout, groups.sampling
    mesh = sharding.mesh_over(devices, **config.mesh)
    dtype = compute_dtype(model.dtype, sharding.platform(mesh))
    attention_kernels.check(model.attention, devices[0], dtype=dtype, head_dim=planned.model.head_dim)
    buckets = tuple(config.data.buckets)
    spec = make_model_spec(
        mesh,
        planned.model,
        dtype=dtype,
        remat=layout.remat,
        attention=model.attention,
        lora=planned.lora,
        batch_size=top.batch_size,
        prompt_tokens=buckets[-1],
    )
    shapes = BatchShapes(
        batch_size=top.batch_size,
        prompt_buckets=buckets,
        micro_batch_rows=layout.micro_batch_rows,
        chunk_tokens=layout.chunk_tokens,
        prefetch_depth=planned.reference_steps,
        prefill_rows=planned.prefill_rows,
        candidates=planned.candidates,
    )
    vocabulary = _vocabulary(planned, model.path, sampling)
    programs = Programs(
        spec,
        shapes,
        sampling,
        vocabulary or Vocabulary(planned.model.vocab_size, (planned.model.vocab_size - 1,), 0),
        optimizer=checked.optimizer,
        loss=checked.loss_fn,
        entropy_weight=groups.loss.entropy_weight,
        seed=top.seed,
    )
    declared = [*programs.declared_programs(), *_judge(planned, config, mesh, dtype)]
    return Declaration(declared, spec, vocabulary is not None)


def _vocabulary(planned: Setup, path: str, sampling: Sampling) -> Vocabulary | None:
    """Return what the run's programs contain of the tokenizer; None if model.path has none on this machine."""
    folder = Path(expand(path))
    if path == "embedded":
        folder = hub.find(path).folder
    if not (folder / "tokenizer.json").is_file() or model_folder.read_config(folder) != planned.model:
        return None
    tokenizer = model_folder.load_tokenizer(folder, planned.model)
    end_tokens = model_folder.end_token_ids(folder, tokenizer, sampling.end_tokens)
    return Vocabulary(len(tokenizer), end_tokens, model_folder.pad_token_id(folder, tokenizer))


def _judge(planned: Setup, config: ConfigDict, mesh: Any, dtype: Any) -> list[Declared]:
    if planned.judge is None:
        return []
    model = planned.judge.model or planned.model
    options = {"dtype": dtype, "batch_size": planned.judge.rows, "buckets": config.judge.buckets}
    options["vocab_size"] = model.vocab_size
    if planned.judge.new_tokens:
        drawn = configs.build(Sampling, config.judge.sampling, "judge.sampling")
        ends = {"end_tokens": (model.vocab_size - 1,), "pad_token": 0}
        return CompletionSampler(mesh, model, sampling=drawn, **ends, **options).declared_programs()
    return TokenChoiceScorer(
        mesh, model, tokens=range(len(config.judge.labels)), **options
    ).declared_programs()


def longest(programs: Sequence[Declared]) -> list[Declared]:
    """Return, of the programs that differ in their sequence length, only the one with the longest."""
    last = {label.split()[0]: (label, call) for label, call in programs}  # lengths increase
    return list(last.values())
