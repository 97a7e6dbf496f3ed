"""The work of a step, from shapes alone: model FLOPs by phase, and the bytes that a decoded token reads."""

from __future__ import annotations

import dataclasses
import functools

from xpo_jax.models.family import ModelConfig

from . import estimate


def one_call(s: estimate.Setup, name: str) -> estimate.Setup:
    """Return the setup with the rows of one program of the sampler: several steps in "ahead", candidates in its own."""
    return dataclasses.replace(
        s,
        reference_steps=s.reference_steps if name == "ahead" else 1,
        candidates=s.candidates if name == "candidates" else 1,
    )


def forward_flops(model: ModelConfig, tokens: int, pairs: int, logits: int) -> int:
    """Return the FLOPs of a forward pass, a multiplication and an addition being two.

    Args:
      tokens: through the layers: 2 FLOPs per weight of a matrix.
      pairs: of a query and a key, including masked ones: 4 x heads x head size per layer.
      logits: positions whose logits are computed.
    """
    D, F, H, L = model.hidden_size, model.intermediate_size, model.head_dim, model.num_hidden_layers
    N, K = model.num_attention_heads, model.num_key_value_heads
    matrices = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F)  # q and o, k and v, the MLP
    return 2 * matrices * tokens + 4 * N * H * L * pairs + 2 * D * model.vocab_size * logits


def flops(s: estimate.Setup) -> dict[str, tuple[int, int]]:
    """Return {phase: (model FLOPs, computed FLOPs)} of one step over all devices, with responses of T tokens.

    The backward pass is twice the forward pass; with adapters once, because no weight of the model has a gradient, and
    their own few products are left out. Computed FLOPs include the logits that the backward pass recomputes, and with
    remat the layers.
    """
    B, P, T = s.batch_size, s.prompt_tokens, s.response_tokens
    last = T - 1  # the first token needs only the prompt, the last is never read
    forward = functools.partial(forward_flops, s.model)
    # the policy's candidates share a prefill; the second candidate has its own
    encoded, drawn = 2 * B, (s.candidates + 1) * B
    sample = forward(encoded * P + drawn * last, encoded * P * P + drawn * last * (P + T), drawn * T)
    rows = s.pairs * B
    answers = estimate.CANDIDATES * rows
    layers = forward(rows * P + answers * last, rows * P * P + answers * last * (P + last), 0)
    logits = forward(0, 0, answers * T)
    # to rank the candidates, two at a time are scored by policy and reference; then the reference scores the pairs
    scorings = 1 + (2 * -(-(s.candidates + 1) // 2) if s.ranked else 0)
    score = scorings * (layers + logits)
    phases = {"sample": (sample, sample), "score": (score, score)}
    if s.judge:
        comparisons, tokens, written = s.judge.comparisons * B, s.judge.tokens, max(s.judge.new_tokens, 1)
        fed, pairs = tokens + written - 1, tokens**2 + (written - 1) * (tokens + written)
        judge = forward_flops(
            s.judge.model or s.model, comparisons * fed, comparisons * pairs, comparisons * written
        )
        phases["judge"] = (judge, judge)
    passes = 2 if s.lora.rank else 3
    computed = passes * layers + (passes + 1) * logits + (layers if s.remat else 0)
    phases["update"] = (passes * (layers + logits), computed)
    return phases


def decode_bytes(s: estimate.Setup) -> tuple[int, int]:
    """Return the bytes that a device reads per decoded token of all its rows: weights, and keys and values.

    Only a few rows of an untied model's embedding are read.
    """
    weights = estimate.sampling_copy(s.model, s.mesh, s.dtype)
    shard, rows = estimate.local(s.model, s.mesh), s.batch_size // s.shards
    if not s.model.tie_word_embeddings:
        weights -= shard.vocab_size * shard.hidden_size * s.itemsize
    weights += estimate.policy_copy(s) if s.lora.rank else 0
    return weights, rows * (s.prompt_tokens + s.response_tokens) * estimate.kv_bytes_per_token(
        shard, s.itemsize
    )
