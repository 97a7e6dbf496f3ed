"""What a step needs, from shapes alone: bytes per device by part and phase, model FLOPs, the decode roofline.

Weights, optimizer and gradients are exact: the sizes of the shards that the sharding rules give. What the backward
pass keeps is exact as well, it is read off the traced function (`saved_bytes`). What a program holds for a moment
is an estimate by named terms, checked against what XLA allocates in tests/test_plan.py.

Left out on purpose: compiled code, collectives' buffers, what XLA or an allocator wastes, and the host's memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from xpo_jax.algorithm import packing
from xpo_jax.algorithm.logps import packed_logps
from xpo_jax.algorithm.packing import Packer
from xpo_jax.models import registry
from xpo_jax.models.family import ModelConfig
from xpo_jax.runtime import sharding

CANDIDATES = 2  # per prompt


class Judge(NamedTuple):
    """A judge that is a model on the devices.

    own: its shape, None where it shares the policy's starting weights, which the reference holds.
    rows, tokens: of a call, over all devices, and the longest bucket. asked: comparisons per prompt.
    """

    own: ModelConfig | None
    rows: int
    tokens: int
    asked: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What decides about memory and work.

    Args:
      model: the shapes of policy and reference.
      mesh: with or without devices.
      dtype: of all computing but masters, their gradients' sums and the optimizer.
      prompt_tokens, response_tokens: P and T, the widest buckets.
      batch_size: prompts, over all devices. micro_batch_rows: packed rows of the update, see `settings.Layout`.
      chunk_tokens, remat: as `settings.Layout` has them.
      optimizer: of optax.
      judge: None for one on the host.
      reference_steps: steps whose samples of the reference are drawn in one call.
    """

    model: ModelConfig
    mesh: Mesh | AbstractMesh
    dtype: Any
    prompt_tokens: int
    response_tokens: int
    batch_size: int
    micro_batch_rows: int
    chunk_tokens: int
    remat: bool
    optimizer: optax.GradientTransformation
    judge: Judge | None = None
    reference_steps: int = 1

    @property
    def shares(self) -> int:
        """Devices, or groups of them, that a batch is split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is computed with."""
        return np.dtype(self.dtype).itemsize


# ---- parts ----------------------------------------------------------------------------------------


param_shapes = functools.cache(registry.param_shapes)


