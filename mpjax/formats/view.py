"""Trees with quantised leaves, and what a forward pass sees of them."""

from __future__ import annotations

from typing import Any

import jax

from mpjax.formats.quantize import Quantized


def is_quantized(leaf: Any) -> bool:
    """Returns whether a leaf is a Quantized."""
    return isinstance(leaf, Quantized)


def weight_view(params: Any) -> Any:
    """Returns weights that a forward pass can use: Quantized leaves dequantised, others as is.

    Example:
      >>> import jax.numpy as jnp
      >>> from mpjax.formats import quantize
      >>> q = quantize(jnp.array([1.0, 0.3]), "e4m3", scale_rounding="up")
      >>> weight_view({"w": q, "norm": jnp.ones(1)})["w"].tolist()
      [1.0, 0.3125]
    """
    return jax.tree.map(
        lambda p: p.dequantize() if is_quantized(p) else p, params, is_leaf=is_quantized
    )


def slice_view(params: Any) -> Any:
    """Returns weights as `weight_view` does, but stacks of Quantized as they are.

    A slice or a scan along their leading axis yields a Quantized for each, so that not more than
    one is dequantised at a time.
    """
    return jax.tree.map(
        lambda p: p.dequantize() if is_quantized(p) and not p.is_stack else p,
        params,
        is_leaf=is_quantized,
    )
