"""The modules of a decoder like Llama's in Flax NNX, for each family that is a `DecoderConfig` (decoder_config.py).

Three passes cover everything that the project does with a model: `prefill` encodes prompts, `packed` runs rows of
prompts, each followed by its complete responses (training, scoring), `decode` runs one token per row against both
caches (sampling). Responses of one prompt share its encoding; nothing is computed twice.

Left out on purpose: sliding windows, mixtures of experts, dropout, and cache objects: a cache is a value, passed in and
out.

Activations inside a block are flat, [M D] with M = B * C * T: XLA's CPU gradient of a matmul over three
axes is several times slower than over two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xpo_jax.models.attention_kernels import ONLY_EINSUM, Kernels, attend, packed_mask, packed_order
from xpo_jax.models.decoder_config import DecoderConfig
from xpo_jax.models.layers import (
    KV,
    MLP,
    Causal,
    Linear,
    Parts,
    RMSNorm,
    Segment,
    add,
    before,
    cache,
    rope_angles,
    rotate,
    wide,
)
from xpo_jax.runtime.sharding import ROWS, constrain

Array = jax.Array


def _norm(size: int, config: DecoderConfig, kernels: Kernels, rngs: nnx.Rngs) -> RMSNorm:
    norm = RMSNorm(size, epsilon=config.rms_norm_eps, rngs=rngs)
    norm.fuse_rows = kernels.fuse_rows
    return norm


class Attention(nnx.Module):
    """Grouped-query attention."""

    def __init__(self, config: DecoderConfig, kernels: Kernels, *, rngs: nnx.Rngs):
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.kernels = H, kernels
        self.q_proj = Linear(D, N * H, use_bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(D, K * H, use_bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(D, K * H, use_bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(N * H, D, use_bias=False, rngs=rngs)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = _norm(H, config, kernels, rngs)
            self.k_norm = _norm(H, config, kernels, rngs)

    def __call__(
        self,
        x: Array,
        shape: tuple[int, int, int],
        angles: tuple[Array, Array],
        segments: Callable[[KV], tuple[Any, Any]],
    ) -> tuple[Array, KV]:
        """Attend, for x [M D] of shape (B, C, T).

        `segments` turns this call's keys and values [B C K T H] into what is attended to, and the cache to return.
        """

        def heads(y: Array) -> Array:
            return y.reshape(*shape, -1, self.head_dim)

        q, k = heads(self.q_proj(x)), heads(self.k_proj(x))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles).swapaxes(2, 3)
        v = heads(self.v_proj(x)).swapaxes(2, 3)
        attended, cache = segments(KV(k, v))
        kernels = self.kernels
        attended = attend(kernels.at(shape[2]), q, attended, fuse_rows=kernels.fuse_rows)
        return self.o_proj(attended.reshape(x.shape[0], -1)), cache


class Block(nnx.Module):
    """One decoder layer: pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: DecoderConfig, kernels: Kernels, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.input_layernorm = _norm(D, config, kernels, rngs)
        self.self_attn = Attention(config, kernels, rngs=rngs)
        self.post_attention_layernorm = _norm(D, config, kernels, rngs)
        self.mlp = MLP(D, config.intermediate_size, rngs=rngs)

    def __call__(self, x: Array, shape: tuple[int, int, int], angles: Any, segments: Any) -> tuple[Array, KV]:
        attended, cache = self.self_attn(self.input_layernorm(x), shape, angles, segments)
        x = add(x, attended)
        return add(x, self.mlp(self.post_attention_layernorm(x))), cache


