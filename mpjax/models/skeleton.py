"""The decoder's modules and the canonical tree of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax.formats import quantize
from mpjax.models.block import Block, Sight
from mpjax.models.config import DecoderConfig
from mpjax.models.context import Context
from mpjax.models.layers import Embed, Linear, Norm
from mpjax.precision import Precision, dtype_name, is_fp8

At = Callable[..., Context]  # path prefix below "decoder" -> context


def part_key(key: Any, name: str) -> Any:
    """Returns a key for a named part; it does not depend on which other parts exist."""
    return jax.random.fold_in(key, int.from_bytes(name.encode()[:4], "little") % 2**31)


def outer_parts(config: DecoderConfig, at: At) -> dict[str, tuple[nn.Module, Any]]:
    """Returns the modules outside the blocks, each with an example of its input."""
    c = config
    ids, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, c.width))
    # Named as their paths: what a traced program calls them.
    name = "decoder/{}".format
    embed = Embed(at("embed"), c.vocabulary, c.width, ("vocab", "embed"), name=name("embed"))
    parts: dict[str, tuple[nn.Module, Any]] = {"embed": (embed, ids)}
    if c.position == "learned":
        table = Embed(at("position"), c.context, c.width, (None, "embed"), name=name("position"))
        parts["position"] = (table, ids)
    if c.norm_first:
        parts["norm"] = (Norm(at("norm"), c.norm, c.bias, c.epsilon, name=name("norm")), x)
    if not c.tied:
        head = Linear(at("head"), c.vocabulary, ("embed", "vocab"), name=name("head"))
        parts["head"] = (head, x)
    return parts


def init_boxed(config: DecoderConfig, at: At, key: Any) -> Any:
    """Returns parameters boxed with their logical axes; blocks are stacked along a layer axis."""
    tree = {
        name: part.init(part_key(key, name), example)["params"]
        for name, (part, example) in outer_parts(config, at).items()
    }
    x, sight = jnp.zeros((1, 1, config.width)), Sight(jnp.zeros(1, jnp.int32))
    block, first = Block(at("layers", "0"), config), part_key(key, "layers")
    keys = jnp.stack([jax.random.fold_in(first, layer) for layer in range(config.layers)])
    tree["layers"] = jax.vmap(lambda key: block.init(key, x, sight)["params"])(keys)
    return {"decoder": tree}


def stored(params: Any, precision: Precision) -> Any:
    """Returns drawn weights as stored: those of an fp8 rule as Quantized, a scale for each row."""

    def leaf(path: Any, w: Any) -> Any:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if parts[1] == "layers":
            parts.insert(2, "0")  # all layers are stored alike
        dtype = precision.policy("/".join(parts)).param_dtype
        return quantize(w, dtype_name(dtype), "row", scale_rounding="up") if is_fp8(dtype) else w

    return jax.tree_util.tree_map_with_path(leaf, params)
