"""The groups of a config that setup.py reads itself; the other groups are the arguments of their factories.

The fields of a dataclass are the schema of its group; its `__post_init__` checks their values.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The top level of a config.

    Args:
      run_dir: where everything is written, see run_directory.py. seed: of every random draw.
      steps: batches that are sampled and learned from; each makes one update, or replay.updates.
      batch_size: prompts per step, over all devices.
      max_skipped: the run fails after this many skipped updates in a row, whose loss or gradient is not finite.
      max_step_seconds: if a step, an evaluation's batch or a compilation takes longer, the stacks of all threads are
        dumped and the process exits with status 124, so that a supervisor can restart it. None disables this.
      offline: recorded pairs to learn from, see offline.py; None samples and queries the judge.
      Others: the groups, which are documented below or at their factories.
    """

    # long: one field per group
    run_dir: str
    seed: int
    steps: int
    batch_size: int
    max_skipped: int
    max_step_seconds: float | None
    data: Mapping[str, Any]
    offline: Mapping[str, Any] | None
    model: Mapping[str, Any]
    lora: Mapping[str, Any]
    mesh: Mapping[str, Any]
    distributed: Mapping[str, Any]
    sampling: Mapping[str, Any]
    judge: Mapping[str, Any]
    judging: Mapping[str, Any]
    loss: Mapping[str, Any]
    replay: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    layout: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    logging: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.max_step_seconds is not None and self.max_step_seconds <= 0:
            raise ValueError(f"max_step_seconds is {self.max_step_seconds}, must be positive, or None")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, must be from 0 to {2**31 - 1}")
        if "name" not in self.judge:
            raise ValueError(
                'judge.name is missing: give the name of a built-in judge or "package.module:Name"'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Policy and reference.

    Args:
      path: a folder with config.json, *.safetensors and a tokenizer; "owner/name" or "owner/name@revision" on the hub
        (revision: a branch, tag or commit); or "embedded", the project's own.
      reference: another such model, of the same architecture and tokenizer, or None for a frozen copy of the start.
      reference_every_steps: the policy becomes the reference after every multiple of this; None keeps the first one.
        Evaluations are against the first either way. Its effect on the KL: docs/choosing.md.
      dtype: of all computation except the float32 master weights; auto is bfloat16 on accelerators, else float32.
      attention: the implementation, see models/attention_kernels.py; auto is einsum for short sequences, and for long
        ones splash on TPUs, cudnn in bfloat16 on NVIDIA GPUs, and blocks elsewhere.
    """

    path: str
    reference: str | None
    reference_every_steps: int | None
    dtype: Literal["auto", "float32", "bfloat16"]
    attention: Literal["auto", "einsum", "blocks", "cudnn", "splash"]

    def __post_init__(self) -> None:
        if self.reference_every_steps is not None and self.reference_every_steps < 1:
            raise ValueError(
                f"reference_every_steps is {self.reference_every_steps}, must be 1 or more, or None"
            )

    def reference_step(self, done: int) -> int:
        """Return the step at which the reference after `done` steps was copied from the policy; 0: the first one."""
        return done - done % self.reference_every_steps if self.reference_every_steps else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judging:
    """How any judge is queried, and how many failures a run tolerates.

    Args:
      both_orders: query twice, the second time with A and B exchanged: soft verdicts are averaged, hard ones that
        differ tie. Twice the queries; judge/position_flip_rate shows whether that pays.
      hide_thinking: the judge, and only it, reads answers without <think>...</think> blocks; see judges/thinking.py.
      steps_behind: 0, or 1: a step's pairs are drawn one update early, by the policy before the last one, and the judge
        is asked about them while the update before is still under way. For a judge that takes about as long as a step,
        or longer; see `experiment/judged_pairs.py`.
      max_queries: queries that a run may put to the judge, including those of evaluations, or None; see
        `values.Verdicts`. A run ends, with its last evaluation and export, before a step after which that evaluation
        would exceed the limit.
      max_failed_fraction: fraction of a batch's pairs that may lack a verdict; 1 is any.
      max_failed_batches: this many batches in a row beyond that fraction end the run, with its last state saved. A
        first batch without any verdict ends it at once.
      max_indecisive_steps: this many steps in a row without one verdict that prefers a response end the run, with its
        last state saved: it learns nothing. None is no limit; every ten such steps are reported either way.
    """

    both_orders: bool
    hide_thinking: bool
    steps_behind: int
    max_queries: int | None
    max_failed_fraction: float
    max_failed_batches: int
    max_indecisive_steps: int | None

    @property
    def failure_tolerance(self) -> dict[str, Any]:
        """Return the arguments of `limits.FailureTolerance`."""
        return {name: getattr(self, name) for name in ("max_failed_fraction", "max_failed_batches")}

    def __post_init__(self) -> None:
        if self.max_queries is not None and self.max_queries < 1:
            raise ValueError(f"max_queries is {self.max_queries}, must be at least 1, or None for no limit")
        if self.steps_behind not in (0, 1):
            raise ValueError(f"steps_behind is {self.steps_behind}, must be 0 or 1")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction is {self.max_failed_fraction}, must be from 0 to 1")
        if self.max_failed_batches < 1:
            raise ValueError(f"max_failed_batches is {self.max_failed_batches}, must be at least 1")
        if self.max_indecisive_steps is not None and self.max_indecisive_steps < 1:
            raise ValueError(
                f"max_indecisive_steps is {self.max_indecisive_steps}, must be at least 1, or None for no limit"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What a step learns from, see replay_buffer.py.

    Args:
      updates: gradient updates per step; the first uses the fresh pairs alone, each further one is drawn from the
        replay buffer. 1 is fresh pairs only.
      capacity: pairs in the replay buffer, the newest; on the host, 4 bytes per token of prompt and responses.
    """

    updates: int
    capacity: int

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates is {self.updates}, must be at least 1 (fresh pairs only)")

    def check(self, batch_size: int, *, offline: bool, renewed: bool) -> None:
        """Raise ValueError where the group contradicts the rest of the config."""
        if renewed and self.updates > 1:
            raise ValueError(
                f"replay.updates is {self.updates}, but model.reference_every_steps is set: past pairs were sampled and"
                " scored by another reference; set the one to 1 or the other to None"
            )
        if self.capacity < batch_size:
            raise ValueError(f"replay.capacity is {self.capacity}, must be at least batch_size, {batch_size}")
        if offline and self.updates > 1:
            raise ValueError(
                f"replay.updates is {self.updates}, but offline names recorded pairs, and nothing is sampled; set it to"
                " 1, and steps to the number of updates"
            )

    @property
    def summary(self) -> str:
        """Return a line for people; empty where nothing is replayed."""
        text = f"{self.updates} updates per step, all but one on the newest {self.capacity:,} pairs"
        return text if self.updates > 1 else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the work of a step is divided; none of this changes what is learned.

    Args:
      micro_batch_rows: rows per device (with mesh.tensor, per group of that many devices) in one gradient computation;
        a row holds one pair of full length, or several shorter ones, see packing.py. Fewer rows leave fewer slots empty
        and need less memory. There are at most as many as a device has pairs of the batch. "auto" is as many as have
        2,560 slots together on an accelerator, 768 on a CPU, and at least one: see algorithm/batch_shapes.py.
      chunk_tokens: tokens whose logits exist at a time, over all devices; "auto": as many as take at most 640 MiB on an
        accelerator, 64 on a CPU, and at most 4,096.
      remat: recompute layers in the backward pass instead of storing their activations.
      prefill_rows: prompts per device that the sampler encodes at a time; None: all of its rows. Decoding has all rows.
      reference_steps: steps whose reference samples are drawn in one call, see prefetch.py; needs that many times the
        keys and values of one batch. "auto": as many as have 32 rows per device together, at most 8. No effect where
        the policy samples both candidates.
    """

    micro_batch_rows: int | Literal["auto"]
    chunk_tokens: int | Literal["auto"]
    remat: bool
    prefill_rows: int | None
    reference_steps: int | Literal["auto"]

    def __post_init__(self) -> None:
        for name in ("micro_batch_rows", "chunk_tokens", "prefill_rows", "reference_steps"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state of a run is saved, and which checkpoints stay; see checkpoint.py.

    Args:
      every_steps: save after every multiple of this; None saves only after the last step, and where a run ends early.
      keep_last: how many of the newest stay; None for all. The best one, see `export`, stays as well.
      keep_every: those after a multiple of this stay, too; None for no others.
      export: the policy that is exported at the end: the last, or the best of those that were evaluated, by held-out
        win rate ("best", and what stays with "last"), by the judge's mean score, or by E[r] - beta KL; see
        evaluation/selection.py.
    """

    every_steps: int | None
    keep_last: int | None
    keep_every: int | None
    export: Literal["last", "best", "best_score", "best_objective"]

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """What a run shows and logs.

    Args:
      table_every_steps: steps per line of the console's table.
      tensorboard: write event files next to metrics.jsonl.
      wandb: send the same to Weights & Biases, whose package reads its settings (WANDB_PROJECT) and the key itself.
      profile: trace the third and fourth step after each start into profile/, see profiling.py.
    """

    table_every_steps: int
    tensorboard: bool
    wandb: bool
    profile: bool

    def __post_init__(self) -> None:
        if self.table_every_steps < 1:
            raise ValueError(f"table_every_steps is {self.table_every_steps}, must be at least 1")
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "wandb is true, but that package is not installed: pip install wandb, or set it to false"
            )
