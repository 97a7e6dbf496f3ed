"""The compiled programs of a run: what is jitted, with which shardings, for which shapes.

A run declares its programs at start-up, compiles them before the first step, and then calls only those: a shape that
was not declared is an error instead of a silent recompilation in the middle of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from xpo_jax.algorithm import packing
from xpo_jax.algorithm.batch_shapes import BatchShapes, rows_per_shard
from xpo_jax.algorithm.logps import logits_chunk, splits_vocabulary
from xpo_jax.algorithm.losses import LossFn
from xpo_jax.algorithm.model_spec import ModelSpec
from xpo_jax.algorithm.optimizer import Optimizer
from xpo_jax.algorithm.packing import CANDIDATES, MicroBatch, Packer
from xpo_jax.algorithm.program_factories import (
    make_shardings,
    sample_program,
    score_program,
    update_programs,
)
from xpo_jax.algorithm.sampler import Vocabulary
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.algorithm.update import SUMS, PairTargets, gather_pair_targets, init_state
from xpo_jax.checkpointing.weights_checksum import fingerprint
from xpo_jax.models import lora
from xpo_jax.runtime import sharding
from xpo_jax.runtime.compilation import Program
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Array, Pairs, Params, Prompts, Samples, TrainState


class _Declared(NamedTuple):
    """One compilation: its label, its program, abstract arguments, and whether an evaluation needs it."""

    label: str
    program: Program
    arguments: tuple[Any, ...]
    evaluates: bool = False

    @property
    def listed(self) -> tuple[str, Callable[[], object]]:
        return self.label, functools.partial(self.program.compile, *self.arguments)


class Programs:
    """Everything that runs on the devices; nothing is compiled or allocated before `declared_programs` is.

    Args:
      model: the architecture of policy and reference. shapes: of batches and micro-batches.
      sampling: how candidates are sampled.
      vocabulary: what the devices need to know of the tokenizer.
      optimizer: as `make_optimizer` returns it.
      loss, entropy_weight: see `update.make_accumulate`. seed: of the run.
    """

    def __init__(
        self,
        model: ModelSpec,
        shapes: BatchShapes,
        sampling: CandidateSampling,
        vocabulary: Vocabulary,
        *,
        optimizer: Optimizer,
        loss: LossFn,
        entropy_weight: float,
        seed: int,
    ):
        self.model, self.shapes, self.max_new_tokens = model, shapes, sampling.max_new_tokens
        platform = sharding.platform(model.mesh)
        widths = packing.sequence_lengths(shapes.prompt_buckets[-1], sampling.max_new_tokens)
        rows = rows_per_shard(
            shapes.micro_batch_rows, shapes.batch_size, model.shards, longest=widths[-1], platform=platform
        )
        self.packer = Packer(rows=rows * model.shards, widths=widths, shards=model.shards)
        self._split = make_shardings(model.mesh)
        self.state = jax.eval_shape(lambda params: init_state(params, optimizer.transformation), model.params)
        self.state_sharding = TrainState(
            step=self._split.replicated,
            skipped=self._split.replicated,
            params=model.params_sharding,
            opt_state=sharding.optimizer_shardings(
                model.mesh, self.state.opt_state, model.params, model.params_sharding
            ),
        )
        distribution = {
            "temperature": sampling.temperature,
            "vocab_size": vocabulary.size,
            "chunk_tokens": logits_chunk(shapes.chunk_tokens, model.mesh, model.config.vocab_size, platform),
            "split_vocabulary": splits_vocabulary(model.mesh, model.config.vocab_size, platform),
        }
        self.init, self.stack, self.zeros, self.accumulate, self.apply = update_programs(
            model,
            self.state_sharding,
            optimizer,
            loss,
            entropy_weight=entropy_weight,
            distribution=distribution,
        )
        self.sample_rows = sample_program(model, sampling, vocabulary, seed, shapes.prefill_rows)
        self.score_packed = score_program(model, shapes.batch_size, distribution)
        self.for_sampling = Program(
            "for_sampling",
            model.mesh,
            model.for_sampling,
            in_shardings=(model.params_sharding,),
            out_shardings=model.lora.trained(model.weights_sharding),
        )
        self.fingerprint = Program(
            "fingerprint",
            model.mesh,
            fingerprint,
            in_shardings=(model.weights_sharding,),
            out_shardings=self._split.replicated,
        )
        self.gather = Program("gather", model.mesh, lambda tree: tree, out_shardings=self._split.replicated)

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """Return all compilations of a run: a label for each, and the call that compiles it."""
        return [declared.listed for declared in self._declared()]

    def evaluation_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """Return those compilations that sample and score single batches."""
        return [declared.listed for declared in self._declared() if declared.evaluates]

    def _declared(self) -> Iterator[_Declared]:
        model = self.model

        def i32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, np.int32)

        def f32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, np.float32)

        yield _Declared("init", self.init, (model.params,))
        yield _Declared("for_sampling", self.for_sampling, (model.params,))
        yield _Declared("fingerprint", self.fingerprint, (model.weights,))
        if model.frozen:
            yield _Declared("stack", self.stack, (model.lora.frozen(model.weights),))
        yield _Declared("zeros", self.zeros, (model.params,))
        yield _Declared("apply", self.apply, (self.state, model.params, f32()))
        B, sampled = self.shapes.batch_size, self.shapes.sampled
        if jax.process_count() > 1:
            for name, (rows, candidates) in sampled.items():
                drawn = rows * candidates
                tokens = _like((drawn, self.max_new_tokens), np.int32, self._split.rows)
                lengths, finished = (
                    _like((drawn,), dtype, self._split.rows) for dtype in (np.int32, np.bool_)
                )
                yield _Declared(f"gather {name}", self.gather, (Samples(tokens, lengths, finished),))
        for P in self.shapes.prompt_buckets:
            for name, (rows, candidates) in sampled.items():
                valid = jax.ShapeDtypeStruct((rows,), np.bool_)
                arguments = (i32(rows, P), i32(rows), valid, i32(rows), i32(), i32(rows), i32(candidates))
                weights = model.weights
                yield _Declared(f"{name} P={P}", self.sample_rows, (weights, *arguments), name == "sample")
        S, sums = CANDIDATES, {name: f32() for name in SUMS}
        for W in self.packer.widths:
            slots, pairs = self.packer.shapes(W), (self.packer.shards, self.packer.pairs_per_shard(W))
            scored = (model.weights, f32(S, B), slots, i32(*pairs))
            yield _Declared(f"score W={W}", self.score_packed, scored, True)
            targets = PairTargets(
                lengths=i32(S, *pairs),
                ref_logps=f32(S, *pairs),
                p_first=f32(*pairs),
                weight=f32(*pairs),
                valid=jax.ShapeDtypeStruct(pairs, np.bool_),
            )
            update = (model.params, model.frozen, model.params, sums, slots, targets, *[f32()] * 4)
            yield _Declared(f"accumulate W={W}", self.accumulate, update)

    @property
    def abstract_state(self) -> TrainState:
        """The state's shapes with its shardings, as `checkpoint.restore` needs them."""
        return jax.tree.map(
            lambda leaf, split: _like(leaf.shape, leaf.dtype, split), self.state, self.state_sharding
        )

    def policy(self, base: Params, params: Params) -> Params:
        """Return the weights that a policy is sampled and scored with; does not wait.

        Args:
          base: those that are not trained, unstacked and in the compute dtype, {} if all are; shared, not copied.
          params: the master weights of the others.
        """
        return lora.join(base, self.for_sampling(params))

    def for_update(self, base: Params) -> Params:
        """Return the base as `update` reads it: a copy with stacked layers; {} for {}."""
        return self.stack(base) if base else {}

    def sample(
        self,
        weights: Params,
        prompts: Prompts,
        *,
        stream: Stream,
        step: int | Int[np.ndarray, " B"],
        candidate: int | Sequence[int],
    ) -> Samples:
        """Dispatch the sampler; does not wait.

        Args:
          step: one for all rows, or one for each.
          candidate: the number of the candidate, or of several, whose samples of a prompt follow one another.
        """
        steps = np.full(len(prompts.valid), step, np.int32)
        return self.sample_rows(
            weights,
            prompts.tokens,
            prompts.lengths,
            prompts.valid,
            prompts.position,
            np.int32(stream),
            steps,
            np.atleast_1d(np.asarray(candidate, np.int32)),
        )

    def fetch(self, samples: Samples) -> Samples:
        """Wait for what `sample` returned and copy it to the host: all rows, on every process."""
        fetched: Samples = jax.device_get(samples if jax.process_count() == 1 else self.gather(samples))
        return fetched

    def pack(
        self, prompts: Prompts, tokens: Int[np.ndarray, "S B T"], lengths: Int[np.ndarray, "S B"]
    ) -> list[MicroBatch]:
        """Pack the responses to a batch of prompts, on the host; padding rows are left out."""
        return self.packer(prompts.tokens, prompts.lengths, tokens, lengths, prompts.valid)

    def pack_pairs(self, pairs: Pairs) -> list[MicroBatch]:
        """Pack pairs that have been scored before, on the host; padding rows are left out."""
        return self.packer(
            pairs.prompt_tokens, pairs.prompt_lengths, pairs.tokens, pairs.lengths, pairs.valid
        )

    def score(self, weights: Params, micro_batches: list[MicroBatch]) -> Float[jax.Array | np.ndarray, "S B"]:
        """Dispatch the log-probabilities of packed responses, nats summed over tokens; does not wait.

        Returns:
          0 for rows that are not packed. Replicated: every process has all rows.
        """
        scores: Any = np.zeros((CANDIDATES, self.shapes.batch_size), np.float32)
        for slots, pairs in micro_batches:
            scores = self.score_packed(weights, scores, slots, pairs)
        return scores

    def update(
        self,
        state: TrainState,
        frozen: Params,
        pairs: Pairs,
        micro_batches: list[MicroBatch],
        alpha: float,
        beta: float,
    ) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:
        """Dispatch one update: the gradients of all micro-batches, then the optimizer. `state` is donated.

        Args:
          frozen: as `for_update` returns it.
          pairs: the complete batch, on the host. micro_batches: the same batch, packed.

        Returns:
          The new state, the sums that `update.summarise` reads, and what `update.applied_metrics` reads.
        """
        rows, policy_tokens = pairs.valid.sum(), pairs.lengths[0][pairs.valid].sum()
        scalars = [np.float32(x) for x in (rows, policy_tokens, alpha, beta)]
        grads, sums = self.zeros(state.params)
        for slots, index in micro_batches:
            targets = gather_pair_targets(pairs, index)
            grads, sums = self.accumulate(state.params, frozen, grads, sums, slots, targets, *scalars)
        state, applied = self.apply(state, grads, sums["loss"])
        return state, sums, {**applied, "padding": packing.padding(micro_batches)}


def _like(shape: tuple[int, ...], dtype: Any, split: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=split)
