"""An encoder in bare JAX: embeddings, and their mean over what is kept. Tasks need no more."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mpjax.precision import get_precision


class Bag:
    """`init` and `apply` as our encoders have them, with every head.

    Args:
      vocabulary: V.
      heads: name -> classes; `class` and `next` read the mean, the others each token.
      precision: its own.
    """

    def __init__(self, vocabulary: int, heads: dict[str, int], precision: str = "fp32"):
        self.vocabulary, self.heads = vocabulary, heads
        self.precision = get_precision(precision)
        self.axes = None

    def init(self, key: Any) -> Any:
        sizes = {"table": (self.vocabulary, 16), "types": (2, 16)}
        sizes |= {name: (32, count) for name, count in self.heads.items()}
        return {
            name: 0.3 * jax.random.normal(jax.random.fold_in(key, i), shape)
            for i, (name, shape) in enumerate(sizes.items())
        }

    def apply(
        self, params: Any, inputs: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        assert set(inputs) <= {"ids", "types", "keep"}, "no model sees the labels"
        keep = inputs["keep"][..., None]
        x = params["table"][inputs["ids"]] + params["types"][inputs["types"]]
        x = jnp.where(keep, x, jnp.zeros_like(x))
        mean = jnp.sum(x, 1) / jnp.maximum(jnp.sum(keep, 1), 1).astype(x.dtype)
        wide = jnp.concatenate([x, jnp.broadcast_to(mean[:, None], x.shape)], -1)
        pooled = jnp.concatenate([mean, jnp.abs(mean)], -1)
        of = {name: pooled if name in ("class", "next") else wide for name in self.heads}
        return {name: x @ params[name] for name, x in of.items()}, state
