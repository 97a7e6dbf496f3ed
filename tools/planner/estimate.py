"""The memory of a step, from shapes alone: bytes per device by part and phase.

Weights, optimizer state and gradients are exact: they are the sizes of the shards that the sharding rules give. What
the backward pass saves is read off the traced function (saved.py). The temporaries of a program are an estimate by
named terms, which tests/test_plan.py compares with what XLA allocates. The code is one, too (program_code.py). Left out
on purpose: buffers of collectives, allocator overhead, and the host's memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from xpo_jax.algorithm import packing
from xpo_jax.algorithm.logps import splits_vocabulary
from xpo_jax.algorithm.sampler import SMALLEST
from xpo_jax.models import registry
from xpo_jax.models.attention_blocks import QUERIES
from xpo_jax.models.attention_kernels import CUDNN, EINSUM, SPLASH
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.lora import OFF, rules
from xpo_jax.runtime import sharding

from . import saved
from .program_code import program_code
from .shapes import Setup

CANDIDATES = packing.CANDIDATES  # per prompt
LANES = 128  # of a TPU's tile


# ---- parts ----------------------------------------------------------------------------------------


param_shapes = saved.param_shapes


def parameters(model: ModelConfig) -> int:
    """Return the number of weights of a model; nothing is allocated."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))


def local(model: ModelConfig, mesh: Mesh | AbstractMesh) -> ModelConfig:
    """Return one device's shard of the model over `tensor`: fewer heads, features and words."""
    shards = mesh.shape["tensor"]
    return dataclasses.replace(
        model,
        vocab_size=model.vocab_size // shards,
        intermediate_size=model.intermediate_size // shards,
        num_attention_heads=model.num_attention_heads // shards,
        num_key_value_heads=model.num_key_value_heads // shards,
    )


def _bytes(tree: Any, model: ModelConfig, mesh: Any, dtype: Any, *leave_out: str) -> int:
    """Return the bytes of weights with stacked layers, of the model or its adapters, on one device."""
    tree = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), tree)
    of_family = rules(registry.family(model).sharding)
    return sharding.bytes_per_device(tree, sharding.shardings(mesh, tree, of_family, leave_out=leave_out))


def sampling_copy(model: ModelConfig, mesh: Any, dtype: Any) -> int:
    """Return the bytes of the weights as the sampler uses them, sharded over `tensor` only."""
    return _bytes(param_shapes(model), model, mesh, dtype, "fsdp")


def policy_copy(s: Setup) -> int:
    """Return the bytes of the trained weights as the sampler uses them; with adapters, theirs alone."""
    return _bytes(saved.trained_shapes(s.model, s.lora), s.model, s.mesh, s.dtype, "fsdp")


def base(s: Setup) -> int:
    """Return the bytes of the weights that are not trained as the sampler uses them; 0 if all are."""
    return sampling_copy(s.model, s.mesh, s.dtype) if s.lora.rank else 0


def gathered(s: Setup) -> int:
    """Return what `ModelSpec.for_sampling` holds beside its result: the embedding while fsdp gathers it."""
    table = local(s.model, s.mesh).vocab_size * s.model.hidden_size * s.itemsize
    return table if s.mesh.shape["fsdp"] > 1 and not s.lora.rank else 0


def _optimizer(s: Setup) -> int:
    params = saved.trained_shapes(s.model, s.lora)
    state = jax.eval_shape(s.optimizer.init, params)
    split = sharding.shardings(s.mesh, params, rules(registry.family(s.model).sharding))  # type: ignore[arg-type]
    return sharding.bytes_per_device(state, sharding.optimizer_shardings(s.mesh, state, params, split))  # type: ignore[arg-type]


def kv_bytes_per_token(model: ModelConfig, itemsize: int) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * itemsize


