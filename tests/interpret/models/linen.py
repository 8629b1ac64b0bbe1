"""A causal language model in Flax Linen, as its guide writes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm(name="norm1")(x)
        y = nn.MultiHeadDotProductAttention(self.heads, deterministic=True, name="attention")(
            y, mask=mask
        )
        x = x + y
        y = nn.LayerNorm(name="norm2")(x)
        y = nn.Dense(4 * x.shape[-1], name="up")(y)
        y = nn.gelu(y)
        return x + nn.Dense(x.shape[-1], name="down")(y)


class LanguageModel(nn.Module):
    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int

    @nn.compact
    def __call__(self, ids):
        place = jnp.arange(ids.shape[1])[None]
        x = nn.Embed(self.vocabulary, self.width, name="embed")(ids)
        x = x + nn.Embed(self.context, self.width, name="position")(place)
        mask = nn.make_causal_mask(ids)
        for i in range(self.layers):
            x = Block(self.heads, name=f"block{i}")(x, mask)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.vocabulary, name="head")(x)


def build(shape: dict[str, int], seed: int) -> tuple[Any, Callable[..., Any]]:
    """Returns the weights and `apply(weights, ids) -> logits`."""
    model = LanguageModel(**shape)
    ids = jnp.zeros((1, shape["context"]), jnp.int32)
    return model.init(jax.random.key(seed), ids), model.apply
