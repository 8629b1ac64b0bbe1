"""Weights that each device holds whole while it works on its part of a batch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.ops.products.dot import add_parts
from mpjax.typing import Array, Axes, DType, Shard


class Copies(NamedTuple):
    """A weight once for each part of a batch.

    Args:
      narrow: (parts, ...), in the dtype in which it is used.
      wide: zeros in the dtype of the weight, which its gradient takes. Nothing reads them, so that
        a compiler holds none; widened itself, the weight would lie twice as large before the loop.
    """

    narrow: Array
    wide: Array

    def read(self) -> Array:
        """The values of `narrow` in the dtype of `wide`; the gradient is that of `wide`."""
        return _read(self.narrow, self.wide)


@jax.custom_jvp
def _read(narrow: Array, wide: Array) -> Array:
    return narrow.astype(wide.dtype)


_read.defjvp(lambda primals, tangents: (_read(*primals), tangents[1]))


class Spread(NamedTuple):
    """How a weight is brought together, and its gradients are summed.

    Args:
      parts: devices that cut the batch.
      compute: dtype in which the weight is used.
      gradient_dtype: in which its gradients are summed over the parts.
      axes: logical axes of the weight.
      shard: the sharding constraint.
    """

    parts: int
    compute: DType
    gradient_dtype: DType
    axes: Axes
    shard: Shard

    @property
    def held(self) -> Axes:
        """Its axes on a device that has it whole but for what `vocab` cuts."""
        return tuple(name if name == "vocab" else None for name in self.axes)

    def copies(self, w: Array) -> Copies:
        """The weight once for each part, brought together in the narrower dtype."""
        narrow = w.astype(self.compute) if self.compute.itemsize < w.dtype.itemsize else w
        each = jnp.broadcast_to(self.shard(narrow, self.held)[None], (self.parts, *w.shape))
        like = jnp.zeros((self.parts, *w.shape), w.dtype)
        return Copies(*(self.shard(a, ("batch", *self.held)) for a in (each, like)))

    def total(self, d_wide: Array) -> Array:
        """The sum of the gradients of all parts, cut as the weight is."""
        d = self.shard(d_wide, ("batch", *self.held)).astype(self.gradient_dtype)
        return self.shard(add_parts(d), self.axes).astype(d_wide.dtype)


Weights = tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def spread(
    x: Array, weights: Weights, specs: tuple[Spread, ...]
) -> tuple[Array, tuple[Copies, ...]]:
    """Returns features, and weights once for each part of their batch.

    What a loop does with a part's copy sends nothing: weights are brought together before it, and
    their gradients are summed over the parts after it, once, and before the features' gradient
    goes on: else the compiler keeps them, whole on each device, for as long as it likes.

    Args:
      x: what is multiplied by them.
      weights: each as it is stored.
      specs: of each.
    """
    return x, tuple(one.copies(w) for one, w in zip(specs, weights, strict=True))


def _spread_bwd(
    specs: tuple[Spread, ...], residuals: None, d: tuple[Array, tuple[Copies, ...]]
) -> tuple[Array, Weights]:
    del residuals
    dx, d_copies = d
    sums = tuple(one.total(d.wide) for one, d in zip(specs, d_copies, strict=True))
    return lax.optimization_barrier((dx, sums))


spread.defvjp(lambda x, weights, specs: (spread(x, weights, specs), None), _spread_bwd)


@jax.custom_vjp
def first(loss: Array) -> Array:
    """Returns a loss whose gradient is computed after it; NaN if it is NaN.

    A backward pass that computes the loss again has no need of its value: the compiler would put it
    off to the end, and keep what it reads, the copies of `spread` among it, until then.
    """
    return loss


first.defvjp(
    lambda loss: (loss, loss),
    lambda loss, d: (jnp.where(jnp.isnan(loss), jnp.full_like(d, jnp.nan), d),),
)