def parameters(model: ModelConfig) -> int:
    """How many weights a model has; nothing is allocated."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))


def local(model: ModelConfig, mesh: Mesh | AbstractMesh) -> ModelConfig:
    """The model as one of the devices that share it over `tensor` sees it: fewer heads, features, rows of logits."""
    by = mesh.shape["tensor"]
    return dataclasses.replace(
        model,
        vocab_size=model.vocab_size // by,
        intermediate_size=model.intermediate_size // by,
        num_attention_heads=model.num_attention_heads // by,
        num_key_value_heads=model.num_key_value_heads // by,
    )


def _split(model: ModelConfig, mesh: Any, *, leave_out: tuple[str, ...] = ()) -> Any:
    return sharding.shardings(mesh, param_shapes(model), registry.family(model).sharding, leave_out=leave_out)


def _sampling_copy(model: ModelConfig, mesh: Any, dtype: Any) -> int:
    """Bytes of the weights as the sampler has them, split over tensor alone."""
    tree = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), param_shapes(model))
    return sharding.bytes_per_device(tree, _split(model, mesh, leave_out=("fsdp",)))


def _optimizer(s: Setup) -> int:
    params = param_shapes(s.model)
    state = jax.eval_shape(s.optimizer.init, params)
    split = sharding.optimizer_shardings(s.mesh, state, params, _split(s.model, s.mesh))  # type: ignore[arg-type]
    return sharding.bytes_per_device(state, split)


def kv_bytes_per_token(model: ModelConfig, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * itemsize


@functools.cache
def saved_bytes(model: ModelConfig, width: int, dtype: Any, remat: bool) -> int:
    """Bytes per row of slots that the forward pass keeps for the backward pass of the update.

    Those are the arrays that jax.vjp hands to its second half; one row more makes them this much larger (which
    leaves out the weights among them).
    """
    graphdef, _ = registry.abstract_model(model, stacked=True, remat=remat)

    def kept(rows: int) -> int:
        pack = Packer(rows, (width,), shards=1)

        def backward(params: Any, packed: Any) -> Any:
            def logps(params: Any) -> Any:
                weights = jax.tree.map(lambda p: p.astype(dtype), params)
                options: dict[str, Any] = {
                    "temperature": 1.0,
                    "vocab_size": model.vocab_size,
                    "chunk_tokens": 1,
                    "entropy_gradient": False,
                }
                return packed_logps(
                    graphdef, weights, packed, CANDIDATES * pack.pairs_per_shard(width), **options
                ).logps

            return jax.vjp(logps, params)[1]

        saved = jax.eval_shape(backward, param_shapes(model), pack.shapes(width))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))

    return kept(2) - kept(1)


def _recomputed_layer(model: ModelConfig, width: int, dtype: Any) -> int:
    """Bytes per row of what remat computes again at a time: one layer."""
    one, two = (
        saved_bytes(dataclasses.replace(model, num_hidden_layers=n), width, dtype, False) for n in (1, 2)
    )
    return two - one


def _layer_working(model: ModelConfig, tokens: int, scores: int, itemsize: int, copies: int) -> int:
    """The widest moment of one layer's forward pass: its MLP, or its attention.

    Args:
      tokens: that go through it. scores: numbers in the float32 array of attention scores.
      copies: of that array at a time.
    """
    D, H = model.hidden_size, model.head_dim
    mlp = tokens * (2 * D + 2 * model.intermediate_size) * itemsize  # residual, normed; gate and up
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    return max(mlp, tokens * (2 * D + heads * H) * itemsize + copies * scores * 4)


def _chunk(model: ModelConfig, slots: int, chunk_tokens: int, shares: int) -> int:
    """Bytes of one float32 array of logits; `slots` and the model are one device's."""
    return min(-(-slots // 4), max(1, chunk_tokens // shares)) * model.vocab_size * 4


# ---- phases ---------------------------------------------------------------------------------------


def memory(s: Setup) -> dict[str, dict[str, int]]:
    """Bytes per device: {phase: {part: bytes}}, in the order of a step.

    All of a phase's parts are there at its fullest moment. Programs follow each other on a device, so that one
    candidate's cache is there at a time; the reference's is of the rows of several steps.
    """
    P, T, item = s.prompt_tokens, s.response_tokens, s.itemsize
    mine, rows = local(s.model, s.mesh), s.reference_steps * s.batch_size // s.shares
    micro = s.micro_batch_rows
    masters = sharding.bytes_per_device(param_shapes(s.model), _split(s.model, s.mesh))
    copy = _sampling_copy(s.model, s.mesh, s.dtype)
    always = {"master weights": masters, "optimizer state": _optimizer(s), "reference": copy}
    if s.judge and s.judge.own:
        always["judge"] = _sampling_copy(s.judge.own, s.mesh, s.dtype)
    kv, heads, V = kv_bytes_per_token(mine, item), mine.num_attention_heads, mine.vocab_size

    prefill = _layer_working(mine, rows * P, rows * heads * P * P, item, copies=2)
    phases = {
        "sample": {
            "KV cache": rows * (P + T) * kv,
            "one layer": max(prefill, 3 * rows * V * 4),  # or logits, probabilities, their sum
        }
    }
    W = packing.sequence_lengths(P, T)[-1]
    slots = micro * W
    # a quarter of the queries at a time, see layers.BLOCKS
    passed = _layer_working(mine, slots, slots * heads * W // 4, item, copies=3)
    logits = 2 * slots * mine.hidden_size * item + 2 * _chunk(mine, slots, s.chunk_tokens, s.shares)
    # they come after the layers, not with them
    phases["score"] = {"one layer": passed} if passed > logits else {"logits chunk": logits}
    if s.judge:
        each, model = s.judge.rows // s.shares, local(s.judge.own or s.model, s.mesh)
        scores = each * model.num_attention_heads * s.judge.tokens**2
        phases["judge"] = {
            "KV cache": each * s.judge.tokens * kv_bytes_per_token(model, item),
            "one layer": _layer_working(model, each * s.judge.tokens, scores, item, copies=2),
        }
    for parts in phases.values():
        parts["policy, for sampling"] = copy  # it is given up before the update, and made anew after it
    phases["gradient"] = {"gradients": masters, **_backward(s, mine, micro, masters)}
    # XLA keeps the old moments beside the new ones: a step that is not finite must be taken back
    phases["apply"] = {"gradients": masters, "optimizer, replaced": always["optimizer state"]}
    return {name: {**always, **parts} for name, parts in phases.items()}


def _backward(s: Setup, mine: ModelConfig, micro: int, masters: int) -> dict[str, int]:
    W, item = packing.sequence_lengths(s.prompt_tokens, s.response_tokens)[-1], s.itemsize
    split, tied = s.mesh.shape["fsdp"] > 1, s.model.tie_word_embeddings
    weights = masters // 4 * item  # in the computing dtype, split like the masters
    table = mine.vocab_size * mine.hidden_size * item
    layer = (
        masters // 4 * s.mesh.shape["fsdp"] * item - (1 if tied else 2) * table
    ) // s.model.num_hidden_layers
    chunk = _chunk(mine, micro * W, s.chunk_tokens, s.shares)
    # Logits, their softmax and its gradient, and what this chunk adds to the gradient of the embedding; then, in
    # the layers' backward pass, a layer computed again. With fsdp weights are gathered where they are used.
    at_logits = 3 * chunk + table * (2 if split else 1)
    at_layers = (micro * _recomputed_layer(mine, W, s.dtype) if s.remat else 0) + (2 * layer if split else 0)
    return {
        "weights, cast": 0 if item == 4 else weights,
        "gradients, being made": weights,
        "activations": micro * saved_bytes(mine, W, s.dtype, s.remat)
        + (at_layers if at_layers > at_logits else 0),
        "logits chunk": at_logits if at_layers <= at_logits else 0,
    }


def peak(phases: Mapping[str, Mapping[str, int]]) -> tuple[str, int]:
    """The fullest phase and its bytes."""
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    name = max(totals, key=lambda name: totals[name])
    return name, totals[name]


# ---- work -----------------------------------------------------------------------------------------


def forward_flops(model: ModelConfig, tokens: int, pairs: int, logits: int) -> int:
    """FLOPs of a forward pass, a multiplication and an addition being two.

    Args:
      tokens: that go through the layers: 2 per weight of a matrix.
      pairs: of a query and a key that it is held against, masked ones too: 4 x heads x head size a layer.
      logits: positions whose logits are taken.
    """
    D, F, H, L = model.hidden_size, model.intermediate_size, model.head_dim, model.num_hidden_layers
    N, K = model.num_attention_heads, model.num_key_value_heads
    matrices = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F)  # q and o, k and v, the MLP
    return 2 * matrices * tokens + 4 * N * H * L * pairs + 2 * D * model.vocab_size * logits


def flops(s: Setup) -> dict[str, tuple[int, int]]:
    """{phase: (model FLOPs, FLOPs computed)} of one step over all devices; every response T tokens long.

    The backward pass is twice the forward pass. Computed are also the logits that the backward pass computes again,
    and with remat the layers.
    """
    B, P, T = s.batch_size, s.prompt_tokens, s.response_tokens
    answers, last = CANDIDATES * B, T - 1  # the first token needs only the prompt, the last is never read
    of = functools.partial(forward_flops, s.model)
    sample = of(answers * (P + last), answers * (P * P + last * (P + T)), answers * T)
    layers = of(B * P + answers * last, B * P * P + answers * last * (P + last), 0)
    logits = of(0, 0, answers * T)
    found = {"sample": (sample, sample), "score": (layers + logits, layers + logits)}
    if s.judge:
        rows, tokens = s.judge.asked * B, s.judge.tokens
        judge = forward_flops(s.judge.own or s.model, rows * tokens, rows * tokens**2, rows)
        found["judge"] = (judge, judge)
    found["update"] = (3 * (layers + logits), 3 * layers + 4 * logits + (layers if s.remat else 0))
    return found


def decode_bytes(s: Setup) -> tuple[int, int]:
    """Bytes that a device reads for one more token of each of its rows: weights, and keys and values.

    Of an untied model's embedding only a few rows are read.
    """
    weights = _sampling_copy(s.model, s.mesh, s.dtype)
    mine, rows = local(s.model, s.mesh), s.batch_size // s.shares
    if not s.model.tie_word_embeddings:
        weights -= mine.vocab_size * mine.hidden_size * s.itemsize
    return weights, rows * (s.prompt_tokens + s.response_tokens) * kv_bytes_per_token(mine, s.itemsize)
