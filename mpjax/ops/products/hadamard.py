"""The Hadamard transform with random signs, which spreads an outlier over its block."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import as_array
from mpjax.typing import Array, ArrayLike


def hadamard(x: ArrayLike, axis: int, signs: ArrayLike) -> Array:
    r"""Returns $H \mathrm{diag}(s) x$ along an axis, in blocks as long as the signs.

    $H \mathrm{diag}(s)$ is orthogonal, so a product over this axis of two arrays so transformed is
    the product of the two; an outlier is spread over its block. The last block is filled with
    zeros.

    Args:
      x: an array.
      axis: the axis.
      signs: +1 and -1, a power of two of them.

    Raises:
      ConfigError: no such axis, or another number of signs.

    Example:
      >>> hadamard(jnp.array([1.0, 0.0]), 0, jnp.ones(2)).round(3).tolist()
      [0.7070000171661377, 0.7070000171661377]
    """
    x, signs = as_array(x, "hadamard: x"), as_array(signs, "hadamard: signs")
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim:
        raise ConfigError(
            f"hadamard: axis {brief(axis)} of an array of {x.ndim} axes; give one of"
            f" {-x.ndim} .. {x.ndim - 1}"
        )
    size = signs.size
    if signs.ndim != 1 or size == 0 or size & (size - 1):
        raise ConfigError(
            f"hadamard: signs have shape {signs.shape}; give a power of 2, such as 16"
        )
    rows = jnp.moveaxis(x, axis, -1).astype(jnp.float32)
    rows = jnp.pad(rows, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[axis] % size)])
    blocks = rows.reshape(*rows.shape[:-1], -1, size) * signs.reshape((1,) * x.ndim + (-1,))
    orthogonal = (scipy.linalg.hadamard(size) / np.sqrt(size)).astype(np.float32)
    turned = jnp.matmul(blocks, orthogonal, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(turned.reshape(rows.shape), -1, axis)
