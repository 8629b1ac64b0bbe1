"""The modules around a stack of blocks, and the canonical tree of their parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax.models.core.layers import Embed, Linear, Norm
from mpjax.models.core.module import At, part_key
from mpjax.models.transformer.block import AttentionContext, Block
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.models.transformer.decoder_config import DecoderConfig

Parts = dict[str, tuple[nn.Module, tuple[Any, ...]]]  # name -> module, examples of its inputs


def outer_parts(config: BlockConfig, at: At, root: str, types: int = 0) -> Parts:
    """Returns embeddings and norms around the blocks.

    Args:
      config: shape.
      at: path prefix -> context.
      root: first part of their paths.
      types: number of token types.
    """
    c = config
    ids, x = (jnp.zeros((1, 1), jnp.int32),), (jnp.zeros((1, 1, c.width)),)
    # Named as their paths: what a traced program calls them.
    name = f"{root}/{{}}".format

    def norm(own: str) -> Norm:
        return Norm(at(own), c.norm, c.bias, c.epsilon, name=name(own))

    def table(own: str, rows: int, axis: str | None) -> Embed:
        return Embed(at(own), rows, c.width, (axis, "embed"), name=name(own))

    parts: Parts = {"embed": (table("embed", c.vocabulary, "vocab"), ids)}
    if c.position == "learned":
        parts["position"] = (table("position", c.context, None), ids)
    if types:
        parts["token_type"] = (table("token_type", types, None), ids)
    if c.norm_embed:
        parts["norm_embed"] = (norm("norm_embed"), x)
    if c.norm_first:
        parts["norm"] = (norm("norm"), x)
    return parts


def decoder_parts(config: DecoderConfig, at: At, root: str = "decoder") -> Parts:
    """Returns the modules around a decoder's blocks, its head included."""
    c, parts = config, outer_parts(config, at, root)
    if not c.tied:
        axes = ("embed", "vocab")
        head = Linear(at("head"), c.vocabulary, axes, c.head_bias, name=f"{root}/head")
        parts["head"] = (head, (jnp.zeros((1, 1, c.width)),))
    return parts


def init_boxed(
    config: BlockConfig, at: At, key: Any, parts: Parts, *, causal: bool = True, cross: bool = False
) -> Any:
    """Returns parameters boxed with their logical axes; blocks are stacked along a layer axis."""
    made = {
        name: part.init(part_key(key, name), *examples) for name, (part, examples) in parts.items()
    }
    tree = {name: variables["params"] for name, variables in made.items() if variables}
    x = jnp.zeros((1, 1, config.width))
    attention_context = AttentionContext(jnp.zeros(1, jnp.int32), source_BSD=x if cross else None)
    block, first = Block(at("layers", "0"), config, causal, cross), part_key(key, "layers")
    keys = jnp.stack([jax.random.fold_in(first, layer) for layer in range(config.layers)])
    tree["layers"] = jax.vmap(lambda key: block.init(key, x, attention_context)["params"])(keys)
    return tree