def _score_bytes(s: Setup, model: ModelConfig, rows: int, tokens: int, queries: int, copies: float) -> int:
    """Return the bytes that the attention of rows of tokens takes beside queries, keys and values.

    The einsum holds float32 scores of `queries` queries of each row. Blocks hold `copies` of those of a block, and
    queries and results by block, and the results joined; cuDNN counts like them, with 3 bytes of mask in packed rows.
    Splash holds scaled queries and results, whose heads fill tiles of LANES numbers, and one logarithm of a sum for
    each query of a row, in a tile.
    """
    numbers, kernel = rows * model.num_attention_heads * tokens, s.kernels.at(tokens)
    if kernel == SPLASH:
        padded = -(-model.head_dim // LANES) * LANES
        return numbers * 3 * padded * s.itemsize + numbers // rows * LANES * 4
    if kernel == EINSUM:
        return int(copies * numbers * queries * 4)
    block = -(-tokens // -(-tokens // QUERIES))
    mask = 3 * rows * tokens**2 if kernel == CUDNN and queries < tokens else 0
    return int(numbers * (copies * block * 4 + 3 * model.head_dim * s.itemsize)) + mask


def _layer_working(model: ModelConfig, tokens: int, scores: int, itemsize: int, rank: int = 0) -> int:
    """Return the peak bytes of one layer's forward pass: of its MLP, or of its attention.

    Args:
      tokens: of the input. scores: as `_score_bytes` returns them. rank: of the layer's adapters.
    """
    D, H = model.hidden_size, model.head_dim
    # residual, normed; gate and up, and what adapters add to these
    mlp = tokens * (2 * D + (4 if rank else 2) * model.intermediate_size) * itemsize
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    return max(mlp, tokens * (2 * D + heads * H) * itemsize + scores)


def _chunk(model: ModelConfig, slots: int, chunk_tokens: int, shards: int) -> int:
    """Return the bytes of one float32 array of logits; `slots` and the model are those of one device."""
    return min(-(-slots // 4), max(1, chunk_tokens // shards)) * model.vocab_size * 4


# ---- phases ---------------------------------------------------------------------------------------


def memory(s: Setup) -> dict[str, dict[str, int]]:
    """Return the bytes per device, {phase: {part: bytes}}, in the order of a step.

    The parts of a phase are those at its peak. Programs run one after another on a device, so only one model's cache
    exists at a time; the reference's has the rows of several steps, the policy's those of all its candidates.
    """
    P, T, item = s.prompt_tokens, s.response_tokens, s.itemsize
    shard, rows, micro = local(s.model, s.mesh), s.batch_size // s.shards, s.micro_batch_rows
    trained = saved.trained_shapes(s.model, s.lora)
    masters, copy = _bytes(trained, s.model, s.mesh, np.float32), policy_copy(s)
    always = {"master weights": masters, "optimizer state": _optimizer(s), "reference": base(s) + copy}
    if s.judge and s.judge.model:
        always["judge"] = sampling_copy(s.judge.model, s.mesh, s.dtype)
    if code := program_code(s):
        always["code"] = code
    calls = _sampling(s, shard, s.reference_steps * rows), _sampling(s, shard, rows, s.candidates)
    phases = {"sample": max(calls, key=lambda parts: sum(parts.values()))}
    W = packing.sequence_lengths(P, T)[-1]
    slots = micro * W
    # the einsum takes a quarter of the queries at a time, see layers.BLOCKS
    scores = _score_bytes(s, shard, micro, W, W // 4, copies=3)
    one_layer = _layer_working(shard, slots, scores, item, s.lora.rank)
    logits = 2 * slots * shard.hidden_size * item + 2 * _chunk(shard, slots, s.chunk_tokens, s.shards)
    # logits come after the layers, not at the same time
    phases["score"] = {"one layer": one_layer} if one_layer > logits else {"logits chunk": logits}
    if s.judge:
        judged, model = s.judge.rows // s.shards, local(s.judge.model or s.model, s.mesh)
        scores = _score_bytes(s, model, judged, s.judge.tokens, s.judge.tokens, copies=2)
        phases["judge"] = {
            "KV cache": judged * s.judge.tokens * kv_bytes_per_token(model, item),
            "one layer": _layer_working(model, judged * s.judge.tokens, scores, item),
        }
        if s.judge.new_tokens:  # it samples as the policy does, with all rows in one prefill
            lengths = {"prompt_tokens": s.judge.tokens, "response_tokens": s.judge.new_tokens}
            phases["judge"] = _sampling(
                dataclasses.replace(s, **lengths, prefill_rows=None, lora=OFF), model, judged
            )
    for parts in phases.values():
        parts["policy, for sampling"] = copy  # freed before the update, and made again after it
    stacked = _bytes(param_shapes(s.model), s.model, s.mesh, s.dtype) if s.lora.rank else 0
    phases["gradient"] = {
        "base, stacked": stacked,
        "gradients": masters,
        **_backward(s, shard, micro, masters),
    }
    # on a CPU XLA keeps the old moments beside the new ones, because a step that is not finite is undone
    replaced = always["optimizer state"] if s.platform == "cpu" else 0
    phases["apply"] = {"gradients": masters, "optimizer, replaced": replaced}
    return {name: {**always, **parts} for name, parts in phases.items()}


def _sampling(s: Setup, shard: ModelConfig, prompts: int, candidates: int = 1) -> dict[str, int]:
    P, T, kv = s.prompt_tokens, s.response_tokens, kv_bytes_per_token(shard, s.itemsize)
    encoded, rows = min(prompts, s.prefill_rows or prompts), prompts * candidates
    # where XLA computes a softmax in one kernel, the scores and the probabilities in the compute dtype
    copies = 1 + s.itemsize / 4 if s.kernels.fuse_rows and s.kernels.at(P) == EINSUM else 2
    scores = _score_bytes(s, shard, encoded, P, P, copies)
    # of one layer of the prefill; or logits, probabilities and their sum
    layer = _layer_working(shard, encoded * P, scores, s.itemsize, s.lora.rank)
    working = max(layer, 3 * rows * shard.vocab_size * 4)
    # into the decoder's layout, or for a prompt's candidates
    copied = prompts * P * kv if s.kernels.at(P) == CUDNN or candidates > 1 else 0
    cache = rows * (P + T) * kv + copied
    if s.platform == "tpu" and shard.head_dim < LANES:
        # The compiler holds such heads in another layout than the projections write. So the caches of half of the rows
        # exist beside all when the next stage begins, and the prompts' twice, if sub-batches write them in a loop.
        working = max(working, cache // 2 if rows // 2 >= SMALLEST else 0)
        cache += prompts * P * kv if encoded < prompts else 0
    return {"KV cache": cache, "one layer": working}


def _backward(s: Setup, shard: ModelConfig, micro: int, masters: int) -> dict[str, int]:
    W, item = packing.sequence_lengths(s.prompt_tokens, s.response_tokens)[-1], s.itemsize
    split, tied = s.mesh.shape["fsdp"] > 1, s.model.tie_word_embeddings
    weights = masters // 4 * item  # in the compute dtype, sharded like the masters
    table = shard.vocab_size * shard.hidden_size * item
    complete = sampling_copy(s.model, s.mesh, s.dtype)
    layer = (complete - (1 if tied else 2) * table) // s.model.num_hidden_layers
    chunk = _chunk(shard, micro * W, s.chunk_tokens, s.shards)
    # Logits, their softmax and its gradient, and this chunk's part of the embedding's gradient; later, in the
    # layers' backward pass, a recomputed layer, or the gradients in its MLP. With fsdp, weights are gathered where
    # they are used; not the embedding, if the vocabulary is split.
    by_words = splits_vocabulary(s.mesh, s.model.vocab_size, s.platform)
    of_table = table // s.mesh.shape["fsdp"] * (1 + 4 // item) if by_words else table * (2 if split else 1)
    if s.lora.rank:  # the table has no gradient
        of_table = table if split and not by_words else 0
    at_logits = 3 * chunk + of_table
    recomputed = (
        saved.recomputed_layer(shard, W, s.dtype, s.kernels, s.lora)
        if s.remat
        else saved.mlp_gradients(shard, W, item)
    )
    working = micro * recomputed
    at_layers = working + (2 * layer if split else 0)
    return {
        "weights, cast": 0 if item == 4 else weights,
        "gradients of a micro-batch": weights,
        "activations": micro * saved.saved_bytes(shard, W, s.dtype, s.remat, s.kernels, s.lora)
        + (at_layers if at_layers > at_logits else 0),
        "logits chunk": at_logits if at_layers <= at_logits else 0,
    }


def peak(phases: Mapping[str, Mapping[str, int]]) -> tuple[str, int]:
    """Return the phase with the most bytes, and the bytes."""
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    name = max(totals, key=lambda name: totals[name])
    return name, totals[name]
