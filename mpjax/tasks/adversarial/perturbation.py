"""Perturbations of token embeddings, normed per example in float32.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.typing import Array, ArrayLike, Key

NORMS = ("l2", "linf")


def check_norm(where: str, norm: str) -> None:
    """Checks the name of a norm.

    Raises:
      ConfigError: it is unknown.
    """
    if norm not in NORMS:
        raise ConfigError(f"{where}: unknown norm {brief(norm)}; known: {' '.join(NORMS)}")


def sizes(x_BTD: Array, norm: str = "l2") -> Array:
    """Returns the norm of each example over its tokens, (B,) float32.

    Example:
      >>> round(sizes(jnp.array([[[3e-30, 4e-30]]])).item() * 1e30, 3)  # no square vanishes
      5.0
    """
    x_BTD = x_BTD.astype(jnp.float32)  # a 16-bit sum of squares overflows or vanishes
    amax_B = jnp.max(jnp.abs(x_BTD), axis=(1, 2))
    if norm == "linf":
        return amax_B
    amax_B = jnp.where(amax_B > 0, amax_B, jnp.float32(1))
    return amax_B * jnp.sqrt(jnp.sum(jnp.square(x_BTD / _wide(amax_B)), axis=(1, 2)))


def _wide(x_B: Array) -> Array:
    return x_B[:, None, None]


def unit(x_BTD: Array, norm: str = "l2") -> Array:
    """Returns each example divided by its norm; a zero stays zero."""
    size_B11 = _wide(sizes(x_BTD, norm))
    return jnp.where(size_B11 > 0, x_BTD / jnp.where(size_B11 > 0, size_B11, 1.0), 0.0)


def steepest(x_BTD: Array, norm: str = "l2") -> Array:
    """Returns the direction of norm 1 along which a loss of this gradient rises fastest."""
    return jnp.sign(x_BTD) if norm == "linf" else unit(x_BTD)


def projected(x_BTD: Array, epsilon: float, norm: str = "l2") -> Array:
    """Returns each example moved into the ball of a radius, if it is outside.

    Example:
      >>> found = projected(jnp.array([[[3.0, 4.0]], [[0.0, 0.5]]]), 1.0)
      >>> sizes(found).round(3).tolist()
      [1.0, 0.5]
    """
    if norm == "linf":
        return jnp.clip(x_BTD, -epsilon, epsilon)
    size_B11 = _wide(sizes(x_BTD))
    return jnp.where(size_B11 > epsilon, unit(x_BTD) * epsilon, x_BTD)


def drawn(key: Key, room_BT: Array, width: int, kind: str) -> Array:
    r"""Returns a random offset, zero where there is no room.

    Args:
      key: of the draw.
      room_BT: which tokens may be moved.
      width: features D.
      kind: `normal`, of variance 1; or `uniform` in $(-1, 1) / \sqrt{N}$ with the $N$ numbers of an
        example that may be moved, whose norm is below 1.
    """
    shape = (*room_BT.shape, width)
    if kind == "normal":
        return masked(jax.random.normal(key, shape), room_BT)
    count_B = jnp.sum(room_BT, axis=1, dtype=jnp.float32) * width
    draw = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    return masked(draw, room_BT) / _wide(jnp.sqrt(jnp.maximum(count_B, 1.0)))


def masked(x_BTD: Array, room_BT: Array) -> Array:
    """Returns zero where there is no room; no product, since a gradient there may be NaN."""
    return jnp.where(room_BT[..., None], x_BTD, jnp.zeros_like(x_BTD))


class Slope(NamedTuple):
    """The gradient of a loss by an offset.

    Args:
      gradient_BTD: unscaled, float32; zero in examples where it is not finite.
      finite_B: in which examples it is.
    """

    gradient_BTD: Array
    finite_B: Array


def slope(
    loss: Callable[[Array], Array], offset_BTD: Array, room_BT: Array, loss_scale: ArrayLike = 1.0
) -> Slope:
    r"""Returns $\frac{1}{s} \nabla_\delta\,(s\,L(\delta))$, in float32.

    The product with $s$ is taken in float32 and enters the backward pass as its first cotangent, as
    for the gradients of weights; it is taken away before anything is squared.

    Args:
      loss: offset (B, T, D) -> a scalar.
      offset_BTD: where the gradient is taken.
      room_BT: which tokens may be moved.
      loss_scale: $s$.

    Example:
      >>> room = jnp.array([[True, False], [True, True]])
      >>> found = slope(lambda x: jnp.sum(x * x), jnp.ones((2, 2, 1)), room, 8.0)
      >>> found.gradient_BTD[..., 0].tolist(), found.finite_B.tolist()
      ([[2.0, 0.0], [2.0, 2.0]], [True, True])
    """
    scale = jnp.asarray(loss_scale, jnp.float32)
    scaled = jax.grad(lambda x: loss(x).astype(jnp.float32) * scale)(offset_BTD)
    found = masked(scaled.astype(jnp.float32) / scale, room_BT)
    finite_B = jnp.all(jnp.isfinite(found), axis=(1, 2))
    return Slope(jnp.where(_wide(finite_B), found, jnp.zeros_like(found)), finite_B)
