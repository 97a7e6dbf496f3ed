"""The parts of a training step as tools.bench times them: what each runs, compiles, computes and moves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tools.bench.step import ALPHA, BETA, REFERENCE_SAMPLES, Step
from tools.bench.workload import part_flops
from tools.planner import work
from xpo_jax.algorithm import packing
from xpo_jax.algorithm.update import gather_pair_targets
from xpo_jax.values import Pairs

PREFETCH = "prefetch"  # the part that samples from the reference for several steps in one call


@dataclasses.dataclass
class Part:
    """One row of the table.

    Args:
      run: dispatches the part and waits for it; None where the part is the difference of two others.
      tokens: read or written, without padding.
      flops: model FLOPs of those tokens. bytes: moved at least, in `passes` passes of `bytes / passes`.
      temporaries: bytes of the compiled program besides its arguments and results.
      compilations, compile_seconds: of the program.
      steps: per call of `run`; tokens, FLOPs, bytes and seconds are those of one step.
      seconds: one entry per round.
    """

    # long: the fields are the columns of the table

    name: str
    run: Callable[[], Any] | None
    tokens: int
    flops: int
    bytes: int
    passes: int = 1
    temporaries: int = 0
    compilations: int = 0
    compile_seconds: float = 0.0
    steps: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return float(np.median(self.seconds))


class Bench:
    """All parts of a step of one model, compiled.

    Args:
      step: to take apart; `reference_steps` above 1 adds the part "prefetch".
      judge: seconds that a judge on another machine takes, for the part "judged"; None for no such part.

    Attributes:
      drawn: i[S B], tokens of the responses that were sampled.
      padding: fraction of the slots of score and accumulate that are empty.
    """

    def __init__(self, step: Step, *, judge: float | None = None):
        self.step, self.workload, self.judge = step, step.workload, judge
        workload, programs, p = step.workload, step.programs, step.prompts
        samples = jax.device_get((step.draw(step.policy, 0), step.draw(step.reference, 1)))
        self.drawn = np.stack([candidate.lengths for candidate in samples])
        tokens = np.stack([candidate.tokens for candidate in samples])
        self._responses = (p.tokens, p.lengths, tokens, self.drawn.astype(np.int32))
        self._packed = programs.pack(p, *self._responses[2:])
        ref_logps = np.asarray(programs.score(step.reference, self._packed))
        weight = np.ones(workload.prompts, np.float32)
        self._pairs = Pairs(*self._responses, ref_logps, step.p_first, weight, p.valid)
        self._sums = programs.zeros(step.state.params)
        self.padding = packing.padding(self._packed)
        self.parts = self._parts()

    def _score(self) -> Any:
        return self.step.programs.score(self.step.reference, self._packed)

    def _accumulate(self) -> Any:
        programs, params = self.step.programs, self.step.state.params
        numbers = [np.float32(x) for x in (self.workload.prompts, self.drawn[0].sum(), ALPHA, BETA)]
        for slots, index in self._packed:
            targets = gather_pair_targets(self._pairs, index)
            self._sums = programs.accumulate(params, {}, *self._sums, slots, targets, *numbers)
        return self._sums

    def _apply(self) -> Any:
        gradients, sums = self._sums
        self.step.state, applied = self.step.programs.apply(self.step.state, gradients, sums["loss"])
        return self.step.state, applied

    def _parts(self) -> dict[str, Part]:
        step, w, B = self.step, self.workload, self.workload.prompts
        flops, drawn = part_flops(step.config, w.prompt_tokens, self.drawn), int(self.drawn.sum())
        policy_tokens = int(self.drawn[0].sum())
        # Prefill, sample and decode are the policy's: one call, half of the FLOPs of both candidates.
        parts = [
            self._part("prefill", step.prefill, B * w.prompt_tokens, flops["prefill"] // 2),
            self._part("sample", lambda: step.draw(step.policy, 0), policy_tokens, 0),
            Part("decode", None, policy_tokens - B, flops["decode"] // 2, 0),
            self._part("score", self._score, drawn, flops["score"]),
            self._part("accumulate", self._accumulate, drawn, flops["accumulate"]),
            self._part("apply", self._apply, 0, 0),
            self._part("for_sampling", lambda: step.programs.for_sampling(step.state.params), 0, 0),
            Part("step", step.run, drawn, 0, 0, steps=w.reference_steps),
        ]
        if self.judge is not None:
            judged = Part("judged", lambda: step.run(self.judge), drawn, 0, 0, steps=w.reference_steps)
            parts.append(judged)
        if w.reference_steps > 1:
            draw = functools.partial(step.draw, step.reference, 1, w.reference_steps)
            prefetch = self._part(PREFETCH, draw, int(self.drawn[1].sum()), 0, program=REFERENCE_SAMPLES)
            prefetch.steps = w.reference_steps
            parts.insert(3, prefetch)
        table = {part.name: part for part in parts}
        self._add_sums(table, flops)
        return table

    def _add_sums(self, parts: dict[str, Part], flops: dict[str, int]) -> None:
        """Fill in the FLOPs and bytes of decode and of the parts that consist of others."""
        depth = self.workload.reference_steps
        weights, cache = work.decode_bytes(self.step.setup)
        steps = int(self.drawn[0].max()) - 1
        parts["decode"].passes, parts["decode"].bytes = steps, steps * (weights + cache)
        parts["sample"].flops = parts["prefill"].flops + parts["decode"].flops
        parts["sample"].bytes = parts["prefill"].bytes + parts["decode"].bytes
        reference = parts.get(PREFETCH, parts["sample"])
        if depth > 1:
            sampled = part_flops(self.step.config, self.workload.prompt_tokens, self.drawn[1:])
            reference.flops = sampled["prefill"] + sampled["decode"]
            a_token = weights // depth + cache  # one read of the weights serves the rows of all these steps
            reference.bytes = parts["prefill"].bytes + (int(self.drawn[1].max()) - 1) * a_token
        once = [parts[name] for name in ("score", "accumulate", "apply", "for_sampling")]
        parts["step"].flops = flops["prefill"] + flops["decode"] + sum(part.flops for part in once)
        parts["step"].bytes = parts["sample"].bytes + reference.bytes + sum(part.bytes for part in once)

    def _part(
        self, name: str, run: Callable[[], Any], tokens: int, flops: int, program: str | None = None
    ) -> Part:
        """Return a part that is one compiled program, which at least reads its arguments and writes its results."""
        compiled, count, seconds = self.step.compiled[program or name]
        memory = compiled.memory_analysis()
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return Part(name, run, tokens, flops, moved, 1, memory.temp_size_in_bytes, count, seconds)
