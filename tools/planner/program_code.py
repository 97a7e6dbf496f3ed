"""The bytes of compiled code, which lies in a TPU's memory as long as the program is loaded.

On other devices it is not in the plan: on a CPU it is small, and the compiler of GPUs does not state it.
"""

from __future__ import annotations

from xpo_jax.algorithm import packing
from xpo_jax.models.family import ModelConfig

from .shapes import Setup

MIB = 2**20
# Of programs whose layers are unrolled, per layer, and of one that scans them. These are round numbers for what was
# compiled for v5e, v5p and v6e, 0.5B to 7B: 7 to 10 a layer for a sampler, 5.5 to 7.5 for one pass.
SAMPLER, PASS, SCANNED = 9 * MIB, 6.5 * MIB, 40 * MIB
# From here on layers count a tenth: of 32B the compiler shared their code. Nothing between 28 and 64 was compiled.
SHARED = 64


def program_code(s: Setup) -> int:
    """Return the bytes of the code of all programs of a run on a TPU, as if all of them stayed loaded; else 0."""
    if s.platform != "tpu":
        return 0
    samplers = s.buckets * (1 + (s.reference_steps > 1) + (s.candidates > 1))
    widths = len(packing.sequence_lengths(s.prompt_tokens, s.response_tokens))
    # the gradient's, and one for those that copy and apply
    code = _layers(s.model) * (samplers * SAMPLER + widths * PASS) + (widths + 1) * SCANNED
    if s.judge is not None:
        layers, size = _layers(s.judge.model or s.model), SAMPLER if s.judge.new_tokens else PASS
        code += layers * s.judge.buckets * size
    return int(code)


def _layers(model: ModelConfig) -> float:
    """Return how many layers' code there is."""
    return model.num_hidden_layers * (0.1 if model.num_hidden_layers >= SHARED else 1.0)
