"""The groups of a config that setup.py reads itself; the other groups are the arguments of their factories.

A dataclass's fields are the schema of its group, its `__post_init__` the limits of their values.
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
      run_dir: where everything is written, see run_directory.py.
      seed: of every random draw.
      steps: rounds of samples; each makes one update, or replay.updates.
      batch_size: prompts per step, over all devices.
      max_skipped: updates in a row that may be skipped because a number is not finite.
      max_step_seconds: a step, an evaluation's batch or a compilation that takes longer ends the run with the stacks
        of all its threads, for whatever started it to start it again; None waits for ever.
      offline: pairs to learn from that were judged before, see offline.py; None samples and asks the judge.
    """

    run_dir: str
    seed: int
    steps: int
    batch_size: int
    max_skipped: int
    max_step_seconds: float | None
    data: Mapping[str, Any]
    offline: Mapping[str, Any] | None
    model: Mapping[str, Any]
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
            raise ValueError('judge.name is missing: one of ours or "package.module:Name"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Policy and reference.

    Args:
      path: a folder with config.json, *.safetensors and a tokenizer; "owner/name" or "owner/name@revision" on
        the hub, revision being a branch, a tag or a commit; or "embedded", the project's own.
      reference: another such model, of the same architecture and tokenizer, or None for a frozen copy of path.
      reference_every_steps: after every so many steps the policy becomes the reference; None keeps the first for
        ever. Evaluations are against the first either way. What it does to the KL: docs/choosing.md.
      dtype: of all computing but the float32 master weights; auto is bfloat16 on accelerators, else float32.
      attention: what computes it; "cudnn" holds no scores, and needs an NVIDIA GPU, see models/kernels.py.
    """

    path: str
    reference: str | None
    reference_every_steps: int | None
    dtype: Literal["auto", "float32", "bfloat16"]
    attention: Literal["einsum", "cudnn"]

    def __post_init__(self) -> None:
        if self.reference_every_steps is not None and self.reference_every_steps < 1:
            raise ValueError(
                f"reference_every_steps is {self.reference_every_steps}, must be 1 or more, or None"
            )

    def reference_step(self, done: int) -> int:
        """The step after which the policy was what is the reference after `done` steps; 0 for the first reference."""
        return done - done % self.reference_every_steps if self.reference_every_steps else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judging:
    """How any judge is asked, and when a run gives up on it.

    Args:
      both_orders: ask twice, the second time with A and B exchanged: soft verdicts are averaged, hard ones that
        differ tie. Twice the queries; judge/position_flip_rate says whether it is worth them.
      max_queries: comparisons that a run may ask in all, those of its evaluations too, or None. A run ends, with
        its last evaluation and its export, before a step after which it could not pay for that evaluation.
      max_failed_fraction: share of a batch's pairs that may be without a verdict; 1 is any.
      max_failed_batches: so many batches in a row with more than that end the run, its last state saved. A first
        batch without any verdict ends it at once.
    """

    both_orders: bool
    max_queries: int | None
    max_failed_fraction: float
    max_failed_batches: int

    @property
    def failure_tolerance(self) -> dict[str, Any]:
        """The arguments of `limits.FailureTolerance`."""
        return {name: getattr(self, name) for name in ("max_failed_fraction", "max_failed_batches")}

    def __post_init__(self) -> None:
        if self.max_queries is not None and self.max_queries < 1:
            raise ValueError(f"max_queries is {self.max_queries}, must be at least 1, or None for no limit")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(
                f"max_failed_fraction is {self.max_failed_fraction}, must be from 0 to 1 (any share)"
            )
        if self.max_failed_batches < 1:
            raise ValueError(f"max_failed_batches is {self.max_failed_batches}, must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What a round of samples learns from, see replay_buffer.py.

    Args:
      updates: per round: one on its fresh pairs, the others on past ones as well. 1 is fresh pairs only.
      capacity: so many pairs are remembered, the newest; on the host, 4 bytes per token of prompt and responses.
    """

    updates: int
    capacity: int

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates is {self.updates}, must be at least 1 (fresh pairs only)")

    def check(self, batch_size: int, *, offline: bool, renewed: bool) -> None:
        """Raises ValueError where it does not fit the rest of the config."""
        if renewed and self.updates > 1:
            raise ValueError(
                f"replay.updates is {self.updates}, but model.reference_every_steps is set: past pairs were drawn and"
                " scored by another reference; set the one to 1 or the other to None"
            )
        if self.capacity < batch_size:
            raise ValueError(f"replay.capacity is {self.capacity}, must be at least batch_size, {batch_size}")
        if offline and self.updates > 1:
            raise ValueError(
                f"replay.updates is {self.updates}, but offline pairs are given, and nothing is sampled; set it to 1,"
                " and steps to as many updates as you want"
            )

    @property
    def described(self) -> str:
        """For people; empty where nothing is replayed."""
        text = f"{self.updates} updates a step, all but one on the newest {self.capacity:,} pairs"
        return text if self.updates > 1 else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the work of a step is laid out; none of this changes what is learned.

    Args:
      micro_batch_rows: rows whose gradient each device takes at a time (with mesh.tensor, each group of so many); a row
        holds a pair of full length, or several that are shorter, see packing.py. Fewer leave fewer slots empty, and
        need less memory.
      chunk_tokens: tokens whose logits exist at a time.
      remat: compute layers again in the backward pass instead of keeping their activations.
      reference_steps: reference samples of this many steps are drawn in one call, see prefetch.py; it holds as many
        times the keys and values of one batch. Without effect where the policy draws both candidates.
    """

    micro_batch_rows: int
    chunk_tokens: int
    remat: bool
    reference_steps: int

    def __post_init__(self) -> None:
        for name in ("micro_batch_rows", "chunk_tokens", "reference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out evaluation, always before the first and after the last step.

    Args:
      prompts: held-out prompts, the first so many.
      reference_samples: answers of the reference that each of the policy's two meets, per prompt.
      every_steps: also every so many steps; 0 is off.
      answers: a file with an answer to each of these prompts, which the policy's samples meet too, see
        data/answer_files.py; or None.
      stop_kl: an evaluation that finds at least so many nats per sequence ends the run; None is off, as below.
      stop_win_rate: one in which the lower end of the win rate's interval is at least this.
      stop_validity_drop: one in which the share of valid answers is lower by this than before the first step.
    """

    prompts: int
    reference_samples: int
    every_steps: int
    answers: str | None
    stop_kl: float | None
    stop_win_rate: float | None
    stop_validity_drop: float | None

    @property
    def stops(self) -> dict[str, float | None]:
        """The limits that end a run, by their fields."""
        return {name: getattr(self, name) for name in ("stop_kl", "stop_win_rate", "stop_validity_drop")}

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("reference_samples", 1), ("every_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        for name, limit in self.stops.items():
            if limit is None:
                continue
            if limit <= 0 or (name != "stop_kl" and limit > 1):
                raise ValueError(
                    f"{name} is {limit}, must be positive"
                    + ("" if name == "stop_kl" else " and at most 1")
                    + ", or None for no such end"
                )
            if not self.every_steps:
                raise ValueError(
                    f"{name} is {limit}, but every_steps is 0: nothing would look; set every_steps, or None"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state of a run is saved, and what stays of it; see checkpoint.py.

    Args:
      every_steps: also every so many steps; None for only after the last, and where a run ends early.
      keep_last: how many of the newest stay; None for all. The one of the best held-out win rate stays as well.
      keep_every: those after a multiple of so many steps stay, too; None for no others.
      export: what the run exports at its end: the last policy, or that of the best held-out win rate, which needs
        evaluation.every_steps.
    """

    every_steps: int | None
    keep_last: int | None
    keep_every: int | None
    export: Literal["last", "best"]

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """What is shown and written.

    Args:
      table_every_steps: between two lines of the console's table.
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
