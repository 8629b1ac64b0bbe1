"""Embeddings, blocks and the last norm: what every Transformer does before its heads."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mpjax.errors import ConfigError
from mpjax.models.core.module import part_key
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.block import AttentionContext
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.models.transformer.kv_cache import cache_storage, empty
from mpjax.models.transformer.parts import outer_parts
from mpjax.models.transformer.stack import Stack
from mpjax.ops.rotary import sinusoid
from mpjax.precision import Precision, dtype_name, wider


@dataclasses.dataclass(frozen=True)
class Trunk:
    """Runs token ids up to the features behind the last norm.

    Args:
      stack: the blocks.
      shard: constrains activations to logical axes.
      types: number of token types.
    """

    stack: Stack
    shard: Any
    types: int = 0

    def __call__(
        self, p: Any, ids_BT: Any, attention_context: AttentionContext, *, kinds_BT: Any = None,
        cache: Any = None, amax: Any = None, key: Any = None, train: bool = False,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Returns the features (B, T, D), the new cache and the new amax histories.

        Args:
          p: weights below the root.
          ids_BT: token ids.
          sight: where they stand and what they see.
          kinds_BT: token types; None is all 0.
          cache: keys and values, or None.
          amax: histories of the blocks, or None.
          key: of dropout and of recipes that draw, or None.
          train: whether dropout is on.
        """
        c = self.stack.config
        parts = outer_parts(c, self.stack.at, self.stack.name, self.types)

        def run(name: str, x: Any) -> Any:
            return parts[name][0].apply({"params": p[name]}, x)

        x = run("embed", ids_BT)
        if c.scale_embed:
            x = x * jnp.asarray(c.width**0.5, x.dtype)
        if c.position != "rotary":
            if cache is None and ids_BT.shape[1] > c.context and c.position == "learned":
                raise ConfigError(
                    f"model: sequence of {ids_BT.shape[1]} tokens is longer than"
                    f" context={c.context}; set context={ids_BT.shape[1]} or shorten it"
                )
            if c.position == "learned":
                at = run("position", attention_context.positions)
            else:
                at = sinusoid(attention_context.positions, c.width)
            x = x + (at[None] if at.ndim == 2 else at).astype(x.dtype)
        if self.types:
            kinds_BT = jnp.zeros_like(ids_BT) if kinds_BT is None else kinds_BT
            x = x + run("token_type", kinds_BT).astype(x.dtype)
        if c.norm_embed:
            x = run("norm_embed", x)
        x = self.shard(x, ("batch", "length", "embed"))
        dropping = train and c.dropout > 0
        if dropping:
            if key is None:
                raise ConfigError("model: dropout needs a key; pass key= or train=False")
            x = nn.Dropout(c.dropout, deterministic=False).apply(
                {}, x, rngs={"dropout": part_key(key, "embed")}
            )
        x, cache, amax = self.stack(
            p["layers"], x, attention_context, cache, amax or {}, key, dropping
        )
        return (run("norm", x) if c.norm_first else x), cache, amax


def sight_of(tokens: int, keep_BT: Any, state: Any) -> AttentionContext:
    """Returns where the tokens of a decoder's call stand.

    Args:
      tokens: T.
      keep_BT: what is no padding, bool or 0 and 1; None is all.
      state: `position`, `layers` and perhaps `pads` of a cache, or without them.

    Raises:
      ConfigError: padding is given beside a cache.
    """
    if "position" not in state:
        if keep_BT is None:
            return AttentionContext(jnp.arange(tokens))
        keep_BT = jnp.asarray(keep_BT).astype(bool)  # tokenizers give 0 and 1
        # Tokens are counted, padding is not: on either side it changes no token's position.
        return AttentionContext(jnp.maximum(jnp.cumsum(keep_BT, axis=1) - 1, 0), keep_BS=keep_BT)
    if keep_BT is not None:
        raise ConfigError(
            "model: keep is given beside a cache; give the padding as init_cache(pads=...)"
        )
    first = state["position"]
    slots_T = jnp.arange(tokens) + first
    if "pads" not in state:
        return AttentionContext(slots_T, first)
    pads_B1 = state["pads"][:, None]
    keep_BS = jnp.arange(state["layers"][0].shape[2])[None, :] >= pads_B1
    return AttentionContext(jnp.maximum(slots_T[None, :] - pads_B1, 0), first, keep_BS)


def empty_cache(
    config: BlockConfig, precision: Precision, batch: int, length: int, storage: str | Storage
) -> dict[str, Any]:
    """Returns the empty keys and values of a decoder's blocks, and the position 0."""
    c = config
    if c.position == "learned" and length > c.context:
        raise ConfigError(
            f"model: cache of {length} tokens is longer than context={c.context}; generate"
            " fewer tokens"
        )
    attention = [f"decoder/layers/{i}/attention" for i in range(c.layers)]
    dtype = functools.reduce(wider, (precision.policy(path).compute_dtype for path in attention))
    shape = (c.layers, batch, length, c.groups, c.per_head)
    form = cache_storage(storage or dtype_name(dtype))
    return {
        "layers": (empty(shape, form, dtype), empty(shape, form, dtype)),
        "position": jnp.int32(0),
    }
