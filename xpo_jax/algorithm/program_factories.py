"""How each program of a run is made: its function, the shardings of its arguments and results, what it donates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from xpo_jax.algorithm.logps import packed_logps
from xpo_jax.algorithm.losses import LossFn
from xpo_jax.algorithm.model_spec import ModelSpec
from xpo_jax.algorithm.optimizer import Optimizer
from xpo_jax.algorithm.packing import CANDIDATES, Packed
from xpo_jax.algorithm.pairing import SECOND
from xpo_jax.algorithm.sampler import Vocabulary, make_sampler, row_keys
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.algorithm.update import SUMS, PairTargets, init_state, make_accumulate, make_apply, zeros
from xpo_jax.runtime import sharding
from xpo_jax.runtime.compilation import Program
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Array, Params, Samples, TrainState


class Shardings(NamedTuple):
    """How arguments and results other than parameters are split."""

    replicated: NamedSharding
    rows: NamedSharding
    packed: Packed
    targets: PairTargets
    sums: dict[str, NamedSharding]


def make_shardings(mesh: Mesh) -> Shardings:
    """Split rows over the mesh, and replicate sums."""
    rows, candidate_rows, replicated = (
        sharding.batch(mesh),
        sharding.batch(mesh, 1),
        sharding.replicated(mesh),
    )
    return Shardings(
        replicated=replicated,
        rows=rows,
        packed=Packed(**dict.fromkeys(Packed._fields, rows)),
        targets=PairTargets(
            lengths=candidate_rows, ref_logps=candidate_rows, p_first=rows, weight=rows, valid=rows
        ),
        sums=dict.fromkeys(SUMS, replicated),
    )


def sample_program(
    model: ModelSpec, sampling: CandidateSampling, vocabulary: Vocabulary, seed: int, prefill_rows: int | None
) -> Program:
    """Make the sampler, which derives a key for each row; `candidates` i32[C] are the numbers of those to draw."""
    second_temperature = sampling.second_temperature
    split = make_shardings(model.mesh)
    sampler = make_sampler(
        model.unstacked,
        sampling,
        vocab_size=vocabulary.size,
        end_tokens=vocabulary.end_tokens,
        pad_token=vocabulary.pad_token,
        prefill_rows=prefill_rows,
    )

    def sample(
        weights: Params,
        tokens: Array,
        lengths: Array,
        valid: Array,
        position: Array,
        stream: Array,
        step: Array,
        candidates: Array,
    ) -> Samples:
        keys = jax.vmap(lambda number: row_keys(seed, stream, step, position, number), out_axes=1)(candidates)
        if second_temperature is None:
            return sampler(weights, tokens, lengths, valid, keys.reshape(-1))
        second = (candidates == SECOND) & (stream == Stream.TRAINING)
        temperatures = jnp.where(second, second_temperature, sampling.temperature)
        return sampler(weights, tokens, lengths, valid, keys.reshape(-1), jnp.tile(temperatures, len(tokens)))

    rows, replicated = split.rows, split.replicated
    return Program(
        "sample",
        model.mesh,
        sample,
        in_shardings=(model.weights_sharding, rows, rows, rows, rows, replicated, rows, replicated),
        out_shardings=rows,
    )


def score_program(model: ModelSpec, batch_size: int, distribution: dict[str, Any]) -> Program:
    """Make the program that writes the scores of one micro-batch into those of the batch, [S B]."""
    split = make_shardings(model.mesh)

    def score(weights: Params, scores: Array, packed: Packed, pairs: Array) -> Array:
        G, per_shard = pairs.shape
        scored = packed_logps(model.unstacked, weights, packed, CANDIDATES * per_shard, **distribution)
        # results without a pair are written past the last row, and so dropped
        at = jnp.where(pairs < 0, batch_size, pairs)
        logps = jnp.moveaxis(scored.logps.reshape(G, per_shard, CANDIDATES), -1, 0)
        return scores.at[:, at].set(logps, mode="drop")

    return Program(
        "score",
        model.mesh,
        score,
        in_shardings=(model.weights_sharding, split.replicated, split.packed, split.rows),
        out_shardings=split.replicated,
    )


# By default the TPU compiler makes a matmul whose weights are split over fsdp a loop over shards, in which a piece of
# the weights arrives while the one before is multiplied: sums over few features use little of the matrix unit. This
# threshold makes it gather a layer's weights before their matmuls (docs/accelerators.md).
_GATHERS_WEIGHTS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


class UpdatePrograms(NamedTuple):
    """The first state; the base as an update reads it; and the zeros, the sum and the application of a gradient."""

    init: Program
    stack: Program
    zeros: Program
    accumulate: Program
    apply: Program


def update_programs(
    model: ModelSpec,
    state_sharding: TrainState,
    optimizer: Optimizer,
    loss: LossFn,
    *,
    entropy_weight: float,
    distribution: dict[str, Any],
) -> UpdatePrograms:
    """Make the programs of an update, see update.py."""
    split, params = make_shardings(model.mesh), model.params_sharding
    accumulate = make_accumulate(
        model.stacked,
        loss,
        entropy_weight=entropy_weight,
        dtype=model.dtype,
        table_gradient=not model.frozen,
        **distribution,
    )
    return UpdatePrograms(
        init=Program(
            "init",
            model.mesh,
            lambda params: init_state(params, optimizer.transformation),
            in_shardings=(params,),
            out_shardings=state_sharding,
            donate_argnums=0,  # what was loaded becomes the state
        ),
        stack=Program(
            "stack",
            model.mesh,
            model.stack,
            in_shardings=(model.lora.frozen(model.weights_sharding),),
            out_shardings=model.frozen_sharding,
        ),
        zeros=Program("zeros", model.mesh, zeros, in_shardings=(params,), out_shardings=(params, split.sums)),
        accumulate=Program(
            "accumulate",
            model.mesh,
            accumulate,
            in_shardings=(
                params,
                model.frozen_sharding,
                params,
                split.sums,
                split.packed,
                split.targets,
                *[split.replicated] * 4,
            ),
            out_shardings=(params, split.sums),
            donate_argnums=(2, 3),
            compiler_options=_GATHERS_WEIGHTS if sharding.platform(model.mesh) == "tpu" else None,
        ),
        apply=Program(
            "apply",
            model.mesh,
            make_apply(optimizer.transformation, optimizer.rate),
            in_shardings=(state_sharding, params, split.replicated),
            out_shardings=(state_sharding, split.replicated),
            donate_argnums=0,  # not the gradients: no result could take their place
        ),
    )
