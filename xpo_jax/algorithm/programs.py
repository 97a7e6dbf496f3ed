"""The compiled programs of a run: what is jitted, with which shardings, for which shapes.

A run announces its programs at start-up, compiles them ahead, and then calls only those: a shape that was
not announced is an error instead of a silent recompilation in the middle of a run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from xpo_jax.algorithm import packing
from xpo_jax.algorithm.logps import packed_logps
from xpo_jax.algorithm.packing import Packed
from xpo_jax.algorithm.sampler import Sampling, Vocabulary, make_sampler, row_keys
from xpo_jax.algorithm.update import (
    SUMS,
    PairTargets,
    gather_pair_targets,
    init_state,
    make_accumulate,
    make_apply,
    zeros,
)
from xpo_jax.checkpointing.weights_checksum import fingerprint
from xpo_jax.models import qwen2
from xpo_jax.models.layers import KEY_VALUES
from xpo_jax.runtime import sharding
from xpo_jax.runtime.compilation import Program
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Array, Pairs, Params, Samples, TrainState


class Programs:
    """Everything that runs on the devices.

    Args:
      mesh: see `sharding.make_mesh`.
      model_config: of policy and reference, which are one architecture.
      vocabulary: see `sampler.Vocabulary`.
      sampling: how candidates are drawn.
      dtype: of all computing but the master weights, the sums and the optimizer.
      seed: of the run.
      batch_size: B, prompts per step.
      prompt_buckets: the widths P that prompts are sampled in, ascending.
      micro_batch_rows: see `settings.Layout`.
      draws_ahead: batches that the sampler takes in one call besides single ones, see prefetch.py.
      optimizer, rate: as `optimizer.make_optimizer` returns them.
      loss: keyword arguments of `update.make_accumulate` that the config gives.
      remat: recompute layers in the backward pass. kernel: of attention, see models/kernels.py.

    Nothing is compiled or allocated here. `params`, `weights` (as sampling wants them) and `state` are trees of
    ShapeDtypeStructs, `params_sharding`, `weights_sharding` and `state_sharding` say how they are split.

    Raises:
      ValueError: a mesh that does not divide the model, with the sizes that would.
    """

    def __init__(
        self,
        mesh: Mesh,
        model_config: qwen2.Qwen2Config,
        vocabulary: Vocabulary,
        sampling: Sampling,
        *,
        dtype: Any,
        seed: int,
        batch_size: int,
        prompt_buckets: Sequence[int],
        micro_batch_rows: int,
        optimizer: optax.GradientTransformation,
        rate: optax.Schedule,
        loss: dict[str, Any],
        remat: bool,
        kernel: str = "einsum",
        prefetch_depth: int = 1,
    ):
        self.mesh, self.dtype, self.batch_size = mesh, np.dtype(dtype), batch_size
        self.prefetch_depth = prefetch_depth
        self.prompt_buckets, self.max_new_tokens = tuple(prompt_buckets), sampling.max_new_tokens
        abstract = lambda **how: nnx.split(  # noqa: E731
            nnx.eval_shape(lambda: qwen2.Qwen2(model_config, rngs=nnx.Rngs(0), kernel=kernel, **how))
        )
        stacked, params = abstract(stacked=True, remat=remat)
        unstacked, weights = abstract(stacked=False)
        self.params = nnx.to_pure_dict(params)
        self.weights = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), nnx.to_pure_dict(weights))
        self.state = jax.eval_shape(lambda params: init_state(params, optimizer), self.params)

        rules, whole = (("key_values", KEY_VALUES), *qwen2.SHARDING), sharding.replicated(mesh)
        heads = (batch_size, model_config.num_key_value_heads, prompt_buckets[-1], model_config.head_dim)
        key_values = jax.ShapeDtypeStruct(heads, dtype)
        # together, so that a size that does not divide is told with those that would work for all
        split = sharding.shardings(mesh, {**self.params, "key_values": key_values}, rules)
        del split["key_values"]  # the model itself pins them
        self.params_sharding = split
        self.weights_sharding = sharding.shardings(mesh, self.weights, rules, leave_out=("fsdp",))
        self.state_sharding = TrainState(
            whole,
            whole,
            params=split,
            opt_state=sharding.optimizer_shardings(mesh, self.state.opt_state, self.params, split),
        )
        rows, rows_of_two = sharding.batch(mesh), sharding.batch(mesh, 1)
        shares = mesh.shape["data"] * mesh.shape["fsdp"]
        self.pack = packing.Packer(
            rows=micro_batch_rows * shares,
            widths=packing.widths(self.prompt_buckets[-1], self.max_new_tokens),
            shares=shares,
        )
        packed_sharding = Packed(*[rows] * 7)
        told_sharding = PairTargets(rows_of_two, rows_of_two, *[rows] * 3)
        sums_sharding = dict.fromkeys(SUMS, whole)

        draw = make_sampler(
            unstacked,
            sampling,
            vocab_size=vocabulary.size,
            end_tokens=vocabulary.end_tokens,
            pad_token=vocabulary.pad_token,
        )

        def sample(
            weights: Params,
            tokens: Array,
            lengths: Array,
            valid: Array,
            position: Array,
            stream: Array,
            step: Array,
            candidate: Array,
        ) -> Samples:
            return draw(weights, tokens, lengths, valid, row_keys(seed, stream, step, position, candidate))

        scoring = {
            "temperature": sampling.temperature,
            "vocab_size": vocabulary.size,
            "chunk_tokens": loss["chunk_tokens"],
        }

        def score(weights: Params, found: Array, packed: Packed, pairs: Array) -> Array:
            N, Q = pairs.shape
            scored = packed_logps(unstacked, weights, packed, 2 * Q, **scoring)
            # what no pair has is written past the last row, and so nowhere
            at = jnp.where(pairs < 0, batch_size, pairs)
            return found.at[:, at].set(jnp.moveaxis(scored.logps.reshape(N, Q, 2), -1, 0), mode="drop")

        def for_sampling(params: Params) -> Params:
            return jax.tree.map(lambda p: p.astype(dtype), qwen2.unstack(params))

        self.init = Program(
            "init",
            mesh,
            lambda params: init_state(params, optimizer),
            in_shardings=(self.params_sharding,),
            out_shardings=self.state_sharding,
            donate_argnums=0,  # what was loaded becomes the state
        )
        self.for_sampling = Program(
            "for_sampling",
            mesh,
            for_sampling,
            in_shardings=(self.params_sharding,),
            out_shardings=self.weights_sharding,
        )
        self.sample = Program(
            "sample",
            mesh,
            sample,
            in_shardings=(self.weights_sharding, *[rows] * 4, whole, rows, whole),
            out_shardings=rows,
        )
        self.score_packed = Program(
            "score",
            mesh,
            score,
            in_shardings=(self.weights_sharding, whole, packed_sharding, rows),
            out_shardings=whole,
        )
        self.zeros = Program(
            "zeros",
            mesh,
            zeros,
            in_shardings=(self.params_sharding,),
            out_shardings=(self.params_sharding, sums_sharding),
        )
        self.accumulate = Program(
            "accumulate",
            mesh,
            make_accumulate(
                stacked,
                dtype=dtype,
                **scoring,
                **{k: v for k, v in loss.items() if k not in scoring},
            ),
            in_shardings=(
                self.params_sharding,
                self.params_sharding,
                sums_sharding,
                packed_sharding,
                told_sharding,
                *[whole] * 4,
            ),
            out_shardings=(self.params_sharding, sums_sharding),
            donate_argnums=(1, 2),
        )
        self.apply = Program(
            "apply",
            mesh,
            make_apply(optimizer, rate),
            in_shardings=(self.state_sharding, self.params_sharding, whole),
            out_shardings=(self.state_sharding, whole),
            donate_argnums=0,  # not the gradients: nothing that comes out could take their place
        )

        self.fingerprint = Program(
            "fingerprint", mesh, fingerprint, in_shardings=(self.weights_sharding,), out_shardings=whole
        )
        self._rows = rows
        self.gather = Program("gather", mesh, lambda tree: tree, out_shardings=whole)

    def declared_programs(self) -> list[tuple[str, Callable[[], object]]]:
        """All compilations of a run: what to show of each, and the call that compiles it."""
        B, S = self.batch_size, 2
        i32 = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
        # of each call of the sampler: its name and its rows
        sampled = {"sample": B} | ({"ahead": B * self.prefetch_depth} if self.prefetch_depth > 1 else {})
        sums = {name: f32() for name in SUMS}

        def each() -> Iterator[tuple[str, Program, tuple[Any, ...]]]:
            yield "init", self.init, (self.params,)
            yield "for_sampling", self.for_sampling, (self.params,)
            yield "fingerprint", self.fingerprint, (self.weights,)
            yield "zeros", self.zeros, (self.params,)
            yield "apply", self.apply, (self.state, self.params, f32())
            if jax.process_count() > 1:
                for name, R in sampled.items():
                    samples = [((R, self.max_new_tokens), np.int32), ((R,), np.int32), ((R,), np.bool_)]
                    shapes = Samples(*(jax.ShapeDtypeStruct(*s, sharding=self._rows) for s in samples))
                    yield f"gather {name}", self.gather, (shapes,)
            for P, (name, R) in itertools.product(self.prompt_buckets, sampled.items()):
                valid = jax.ShapeDtypeStruct((R,), np.bool_)
                args = (i32(R, P), i32(R), valid, i32(R), i32(), i32(R), i32())
                yield f"{name} P={P}", self.sample, (self.weights, *args)
            for W in self.pack.widths:
                slots, places = self.pack.shapes(W), (self.pack.shares, self.pack.pairs(W))
                yield f"score W={W}", self.score_packed, (self.weights, f32(S, B), slots, i32(*places))
                valid = jax.ShapeDtypeStruct(places, np.bool_)
                told = PairTargets(i32(S, *places), f32(S, *places), f32(*places), f32(*places), valid)
                update = (self.params, self.params, sums, slots, told, *[f32()] * 4)
                yield f"accumulate W={W}", self.accumulate, update

        return [(label, functools.partial(program.compile, *args)) for label, program, args in each()]

    @property
    def like(self) -> TrainState:
        """The state's shapes with its shardings, as `checkpoint.restore` wants them."""
        return jax.tree.map(
            lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split),
            self.state,
            self.state_sharding,
        )

    @property
    def parameters(self) -> int:
        """Weights of one model."""
        return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(self.params))

    def draw(self, weights: Params, prompts: Any, *, stream: Stream, step: Array, candidate: int) -> Samples:
        """Dispatch the sampler for `values.Prompts`; does not wait. `step` is one for all rows, or i32[B]."""
        numbers = (np.int32(stream), np.full(len(prompts.valid), step, np.int32), np.int32(candidate))
        return self.sample(
            weights, prompts.tokens, prompts.lengths, prompts.valid, prompts.position, *numbers
        )

    def fetch(self, samples: Samples) -> Samples:
        """What `draw` returns, on the host: all rows, on every process. Waits for them."""
        found: Samples = jax.device_get(samples if jax.process_count() == 1 else self.gather(samples))
        return found

    def score(
        self, weights: Params, prompt_tokens: Array, prompt_lengths: Array, tokens: Array, lengths: Array
    ) -> Array:
        """Dispatch the log-probabilities of responses i32[S B T]; does not wait.

        Args:
          prompt_tokens, prompt_lengths, tokens, lengths: on the host, of any width that the run's prompts and responses
            have. A length of 0 is of a row that only fills up the batch.

        Returns:
          f32[S B], 0 for such rows; whole on every process.
        """
        found: Any = np.zeros(lengths.shape, np.float32)
        drawn = (lengths > 0).all(0)
        for packed, index in self.pack(prompt_tokens, prompt_lengths, tokens, lengths, drawn):
            found = self.score_packed(weights, found, packed, index)
        return found

    def learn(
        self, state: TrainState, pairs: Pairs, alpha: float, beta: float
    ) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:
        """Dispatch one update: the gradients of all micro-batches, then optax. `state` is given away.

        Args:
          pairs: the whole batch, on the host.

        Returns:
          The new state, the sums that `update.summarise` reads, and what `update.applied_metrics` does.
        """
        rows, policy_tokens = pairs.valid.sum(), pairs.lengths[0][pairs.valid].sum()
        numbers = [np.float32(x) for x in (rows, policy_tokens, alpha, beta)]
        grads, sums = self.zeros(state.params)
        micro_batches = self.pack(*pairs[:4], pairs.valid)
        for packed, index in micro_batches:
            grads, sums = self.accumulate(
                state.params, grads, sums, packed, gather_pair_targets(pairs, index), *numbers
            )
        state, told = self.apply(state, grads, sums["loss"])
        return state, sums, {**told, "padding": packing.padding(micro_batches)}


def compute_dtype(name: str) -> Any:
    """ "auto" is bfloat16 on accelerators and float32 on CPU, where bfloat16 is slower."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
