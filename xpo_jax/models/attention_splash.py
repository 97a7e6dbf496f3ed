"""Attention on a TPU by JAX's own splash kernel: the same function as `layers.attention`, without scores in memory.

The kernel computes a mask from one number per query, which is enough for a run of keys: its first and its last. Causal
attention is such a run. The rows of packing.py become one after a permutation: with the first response reversed and in
front of its prompt, [A3 A2 A1 | P1 P2 P3 | B1 B2 B3], A2 attends to A2 ... P3, and B2 to P1 ... B2. Attention does not
depend on the order of keys, and positions are arguments of the model, so a pass permutes its tokens once and its hidden
states back. Blocks without a visible key are skipped, so a row of many short pairs does the work of these pairs.

Left out on purpose: more than two responses per prompt, which no permutation turns into runs; the kernel that computes
all gradients at once, which holds one gradient of the queries per block of keys.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from xpo_jax.models.layers import Array, Causal, Parts, Runs, narrow, wide

# Queries, and keys, of a block; its scores take 1 or 1.6 MiB on the chip. Sequences are padded to a multiple of one of
# them, see `block_size`: the wider one halves the 1,280 slots of a prompt of 1,024 and two responses of 128.
BLOCK, WIDER_BLOCK = 512, 640
MAX_TOKENS = 1 << 16  # the first and the last key share 32 bits
HALF = MAX_TOKENS - 1


def block_size(tokens: int) -> int:
    """Return the size of the blocks of a sequence: the one that pads it less, or else the smaller one."""
    return min(BLOCK, WIDER_BLOCK, key=lambda block: -tokens % block)


def splash_order(parts: Parts) -> Array:
    """Return i32[B T], the slots of packed rows in an order in which every query attends to one run of keys.

    Pairs stay in their order; of each, the first response comes reversed, then the prompt, then the second response.
    Empty slots come last.
    """
    slots = jnp.arange(parts.part.shape[1])[None]
    empty = parts.prompt < 0
    pair = jnp.where(empty, jnp.iinfo(jnp.int32).max, parts.prompt)
    within = jnp.where((parts.part == parts.prompt + 1) & ~empty, -1 - slots, slots)
    return jnp.lexsort((within, pair), axis=-1).astype(jnp.int32)


def splash_runs(parts: Parts) -> Runs:
    """Return the runs of packed rows whose slots are in the order of `splash_order`; empty slots see themselves."""
    is_prompt = (parts.part == parts.prompt) & (parts.prompt >= 0)
    slots = jnp.broadcast_to(jnp.arange(is_prompt.shape[1], dtype=jnp.int32), is_prompt.shape)
    before = jnp.pad(parts.part[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    after = jnp.pad(parts.part[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    begins, ends = is_prompt & (before != parts.part), is_prompt & (after != parts.part)
    # of the prompt before each slot, and of the one after it
    begin = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, slots, slots.shape[1] - 1), axis=1, reverse=True)
    first_response = (parts.part == parts.prompt + 1) & (parts.prompt >= 0)
    empty = parts.prompt < 0
    return Runs(
        jnp.where(first_response | empty, slots, begin),
        jnp.where(first_response, end, slots),
    )


def attend_by_splash(q: Array, keys: Causal, interpret: Any = False) -> Array:
    """Compute `layers.attention` by the splash kernel.

    Args:
      q, keys: as in `layers.attention`; one device's rows and heads. The mask is None, or the `Runs` of packed rows.
      interpret: True, or Pallas's InterpretParams, computes the same on any backend, slowly.

    Raises:
      ValueError: sequences of more than MAX_TOKENS tokens.
    """
    B, C, T, N, H = q.shape
    block = block_size(T)
    padding = -T % block
    if T + padding > MAX_TOKENS:
        raise ValueError(
            f"model.attention 'splash' takes sequences of at most {MAX_TOKENS} tokens, and these have {T}; set it to"
            " 'blocks'"
        )
    slots = jnp.broadcast_to(jnp.arange(T + padding, dtype=jnp.int32), (B * C, T + padding))
    runs = Runs(jnp.zeros_like(slots), slots)
    if keys.mask is not None:
        assert isinstance(keys.mask, Runs)
        of_rows = (jnp.repeat(x, C, axis=0) for x in keys.mask)
        runs = Runs(*(jnp.concatenate([x, slots[:, T:]], axis=1) for x in of_rows))
    # the kernel does not scale; a factor that is no power of two costs a rounding of the queries
    scaled = narrow(q.astype(wide(q.dtype)) * H**-0.5, q.dtype).swapaxes(2, 3)
    rows = [x.reshape(B * C, -1, T, H) for x in (scaled, keys.k, keys.v)]
    rows = [jnp.pad(x, [(0, 0), (0, 0), (0, padding), (0, 0)]) for x in rows]
    out: Array = jax.lax.map(lambda row: _attend(*row, block=block, interpret=interpret), (*rows, runs))
    return out[:, :, :T].reshape(B, C, N, T, H).swapaxes(2, 3)


def _attend(q: Array, k: Array, v: Array, runs: Runs, *, block: int, interpret: Any) -> Array:
    """Attend, for one row: q [N T H], k and v [K T H], runs of i32[T], in blocks."""
    # imported here: only TPUs need Pallas
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
        DEFAULT_MASK_VALUE,
        SplashAttentionKernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    of_queries = [x.reshape(-1, block) // block for x in runs]
    first, last = of_queries[0].min(1), of_queries[1].max(1)  # of each block of queries
    blocks = jnp.arange(len(first), dtype=jnp.int32)
    visible = (first[:, None] <= blocks) & (blocks <= last[:, None])
    q_sequence: Any = (runs.last << 16) | runs.first

    def info(following: Array) -> MaskInfo:
        """Describe the blocks; `following` are those to fetch, also while one that is not visible is skipped."""
        return MaskInfo(
            data_next=following[None],
            mask_next=None,
            block_mask=visible[None].astype(jnp.int32),
            partial_mask_blocks=None,
            q_sequence=q_sequence,
        )

    by_queries = info(jnp.clip(blocks[None], first[:, None], last[:, None]))
    # for the gradients of a block of keys: the blocks of queries between the first and the last that see it
    begin = jnp.argmax(visible, axis=0)
    end = len(blocks) - 1 - jnp.argmax(visible[::-1], axis=0)
    by_keys = info(jnp.clip(blocks[:, None], begin[None], end[None]).astype(jnp.int32))
    kernel = SplashAttentionKernel(
        by_queries,
        by_queries,
        by_keys,
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_in_run,
        interpret=interpret,
    )
    out: Any = kernel(q, k, v)
    return out


def _in_run(run: Array, key: Array) -> Array:
    """Whether keys, by their slot, are in the runs of queries, whose first and last key share 32 bits."""
    return (key >= (run & HALF)) & (key <= jax.lax.shift_right_logical(run, 16))
