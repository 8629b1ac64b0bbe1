"""A causal language model in Flax NNX, as its guide writes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class LanguageModel(nnx.Module):
    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        context: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.position(jnp.arange(ids.shape[1])[None])
        mask = nnx.make_causal_mask(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def model(shape: dict[str, int], seed: int) -> LanguageModel:
    """Returns the model as its library gives it."""
    return LanguageModel(**shape, rngs=nnx.Rngs(seed))


def functional(model: LanguageModel) -> tuple[Any, Callable[..., Any]]:
    """Returns the weights and `apply(weights, ids) -> logits` of a model."""
    graph, weights = nnx.split(model)
    return weights, lambda weights, ids: nnx.merge(graph, weights)(ids)


def build(shape: dict[str, int], seed: int) -> tuple[Any, Callable[..., Any]]:
    """Returns the weights and `apply(weights, ids) -> logits`."""
    return functional(model(shape, seed))
