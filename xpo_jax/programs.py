"""The compiled programs of a run: what is jitted, with which shardings, for which shapes.

A run announces its programs at start-up, compiles them ahead, and then calls only those: a shape that was
not announced is an error instead of a silent recompilation in the middle of a run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from xpo_jax import distributed, sharding
from xpo_jax.logps import response_logps
from xpo_jax.models import qwen2
from xpo_jax.sampler import Sampling, make_sampler, row_keys
from xpo_jax.update import SUMS, init_state, make_accumulate, make_apply, zeros
from xpo_jax.values import Array, Pairs, Params, Samples, TrainState


def _shapes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(args))


class Program:
    """A function under jax.jit that runs only for the shapes it was compiled for.

    Args:
      name: for messages and the start-up summary.
      function, options: as for jax.jit (in_shardings, out_shardings, donate_argnums, ...).
    """

    def __init__(self, name: str, function: Callable[..., Any], **options: Any):
        self.name = name
        self._jit = jax.jit(function, **options)
        self._in_shardings = options.get("in_shardings")
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def compile(self, *args: Any) -> None:
        """Compile for arguments like these: arrays or ShapeDtypeStructs."""
        self._compiled[_shapes(args)] = self._jit.lower(*args).compile()

    def __call__(self, *args: Any) -> Any:
        compiled = self._compiled.get(_shapes(args))
        if compiled is None:
            raise RuntimeError(
                f"program {self.name!r} was not announced for shapes {[s for s in _shapes(args) if s][-8:]};"
                " this is a fault of xpo_jax, whose runs announce every shape at their start"
            )
        if self._in_shardings is not None and jax.process_count() > 1:
            args = distributed.put(args, self._in_shardings)  # one process may leave it to jit
        return compiled(*args)


class CompilationCounter:
    """Counts every compilation by XLA's backend in this process from its creation on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the device needs to know of a tokenizer: real tokens, ids that end a response, padding id."""

    size: int
    end_tokens: tuple[int, ...]
    pad_token: int


