"""Weights that each device holds whole while it works on its part of a batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.typing import Array, Axes, DType, Shard


def _held(axes: Axes) -> Axes:
    """What is left of the axes on a device: all that no device of the batch cuts."""
    return tuple(name if name == "vocab" else None for name in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def spread(
    w: Array, parts: int, compute: DType, gradient_dtype: DType, axes: Axes, shard: Shard
) -> Array:
    """Returns a weight once for each part of a batch, (parts, ...).

    What a loop does with a part's copy sends nothing: the weight is brought together before it, in
    the narrower one of its own and the compute dtype, and gradients are summed over the parts after
    it, once.

    Args:
      w: the weight.
      parts: devices that cut the batch.
      compute: dtype in which the weight is used.
      gradient_dtype: in which its gradients are summed over the parts.
      axes: logical axes of the weight.
      shard: the sharding constraint.
    """
    del gradient_dtype  # of the backward pass
    narrow = w.astype(compute) if compute.itemsize < w.dtype.itemsize else w
    whole = shard(narrow, _held(axes)).astype(w.dtype)
    copies = jnp.broadcast_to(whole[None], (parts, *w.shape))
    return shard(copies, ("batch", *_held(axes)))


def _spread_fwd(
    w: Array, parts: int, compute: DType, gradient_dtype: DType, axes: Axes, shard: Shard
) -> tuple[Array, None]:
    return spread(w, parts, compute, gradient_dtype, axes, shard), None


def _spread_bwd(
    parts: int, compute: DType, gradient_dtype: DType, axes: Axes, shard: Shard,
    residuals: None, d_copies: Array,
) -> tuple[Array]:  # fmt: skip
    del parts, compute, residuals
    d = shard(d_copies, ("batch", *_held(axes))).astype(gradient_dtype)
    # not jnp.sum, which takes 16-bit terms as float32 and would send them so
    summed = lax.reduce(d, jnp.zeros((), d.dtype), lax.add, (0,))
    return (shard(summed, axes).astype(d_copies.dtype),)


spread.defvjp(_spread_fwd, _spread_bwd)