class Decoder(nnx.Module):
    """A decoder with pre-norm blocks.

    Args:
      config: the shapes.
      stacked: True holds all layers in one Block whose arrays have a leading L axis and scans over
        them (training: one layer is compiled once, remat works); False holds a list of Blocks and
        unrolls (decoding: a stacked array would be sliced at every token).
      remat: recompute each layer in the backward pass (stacked only).
      kernels: of attention, see attention_kernels.py.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        stacked: bool,
        remat: bool = False,
        kernels: Kernels = ONLY_EINSUM,
    ):
        L = config.num_hidden_layers
        self.config, self.remat, self.kernels = config, remat, kernels
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers: Any  # one stacked Block, or an nnx.List of Blocks
        if stacked:
            self.layers = nnx.vmap(lambda rngs: Block(config, kernels, rngs=rngs))(rngs.split(L))
        else:
            self.layers = nnx.List([Block(config, kernels, rngs=rngs) for _ in range(L)])
        self.norm = _norm(config.hidden_size, config, kernels, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def prefill(self, tokens: Array) -> tuple[Array, Any]:
        """Encode right-padded prompts.

        Args:
          tokens: i32[B P]. Padding needs no mask: it follows all positions that are read.

        Returns:
          hidden [B P D] after the last norm, and the cache: one KV [B K P H] per layer.
        """
        B, P = tokens.shape

        def segments(new: KV, both: Any) -> tuple[Causal, KV]:
            cached = cache(new.k[:, 0], new.v[:, 0])
            if self.kernels.pin_caches:
                cached = KV(*jax.lax.optimization_barrier(cached))
            return Causal(cached.k[:, None], cached.v[:, None], None), cached

        positions = jnp.broadcast_to(jnp.arange(P), (B, 1, P))
        hidden, caches = self._layers(tokens[:, None], positions, segments, None)
        return hidden.reshape(B, P, -1), caches

    def packed(self, tokens: Array, positions: Array, part: Array, prompt: Array) -> Array:
        """Run rows that hold several prompts, each with its responses.

        Args:
          tokens, positions, part, prompt: i32[R W], as `packing.Packed` has them.

        Returns: hidden [R W D] after the last norm.
        """
        (R, W), kernel = tokens.shape, self.kernels.at(tokens.shape[1])
        order = packed_order(kernel, Parts(part, prompt))
        if order is not None:
            slots = (tokens, positions, part, prompt)
            tokens, positions, part, prompt = (jnp.take_along_axis(x, order, axis=1) for x in slots)
        mask = packed_mask(kernel, Parts(part, prompt))

        def segments(new: KV, both: Any) -> tuple[Causal, None]:
            return Causal(new.k, new.v, mask), None

        hidden = self._layers(tokens[:, None], positions[:, None], segments, None)[0].reshape(R, W, -1)
        if order is None:
            return hidden
        return jnp.take_along_axis(hidden, jnp.argsort(order, axis=1)[..., None], axis=1)

    def decode(
        self, token: Array, t: Array, prompt_lengths: Array, prompt_caches: Any, caches: Any
    ) -> tuple[Array, Any]:
        """Run response token number t of each row.

        Args:
          token: i32[B].
          t: i32[], the same for all rows; its rotary position is the row's prompt length + t.
          prompt_lengths: i32[B].
          prompt_caches: as `prefill` returned them.
          caches: the keys and values of the responses, slots 0 to t-1 filled, see `empty_caches`.

        Returns:
          hidden [B D] after the last norm, and `caches` with slot t filled.
        """

        def write(cached: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(cached, new[:, 0], t, axis=2)

        def segments(new: KV, both: tuple[KV, KV]) -> tuple[tuple[Segment, ...], KV]:
            prompt, cached = both
            filled = cache(write(cached.k, new.k), write(cached.v, new.v))
            seen = before(jnp.full((1,), t + 1), filled.k.shape[-2])
            return (
                Segment(*prompt, before(prompt_lengths, prompt.k.shape[-2])),
                Segment(*filled, seen),
            ), filled

        pairs = list(zip(prompt_caches, caches, strict=True))
        return self._layers(token[:, None, None], (prompt_lengths + t)[:, None, None], segments, pairs)

    def empty_caches(self, B: int, T: int) -> list[KV]:
        """Return zeros for T response tokens of B rows: per layer KV [B K T H] in the weights' dtype."""
        c = self.config
        zeros = jnp.zeros((B, c.num_key_value_heads, T, c.head_dim), self.embed_tokens.embedding.dtype)
        return [cache(zeros, zeros) for _ in range(c.num_hidden_layers)]

    def unembedding(self) -> Array:
        """Return the table [V D] whose products with a hidden state are its logits."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.embedding[...] if tied else self.lm_head.kernel[...].T

    def unembed(self, hidden: Array) -> Array:
        """Return logits f32[... V] of hidden [... D], over all rows of the vocabulary, padding included."""
        table, sums = self.unembedding(), wide(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=sums)

    def _layers(self, tokens: Array, positions: Array, segments: Any, caches: Any) -> tuple[Array, Any]:
        """Embed, run all layers, and norm; return hidden [M D] and the layers' caches."""
        B, C, T = tokens.shape
        c = self.config
        angles = rope_angles(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        # not embed_tokens(...): nnx.Embed casts to the dtype it was made with, float32
        x = jnp.take(self.embed_tokens.embedding[...], tokens.reshape(-1), axis=0)
        if not isinstance(self.layers, nnx.List):
            # split like the features of the master table: otherwise the backward pass gathers all rows on every device
            x = constrain(x, "data", "fsdp")
        x = constrain(x, ROWS, None)

        unrolled = isinstance(self.layers, nnx.List)
        split = [nnx.split(block) for block in self.layers] if unrolled else [nnx.split(self.layers)]
        graphdef = split[0][0]
        assert all(other == graphdef for other, _ in split), "layers differ in more than their weights"

        def layer(params: Any, x: Array, cached: Any) -> tuple[Array, Any]:
            block = nnx.merge(graphdef, params)
            x, cached = block(x, (B, C, T), angles, functools.partial(segments, both=cached))
            return constrain(x, ROWS, None), cached

        if unrolled:
            traced_once, out = jax.jit(layer), []  # layers have the same shapes
            for i, (_, params) in enumerate(split):
                x, cached = traced_once(params, x, None if caches is None else caches[i])
                out.append(cached)
            return self.norm(x), out

        def body(x: Array, inputs: Any) -> tuple[Array, Any]:
            params, cached = inputs
            return layer(params, x, cached)

        x, out = jax.lax.scan(jax.checkpoint(body) if self.remat else body, x, (split[0][1], caches))
        return self.norm(x), out
