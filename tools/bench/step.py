"""A training step as tools.bench runs it: the compiled programs of a run, with random prompts and verdicts.

The programs are called as train.py calls them. Left out on purpose: the judge, decoding to text and logs, which take
time on the host and not on the devices.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tools.bench.workload import END, SEED, Ending, Workload
from tools.planner import estimate
from xpo_jax.algorithm.batch_shapes import BatchShapes
from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.algorithm.model_spec import compute_dtype, make_model_spec
from xpo_jax.algorithm.optimizer import Optimizer, make_optimizer
from xpo_jax.algorithm.prefetch import concat_batches
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import Vocabulary, make_sampler, row_keys
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.models.attention_kernels import AUTO, choose_for
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime import sharding
from xpo_jax.runtime.compilation import CompilationCounter, Program
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Pairs, Prompts, Samples

ALPHA, BETA = 1e-5, 0.1
COMPILERS = 4  # at a time, see Step
REFERENCE_SAMPLES = "ahead"  # the program that samples from the reference for several steps at once


def make_optimizer_of_a_run() -> Optimizer:
    """Return AdamW as a run has it; its numbers do not affect speed."""
    return make_optimizer(
        name="adamw",
        learning_rate=1e-6,
        schedule="constant",
        warmup_steps=0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        mu_dtype="float32",
        weight_decay=0.0,
        clip_norm=1.0,
        steps=1000,
    )


def make_setup(config: ModelConfig, workload: Workload, mesh: Mesh, attention: str = AUTO) -> estimate.Setup:
    """Return what the planner needs to know of a step on a mesh."""
    platform = sharding.platform(mesh)
    dtype = compute_dtype("auto", platform)
    return estimate.Setup(
        config,
        mesh,
        dtype,
        workload.prompt_tokens,
        workload.new_tokens,
        workload.prompts,
        workload.micro_batch_rows,
        workload.chunk_tokens,
        workload.remat,
        make_optimizer_of_a_run().transformation,
        kernels=choose_for(attention, mesh.devices.flat[0], dtype=dtype, head_dim=config.head_dim),
        platform=platform,
    )


class Step:
    """The compiled programs of a step, with their inputs.

    Args:
      folder: a Hugging Face folder with config.json and weights; it needs no tokenizer.
      workload: the size of the step.
      attention: see `settings.Model.attention`.
      longest: compile scoring and update for the longest rows only, which are all that responses of equal lengths take,
        and several programs at a time; their seconds then overlap.

    Attributes:
      compiled: {name: (compiled program, compilations, seconds)}.
    """

    def __init__(self, folder: Path, workload: Workload, *, attention: str = AUTO, longest: bool = False):
        self.workload, self.config = workload, model_folder.read_config(folder)
        self.mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
        self.counter = CompilationCounter()
        w, B = workload, workload.prompts
        self._attention, self._longest = attention, longest
        self._optimizer = make_optimizer_of_a_run()
        self.setup = make_setup(self.config, workload, self.mesh, attention)
        self.dtype = self.setup.dtype
        self.programs = self._make_programs(w.new_tokens, w.reference_steps)
        self._one_token = self._make_programs(1, 1)  # its sampler is a prefill
        rng = np.random.default_rng(SEED)
        self.prompts = Prompts(
            rows=({},) * B,
            messages=((),) * B,
            tokens=rng.integers(1, self.config.vocab_size, (B, w.prompt_tokens), dtype=np.int32),
            lengths=np.full(B, w.prompt_tokens, np.int32),
            position=np.arange(B, dtype=np.int32),
            valid=np.ones(B, bool),
        )
        self.p_first = (np.arange(B) % 2).astype(np.float32)
        self._compile()
        masters = model_folder.load_params(folder, self.config, shardings=self.programs.model.params_sharding)
        self.state = self.programs.init(masters)
        self.policy = self.reference = self.programs.for_sampling(self.state.params)
        self._dispatched: Any = None  # the reference's samples of the next steps, on the devices
        self.prefetched: Any = None  # those of these steps, on the host

    def _make_programs(self, new_tokens: int, reference_steps: int) -> Programs:
        w = self.workload
        spec = make_model_spec(
            self.mesh,
            self.config,
            dtype=self.dtype,
            remat=w.remat,
            batch_size=w.prompts,
            prompt_tokens=w.prompt_tokens,
            attention=self._attention,
        )
        shapes = BatchShapes(
            batch_size=w.prompts,
            prompt_buckets=(w.prompt_tokens,),
            micro_batch_rows=w.micro_batch_rows,
            chunk_tokens=w.chunk_tokens,
            prefetch_depth=reference_steps,
        )
        return Programs(
            spec,
            shapes,
            self._sampling(new_tokens),
            Vocabulary(self.config.vocab_size, (), END),
            optimizer=self._optimizer,
            loss=Sigmoid(bonus_clip=500.0),
            entropy_weight=0.0,
            seed=SEED,
        )

    def _sampling(self, new_tokens: int) -> CandidateSampling:
        return CandidateSampling(
            max_new_tokens=new_tokens,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
        )

    def _compile(self) -> None:
        self.compiled: dict[str, tuple[Any, int, float]] = {}
        declared = self._one_token.evaluation_programs()
        calls = {"prefill": [next(call for label, call in declared if label.startswith("sample"))]}
        for label, call in self.programs.declared_programs():
            calls.setdefault(label.split()[0], []).append(call)
        del calls["fingerprint"]  # runs when a run starts, not in its steps
        self._ending: dict[int, Program] = {}  # by number of batches
        if (self.workload.lengths < self.workload.new_tokens).any():
            for name, batches in {"sample": 1, REFERENCE_SAMPLES: self.workload.reference_steps}.items():
                if name in calls:
                    calls[name] = [functools.partial(self._compile_ending, batches)]
        if self._longest:
            with ThreadPoolExecutor(COMPILERS) as threads:  # compilers do not hold Python's lock
                longest = [compilations[-1:] for compilations in calls.values()]  # lengths increase
                results = zip(calls, threads.map(self._compile_one, longest), strict=True)
                self.compiled = {name: (program, 1, seconds) for name, (program, _, seconds) in results}
        else:
            self.compiled = {name: self._compile_one(compilations) for name, compilations in calls.items()}

    def _compile_one(self, compilations: list[Callable[[], object]]) -> tuple[Any, int, float]:
        """Return the last of these programs, the compilations during the call, and its seconds."""
        before, begun = self.counter.count, time.perf_counter()
        last = [compile_program() for compile_program in compilations][-1]
        return last, self.counter.count - before, time.perf_counter() - begun

    def _compile_ending(self, batches: int) -> Any:
        """Compile a sampler whose responses have the prescribed lengths."""
        rows = batches * self.workload.prompts
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Ending(self.config, rows)))
        draw = make_sampler(
            graphdef,
            self._sampling(self.workload.new_tokens),
            vocab_size=self.config.vocab_size,
            end_tokens=(END,),
            pad_token=END,
        )

        def sample(weights: Any, tokens: Any, lengths: Any, valid: Any, position: Any, candidate: Any) -> Any:
            return draw(
                weights, tokens, lengths, valid, row_keys(SEED, Stream.TRAINING, 0, position, candidate)
            )

        by_row, replicated = sharding.batch(self.mesh), sharding.replicated(self.mesh)
        weights_sharding = {"model": self.programs.model.weights_sharding, "lengths": by_row}
        self._ending[batches] = Program(
            "sample",
            self.mesh,
            sample,
            in_shardings=(weights_sharding, *[by_row] * 4, replicated),
            out_shardings=by_row,
        )
        weights = nnx.to_pure_dict(abstract)
        weights["model"] = self.programs.model.weights
        p = concat_batches([self.prompts] * batches)
        return self._ending[batches].compile(weights, p.tokens, p.lengths, p.valid, p.position, np.int32(0))

    def prefill(self) -> Samples:
        """Dispatch the prefill of all prompts, and one drawn token."""
        return self._one_token.sample(self.policy, self.prompts, stream=Stream.TRAINING, step=0, candidate=0)

    def draw(self, weights: Any, candidate: int, batches: int = 1) -> Samples:
        """Dispatch the sampler for the rows of `batches` steps."""
        p, steps = (
            concat_batches([self.prompts] * batches),
            np.repeat(np.arange(batches), self.workload.prompts),
        )
        if not self._ending:
            return self.programs.sample(weights, p, stream=Stream.TRAINING, step=steps, candidate=candidate)
        lengths = np.tile(self.workload.lengths[candidate].astype(np.int32), batches)
        parameters = {"model": weights, "lengths": lengths}
        return self._ending[batches](
            parameters, p.tokens, p.lengths, p.valid, p.position, np.int32(candidate)
        )

    def run(self, judge: float | None = None) -> Any:
        """Take whole steps as train.py does: one, or all that share a call for the reference's samples.

        Args:
          judge: seconds that the judge takes in each step.
        """
        return [self._run(number, judge) for number in range(self.workload.reference_steps)][-1]

    def _run(self, number: int, judge: float | None) -> Any:
        pr, p, annotation, B = (
            self.programs,
            self.prompts,
            jax.profiler.TraceAnnotation,
            self.workload.prompts,
        )
        depth = self.workload.reference_steps
        with annotation("sampling"):
            policy_samples = self.draw(self.policy, 0)
            if self._dispatched is None:
                self._dispatched = self.draw(self.reference, 1, depth)
            if number == 0:
                self.prefetched = pr.fetch(self._dispatched)
            rows = slice(number * B, (number + 1) * B)
            samples = (pr.fetch(policy_samples), Samples(*(field[rows] for field in self.prefetched)))
            lengths = np.stack([candidate.lengths for candidate in samples])
            tokens = np.stack([candidate.tokens for candidate in samples])
        with annotation("judging"):
            packed = pr.pack(p, tokens, lengths)
            ref_logps = pr.score(self.reference, packed)
            if number == depth - 1:
                self._dispatched = self.draw(self.reference, 1, depth)
            time.sleep(judge or 0)
            ref_logps = jax.device_get(ref_logps)
        with annotation("updating"):
            weight = np.ones(B, np.float32)
            pairs = Pairs(p.tokens, p.lengths, tokens, lengths, ref_logps, self.p_first, weight, p.valid)
            self.state, sums, applied = pr.update(self.state, {}, pairs, packed, ALPHA, BETA)
            self.policy = pr.for_sampling(self.state.params)
            return jax.block_until_ready((self.policy, sums, applied))
