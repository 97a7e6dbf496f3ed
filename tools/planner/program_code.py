"""The bytes of compiled code, which lies in a TPU's memory as long as the program is loaded.

On other devices it is not in the plan: on a CPU it is small, and the compiler of GPUs does not state it.
"""

from __future__ import annotations

from xpo_jax.algorithm import packing

from .shapes import Setup

MIB = 2**20
# Of programs whose layers are unrolled, per layer, and of all others together. These are round numbers for what was
# compiled for v5e, v5p and v6e, 0.5B to 7B: 7 to 10 a layer for a sampler, 5.5 to 7.5 for one pass.
SAMPLER, PASS, REST = 9 * MIB, 6.5 * MIB, 40 * MIB


def program_code(s: Setup) -> int:
    """Return the bytes of the code of all programs of a run on a TPU, as if all of them stayed loaded; else 0."""
    if s.platform != "tpu":
        return 0
    samplers = s.buckets * (2 if s.reference_steps > 1 or s.candidates > 1 else 1)
    widths = len(packing.sequence_lengths(s.prompt_tokens, s.response_tokens))
    code = s.model.num_hidden_layers * (samplers * SAMPLER + widths * PASS) + (widths + 1) * REST
    if s.judge is not None:
        layers = (s.judge.model or s.model).num_hidden_layers
        code += layers * s.judge.buckets * (SAMPLER if s.judge.new_tokens else PASS)
    return int(code)
