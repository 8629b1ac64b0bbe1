"""Operations on numbers and their patterns, close to `lax`.

A product under a recipe is some hundred of them. `jax.numpy` checks, promotes and compiles each by
itself, which makes tracing a product four times slower than these, for the same program.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def filled(like: Any, value: Any) -> Any:
    """Returns a number, with its own dtype, in the shape of an array."""
    return lax.broadcast(value, like.shape)


def spread(x: Any, like: Any) -> Any:
    """Returns x in the shape of another array of as many axes; its axes of size 1 are repeated."""
    return lax.broadcast_in_dim(x, like.shape, tuple(range(x.ndim)))


def select(where: Any, x: Any, y: Any) -> Any:
    """Returns x where `where` is true, else y; each an array of its shape, or a NumPy scalar."""
    x, y = (filled(where, v) if isinstance(v, np.generic) else v for v in (x, y))
    return lax.select(where, x, y)


def left(x: Any, by: Any) -> Any:
    """Returns a pattern shifted left."""
    return lax.shift_left(x, by)


def right(x: Any, by: Any) -> Any:
    """Returns a pattern shifted right; zeros come in."""
    return lax.shift_right_logical(x, by)


def as_int(x: Any) -> Any:
    """Returns integers as int32."""
    return lax.convert_element_type(x, jnp.int32)


def as_uint(x: Any) -> Any:
    """Returns integers as uint32."""
    return lax.convert_element_type(x, jnp.uint32)


def as_float(x: Any) -> Any:
    """Returns numbers as float32."""
    return lax.convert_element_type(x, jnp.float32)


def bits_of(x: Any) -> Any:
    """Returns the patterns of float32 numbers, int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def number_of(pattern: Any) -> Any:
    """Returns the float32 numbers of patterns."""
    return lax.bitcast_convert_type(pattern, jnp.float32)
