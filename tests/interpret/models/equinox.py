"""A causal language model in Equinox, as its examples write one: one sequence, batched by vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, width, heads, key):
        attention, mlp = jax.random.split(key)
        self.norm1 = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=attention)
        self.norm2 = eqx.nn.LayerNorm(width)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=mlp)

    def __call__(self, x, mask):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class LanguageModel(eqx.Module):
    embed: eqx.nn.Embedding
    position: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, vocabulary, width, layers, heads, context, *, key):
        embed, position, head, *blocks = jax.random.split(key, layers + 3)
        self.embed = eqx.nn.Embedding(vocabulary, width, key=embed)
        self.position = eqx.nn.Embedding(context, width, key=position)
        self.blocks = [Block(width, heads, k) for k in blocks]
        self.norm = eqx.nn.LayerNorm(width)
        self.head = eqx.nn.Linear(width, vocabulary, key=head)

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids) + jax.vmap(self.position)(jnp.arange(len(ids)))
        mask = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
        for block in self.blocks:
            x = block(x, mask)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def model(shape: dict[str, int], seed: int) -> LanguageModel:
    """Returns the model as its library gives it."""
    return LanguageModel(**shape, key=jax.random.key(seed))


def functional(model: LanguageModel) -> tuple[Any, Callable[..., Any]]:
    """Returns the weights and `apply(weights, ids) -> logits` of a model."""
    weights, rest = eqx.partition(model, eqx.is_array)
    return weights, lambda weights, ids: jax.vmap(eqx.combine(weights, rest))(ids)


def build(shape: dict[str, int], seed: int) -> tuple[Any, Callable[..., Any]]:
    """Returns the weights and `apply(weights, ids) -> logits`."""
    return functional(model(shape, seed))