class Programs:
    """Everything that runs on the devices.

    Args:
      mesh: see `sharding.make_mesh`.
      model_config: of policy and reference, which are one architecture.
      vocabulary: see `Vocabulary`.
      sampling: how candidates are drawn.
      dtype: of all computing but the master weights, the sums and the optimizer.
      seed: of the run.
      batch_size: B, prompts per step.
      prompt_buckets, response_buckets: the widths P and T that are compiled, ascending.
      optimizer, rate: as `update.make_optimizer` returns them.
      loss: keyword arguments of `update.make_accumulate` that the config gives.
      remat: recompute layers in the backward pass.
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
        response_buckets: Sequence[int],
        optimizer: optax.GradientTransformation,
        rate: optax.Schedule,
        loss: dict[str, Any],
        remat: bool,
    ):
        self.mesh, self.dtype, self.batch_size = mesh, np.dtype(dtype), batch_size
        self.chunks: int = loss["chunks"]
        self.prompt_buckets, self.response_buckets = tuple(prompt_buckets), tuple(response_buckets)
        abstract = lambda stacked, remat: nnx.split(  # noqa: E731
            nnx.eval_shape(lambda: qwen2.Qwen2(model_config, rngs=nnx.Rngs(0), stacked=stacked, remat=remat))
        )
        stacked, params = abstract(True, remat)
        unstacked, weights = abstract(False, False)
        self._params = nnx.to_pure_dict(params)
        self._weights = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, dtype), nnx.to_pure_dict(weights)
        )
        self._state = jax.eval_shape(lambda params: init_state(params, optimizer), self._params)

        rules, whole = qwen2.SHARDING, sharding.replicated(mesh)
        self.params_sharding = sharding.shardings(mesh, self._params, rules)
        weights_sharding = sharding.shardings(mesh, self._weights, rules, leave_out=("fsdp",))
        state_sharding = sharding.shardings(mesh, self._state, rules)
        rows, rows_of_two = sharding.batch(mesh), sharding.batch(mesh, 1)
        pairs_sharding = Pairs(rows, rows, *[rows_of_two] * 3, *[rows] * 3)
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
            real: Array,
            position: Array,
            purpose: Array,
            step: Array,
            candidate: Array,
        ) -> Samples:
            return draw(weights, tokens, lengths, real, row_keys(seed, purpose, step, position, candidate))

        scoring = {
            "temperature": sampling.temperature,
            "vocab_size": vocabulary.size,
            "chunk_tokens": loss["chunk_tokens"],
        }

        def score(
            weights: Params, prompt_tokens: Array, prompt_lengths: Array, tokens: Array, lengths: Array
        ) -> Array:
            scored = response_logps(
                unstacked, weights, prompt_tokens, prompt_lengths, tokens, lengths, **scoring
            )
            return scored.logps

        def for_sampling(params: Params) -> Params:
            return jax.tree.map(lambda p: p.astype(dtype), qwen2.unstack(params))

        self.init = Program(
            "init", lambda params: init_state(params, optimizer), out_shardings=state_sharding
        )
        self.for_sampling = Program(
            "for_sampling", for_sampling, in_shardings=(self.params_sharding,), out_shardings=weights_sharding
        )
        self.sample = Program(
            "sample",
            sample,
            in_shardings=(weights_sharding, *[rows] * 4, *[whole] * 3),
            out_shardings=rows,
        )
        self.score = Program(
            "score",
            score,
            in_shardings=(weights_sharding, rows, rows, rows_of_two, rows_of_two),
            out_shardings=rows_of_two,
        )
        self.zeros = Program(
            "zeros",
            zeros,
            in_shardings=(self.params_sharding,),
            out_shardings=(self.params_sharding, sums_sharding),
        )
        self.accumulate = Program(
            "accumulate",
            make_accumulate(
                stacked, dtype=dtype, **scoring, **{k: v for k, v in loss.items() if k not in scoring}
            ),
            in_shardings=(
                self.params_sharding,
                self.params_sharding,
                sums_sharding,
                pairs_sharding,
                *[whole] * 5,
            ),
            out_shardings=(self.params_sharding, sums_sharding),
            donate_argnums=(1, 2),
        )
        self.apply = Program(
            "apply",
            make_apply(optimizer, rate),
            in_shardings=(state_sharding, self.params_sharding, whole),
            out_shardings=(state_sharding, whole),
            donate_argnums=0,
        )

        self._rows, self._rows_of_two = rows, rows_of_two
        self.gather = Program("gather", lambda tree: tree, out_shardings=whole)

    def announced(self) -> list[tuple[str, Callable[[], None]]]:
        """All compilations of a run: what to show of each, and the call that compiles it."""
        B, S = self.batch_size, 2
        i32 = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
        boolean = jax.ShapeDtypeStruct((B,), np.bool_)
        sums = {name: f32() for name in SUMS}

        def pairs(P: int, T: int) -> Pairs:
            return Pairs(i32(B, P), i32(B), i32(S, B, T), i32(S, B), f32(S, B), f32(B), f32(B), boolean)

        def each() -> Iterator[tuple[str, Program, tuple[Any, ...]]]:
            yield "init", self.init, (self._params,)
            yield "for_sampling", self.for_sampling, (self._params,)
            yield "zeros", self.zeros, (self._params,)
            yield "apply", self.apply, (self._state, self._params, f32())
            if jax.process_count() > 1:
                T, on = self.response_buckets[-1], {"sharding": self._rows}
                samples = [((B, T), np.int32), ((B,), np.int32), ((B,), np.bool_)]
                yield (
                    "gather samples",
                    self.gather,
                    (Samples(*(jax.ShapeDtypeStruct(*s, **on) for s in samples)),),
                )
                logps = jax.ShapeDtypeStruct((S, B), np.float32, sharding=self._rows_of_two)
                yield "gather log-probabilities", self.gather, (logps,)
            for P in self.prompt_buckets:
                prompts = (i32(B, P), i32(B))
                yield (
                    f"sample P={P}",
                    self.sample,
                    (self._weights, *prompts, boolean, i32(B), i32(), i32(), i32()),
                )
                for T in self.response_buckets:
                    yield f"score P={P} T={T}", self.score, (self._weights, *prompts, i32(S, B, T), i32(S, B))
                    yield (
                        f"accumulate P={P} T={T}",
                        self.accumulate,
                        (self._params, self._params, sums, pairs(P, T), i32(), *[f32()] * 4),
                    )

        return [(label, functools.partial(program.compile, *args)) for label, program, args in each()]

    @property
    def parameters(self) -> int:
        """Weights of one model."""
        return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(self._params))

    def draw(self, weights: Params, prompts: Any, *, purpose: int, step: int, candidate: int) -> Samples:
        """Dispatch the sampler for `values.Prompts`; does not wait."""
        numbers = (np.int32(number) for number in (purpose, step, candidate))
        return self.sample(weights, prompts.tokens, prompts.lengths, prompts.real, prompts.position, *numbers)

    def fetch(self, tree: Any) -> Any:
        """What `draw` and `score` return, on the host: all rows, on every process. Waits for them."""
        return jax.device_get(tree if jax.process_count() == 1 else self.gather(tree))

    def learn(
        self, state: TrainState, pairs: Pairs, alpha: float, beta: float
    ) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:
        """Dispatch one update: the gradients of all micro-batches, then optax. `state` is given away.

        Args:
          pairs: the whole batch; lengths and real are on the host.

        Returns:
          The new state, the sums that `update.summarise` reads, and what `update.make_apply` tells.
        """
        rows, policy_tokens = pairs.real.sum(), pairs.lengths[0][pairs.real].sum()
        numbers = [np.float32(x) for x in (rows, policy_tokens, alpha, beta)]
        grads, sums = self.zeros(state.params)
        for chunk in range(self.chunks):
            grads, sums = self.accumulate(state.params, grads, sums, pairs, np.int32(chunk), *numbers)
        state, told = self.apply(state, grads, sums["loss"])
        return state, sums, told


def compute_dtype(name: str) -> Any:
    """ "auto" is bfloat16 on accelerators and float32 on CPU, where bfloat16 is slower."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
