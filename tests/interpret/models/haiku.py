"""A causal language model in Haiku, as its transformer example writes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp


def layer_norm(x, name):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True, name=name)(x)


class Block(hk.Module):
    def __init__(self, heads, name=None):
        super().__init__(name=name)
        self.heads = heads

    def __call__(self, x, mask):
        width = x.shape[-1]
        scale = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(
            self.heads, width // self.heads, model_size=width, w_init=scale, name="attention"
        )
        y = layer_norm(x, "norm1")
        x = x + attention(y, y, y, mask)
        y = hk.Linear(4 * width, w_init=scale, name="up")(layer_norm(x, "norm2"))
        return x + hk.Linear(width, w_init=scale, name="down")(jax.nn.gelu(y))


class LanguageModel(hk.Module):
    def __init__(self, vocabulary, width, layers, heads, context, name=None):
        super().__init__(name=name)
        self.vocabulary, self.width, self.context = vocabulary, width, context
        self.layers, self.heads = layers, heads

    def __call__(self, ids):
        length = ids.shape[1]
        x = hk.Embed(self.vocabulary, self.width, name="embed")(ids)
        x = x + hk.Embed(self.context, self.width, name="position")(jnp.arange(length))[None]
        mask = jnp.tril(jnp.ones((1, 1, length, length)))
        for i in range(self.layers):
            x = Block(self.heads, name=f"block{i}")(x, mask)
        return hk.Linear(self.vocabulary, name="head")(layer_norm(x, "norm"))


def build(shape: dict[str, int], seed: int) -> tuple[Any, Callable[..., Any]]:
    """Returns the weights and `apply(weights, ids) -> logits`."""
    model = hk.without_apply_rng(hk.transform(lambda ids: LanguageModel(**shape)(ids)))
    ids = jnp.zeros((1, shape["context"]), jnp.int32)
    return model.init(jax.random.key(seed), ids), model.apply
