"""Models small enough to know the answer: the sampler and the update see them as any other model."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

from xpo_jax.models.qwen2 import Qwen2, Qwen2Config, unstack


class Markov(nnx.Module):
    """The logits of the next token are a row of a table, chosen by the last token: everything is known."""

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))
        self.config = SimpleNamespace(vocab_size=self.table.shape[-1])

    def prefill(self, tokens):
        return self.table[...][tokens], ()

    def respond(self, tokens, prompt_lengths, caches):
        return self.table[...][tokens]

    def decode(self, token, t, prompt_lengths, prompt_caches, caches):
        return self.table[...][token], caches

    def empty_caches(self, B, T):
        return ()

    def unembed(self, hidden):
        return hidden


def split(model):
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


TINY = Qwen2Config(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=128,
)


def tiny(seed: int = 0, config: Qwen2Config = TINY, scale: float = 3.0):
    """(stacked graphdef, its params, unstacked graphdef, its params), with logits that are far from flat."""
    stacked, params = split(Qwen2(config, rngs=nnx.Rngs(seed), stacked=True))
    params = jax.tree.map(lambda p: p * scale, params)
    unstacked = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0), stacked=False)))[0]
    return stacked, params, unstacked, unstack(params)
