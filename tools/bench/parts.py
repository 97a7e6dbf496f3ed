"""The parts of a training step as tools.bench times them: what each runs, what it has to compute and to move.

They are the compiled programs of a run, called as train.py calls them, with random prompts and verdicts. Left out on
purpose: the judge, decoding to text and logs, which cost the host and not the device.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tools.bench.workload import END, SEED, Ending, work
from tools.planner import estimate
from xpo_jax.algorithm import packing
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.prefetch import together
from xpo_jax.algorithm.programs import Programs, compute_dtype
from xpo_jax.algorithm.sampler import Sampling, Vocabulary, make_sampler, row_keys
from xpo_jax.algorithm.update import gather_pair_targets
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime import sharding
from xpo_jax.runtime.compilation import CompilationCounter, Program
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Pairs, Prompts, Samples


@dataclasses.dataclass
class Part:
    """One row of the table.

    Args:
      run: dispatches the part and waits for it; None where it is the difference of two others.
      tokens: that it reads or writes, padding left out.
      flops: model FLOPs, of those tokens. bytes: that it moves at least. passes: over `bytes / passes` of them.
      temporaries: bytes of its compiled program beside arguments and results.
      compilations, compile_seconds: of its program.
      per: steps that a call of `run` is for; tokens, FLOPs, bytes and seconds are of one.
      seconds: one entry per round.
    """

    name: str
    run: Callable[[], Any] | None
    tokens: int
    flops: int
    bytes: int
    passes: int = 1
    temporaries: int = 0
    compilations: int = 0
    compile_seconds: float = 0.0
    per: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))


# ---- the parts ------------------------------------------------------------------------------------


class Bench:
    """All parts of a step for one model, compiled, with everything that they read.

    Args:
      folder: of Hugging Face, config.json and weights; a tokenizer is not needed.
      B, P: prompts, and tokens of each.
      lengths: i[S B], of the responses. T: the most there may be.
      rows: of a micro-batch, on each device. chunk_tokens, remat: as `settings.Layout` has them.
      judge: seconds that a judge takes who works elsewhere, for the part "judged"; None for no such part.
      ahead: as layout.reference_steps; above 1 there is a part "ahead".
    """

    def __init__(
        self,
        folder: Path,
        *,
        B: int,
        P: int,
        T: int,
        lengths: np.ndarray,
        rows: int,
        chunk_tokens: int,
        remat: bool,
        judge: float | None = None,
        ahead: int = 1,
    ):
        self.config, self.lengths, self.B, self.P, self.T = model_folder.read_config(folder), lengths, B, P, T
        self.dtype = compute_dtype("auto")
        self.mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
        self.counter = CompilationCounter()
        optimizer, rate = make_optimizer(
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
        self.setup = estimate.Setup(
            self.config, self.mesh, self.dtype, P, T, B, rows, chunk_tokens, remat, optimizer
        )
        self.ahead = ahead
        loss = {"kind": "sigmoid", "bonus_clip": 500.0, "entropy_weight": 0.0}

        def programs(T: int, ahead: int) -> Programs:
            return Programs(
                self.mesh,
                self.config,
                Vocabulary(self.config.vocab_size, (), END),
                self._sampling(T),
                dtype=self.dtype,
                seed=SEED,
                batch_size=B,
                prompt_buckets=[P],
                micro_batch_rows=rows,
                optimizer=optimizer,
                rate=rate,
                remat=remat,
                loss={**loss, "chunk_tokens": chunk_tokens},
                prefetch_depth=ahead,
            )

        self.programs, first = programs(T, ahead), programs(1, 1)
        rng = np.random.default_rng(SEED)
        self.prompts = Prompts(
            rows=({},) * B,
            messages=((),) * B,
            tokens=rng.integers(1, self.config.vocab_size, (B, P), dtype=np.int32),
            lengths=np.full(B, P, np.int32),
            position=np.arange(B, dtype=np.int32),
            valid=np.ones(B, bool),
        )
        self.p_first = (np.arange(B) % 2).astype(np.float32)
        self._compile(first)
        masters = model_folder.load_params(folder, self.config, shardings=self.programs.params_sharding)
        self.state = self.programs.init(masters)
        self.policy = self.reference = self.programs.for_sampling(self.state.params)
        self._prefill = lambda: first.draw(
            self.policy, self.prompts, stream=Stream.TRAINING, step=0, candidate=0
        )
        self.second = self.drawn_ahead = None  # a group on the devices, and on the host
        self.judge = judge
        self.parts = self._parts()

    def _sampling(self, T: int) -> Sampling:
        return Sampling(
            max_new_tokens=T, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
        )

    def _compile(self, first: Programs) -> None:
        """Compile all; `self.compiled` is {name: (compiled program, compilations, seconds)}."""
        self.compiled: dict[str, tuple[Any, int, float]] = {}
        sample_of_one = next(call for label, call in first.declared_programs() if label.startswith("sample"))
        calls = {"prefill": [sample_of_one]}
        for label, call in self.programs.declared_programs():
            calls.setdefault(label.split()[0], []).append(call)
        del calls["fingerprint"]  # of a run's start, not of its steps
        self.ending: dict[int, Program] = {}
        if (self.lengths < self.T).any():
            for name, batches in {"sample": 1, "ahead": self.ahead}.items():
                if name in calls:
                    calls[name] = [functools.partial(self._compile_ending, batches)]
        for name, each in calls.items():
            before, begun = self.counter.count, time.perf_counter()
            compiled = [call() for call in each][-1]  # of several widths, the widest
            self.compiled[name] = compiled, self.counter.count - before, time.perf_counter() - begun

    def _compile_ending(self, batches: int) -> Any:
        graphdef, weights = nnx.split(nnx.eval_shape(lambda: Ending(self.config, batches * self.B)))
        draw = make_sampler(
            graphdef,
            self._sampling(self.T),
            vocab_size=self.config.vocab_size,
            end_tokens=(END,),
            pad_token=END,
        )

        def sample(weights: Any, tokens: Any, lengths: Any, valid: Any, position: Any, candidate: Any) -> Any:
            return draw(
                weights, tokens, lengths, valid, row_keys(SEED, Stream.TRAINING, 0, position, candidate)
            )

        rows, whole = sharding.batch(self.mesh), sharding.replicated(self.mesh)
        told = {"model": self.programs.weights_sharding, "lengths": rows}
        self.ending[batches] = Program(
            "sample", self.mesh, sample, in_shardings=(told, *[rows] * 4, whole), out_shardings=rows
        )
        weights = nnx.to_pure_dict(weights)
        weights["model"] = self.programs.weights
        p = together([self.prompts] * batches)
        return self.ending[batches].compile(weights, p.tokens, p.lengths, p.valid, p.position, np.int32(0))

    def draw(self, weights: Any, candidate: int, batches: int = 1) -> Samples:
        """Dispatch the sampler, for the rows of so many steps."""
        p, steps = together([self.prompts] * batches), np.repeat(np.arange(batches), self.B)
        if not self.ending:
            return self.programs.draw(weights, p, stream=Stream.TRAINING, step=steps, candidate=candidate)
        told = {"model": weights, "lengths": np.tile(self.lengths[candidate].astype(np.int32), batches)}
        return self.ending[batches](told, p.tokens, p.lengths, p.valid, p.position, np.int32(candidate))

    def _parts(self) -> dict[str, Part]:
        pr, p = self.programs, self.prompts
        samples = jax.device_get((self.draw(self.policy, 0), self.draw(self.reference, 1)))
        self.drawn = np.stack([each.lengths for each in samples])
        tokens = np.stack([each.tokens for each in samples])
        args = (p.tokens, p.lengths, tokens, self.drawn.astype(np.int32))
        ref_logps = jax.block_until_ready(pr.score(self.reference, *args))
        pairs = Pairs(*args, ref_logps, self.p_first, np.ones(self.B, np.float32), p.valid)
        pairs = pairs._replace(ref_logps=np.asarray(ref_logps))
        numbers = [np.float32(x) for x in (self.B, self.drawn[0].sum(), 1e-5, 0.1)]
        self.sums = pr.zeros(self.state.params)
        self.padding = packing.padding(pr.pack(*pairs[:4], p.valid))

        def accumulate() -> Any:
            for packed, index in pr.pack(*pairs[:4], p.valid):
                told = gather_pair_targets(pairs, index)
                self.sums = pr.accumulate(self.state.params, *self.sums, packed, told, *numbers)
            return self.sums

        def apply() -> Any:
            self.state, told = pr.apply(self.state, self.sums[0], self.sums[1]["loss"])
            return self.state, told

        flops, drawn = work(self.config, self.P, self.drawn), int(self.drawn.sum())
        weights, cache = estimate.decode_bytes(self.setup)
        steps = int(self.drawn[0].max()) - 1
        # Of what is told apart by candidate, the policy's half: one call.
        found = [
            self._part("prefill", self._prefill, self.B * self.P, flops["prefill"] // 2),
            self._part("sample", lambda: self.draw(self.policy, 0), int(self.drawn[0].sum()), 0),
            Part("decode", None, int(self.drawn[0].sum()) - self.B, flops["decode"] // 2, 0),
            self._part("score", lambda: pr.score(self.reference, *args), drawn, flops["score"]),
            self._part("accumulate", accumulate, drawn, flops["accumulate"]),
            self._part("apply", apply, 0, 0),
            self._part("for_sampling", lambda: pr.for_sampling(self.state.params), 0, 0),
            Part("step", self.step, drawn, 0, 0, per=self.ahead),
        ]
        if self.judge is not None:
            found.append(Part("judged", lambda: self.step(self.judge), drawn, 0, 0, per=self.ahead))
        if self.ahead > 1:
            group = self._part("ahead", lambda: self.draw(self.reference, 1, self.ahead), 0, 0)
            group.per, group.tokens = self.ahead, int(self.drawn[1].sum())
            found.insert(3, group)
        parts = {part.name: part for part in found}
        parts["decode"].passes, parts["decode"].bytes = steps, steps * (weights + cache)
        parts["sample"].flops = parts["prefill"].flops + parts["decode"].flops
        parts["sample"].bytes = parts["prefill"].bytes + parts["decode"].bytes
        second = parts.get("ahead", parts["sample"])
        if self.ahead > 1:
            own = work(self.config, self.P, self.drawn[1:])
            second.flops = own["prefill"] + own["decode"]
            each = weights // self.ahead + cache  # one read of the weights is for the rows of all these steps
            second.bytes = parts["prefill"].bytes + (int(self.drawn[1].max()) - 1) * each
        once = [parts[name] for name in ("score", "accumulate", "apply", "for_sampling")]
        parts["step"].flops = flops["prefill"] + flops["decode"] + sum(part.flops for part in once)
        parts["step"].bytes = parts["sample"].bytes + second.bytes + sum(part.bytes for part in once)
        return parts

    def _part(self, name: str, run: Callable[[], Any], tokens: int, flops: int) -> Part:
        """Bytes: a program reads its arguments and writes its results, at least."""
        compiled, count, seconds = self.compiled[name]
        memory = compiled.memory_analysis()
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return Part(name, run, tokens, flops, moved, 1, memory.temp_size_in_bytes, count, seconds)

    def step(self, judge: float | None = None) -> Any:
        """Whole steps as train.py takes them: one, or as many as share a call for the reference's samples.

        Args:
          judge: seconds that it takes in each.
        """
        return [self._step(number, judge) for number in range(self.ahead)][-1]

    def _step(self, number: int, judge: float | None) -> Any:
        pr, p, annotation = self.programs, self.prompts, jax.profiler.TraceAnnotation
        with annotation("sampling"):
            first = self.draw(self.policy, 0)
            if self.second is None:
                self.second = self.draw(self.reference, 1, self.ahead)
            if number == 0:
                self.drawn_ahead = pr.fetch(self.second)
            rows = slice(number * self.B, (number + 1) * self.B)
            samples = (pr.fetch(first), Samples(*(each[rows] for each in self.drawn_ahead)))
            lengths = np.stack([each.lengths for each in samples])
            tokens = np.stack([each.tokens for each in samples])
        with annotation("judging"):
            ref_logps = pr.score(self.reference, p.tokens, p.lengths, tokens, lengths)
            if number == self.ahead - 1:
                self.second = self.draw(self.reference, 1, self.ahead)
            time.sleep(judge or 0)
            ref_logps = jax.device_get(ref_logps)
        with annotation("updating"):
            weight = np.ones(self.B, np.float32)
            pairs = Pairs(p.tokens, p.lengths, tokens, lengths, ref_logps, self.p_first, weight, p.valid)
            self.state, sums, told = pr.learn(self.state, pairs, 1e-5, 0.1)
            self.policy = pr.for_sampling(self.state.params)
            return jax.block_until_ready((self.policy, sums, told))
