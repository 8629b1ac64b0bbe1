"""Operations on numbers and their bit patterns, thin over `lax`.

A product under a recipe runs about a hundred of them. `jax.numpy` checks, promotes and compiles
each one separately, which makes tracing a product four times slower, for the same program.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.typing import Array, ArrayLike

left, right = lax.shift_left, lax.shift_right_logical  # shifts of a pattern; zeros come in
as_int = functools.partial(lax.convert_element_type, new_dtype=jnp.int32)
as_uint = functools.partial(lax.convert_element_type, new_dtype=jnp.uint32)
as_float = functools.partial(lax.convert_element_type, new_dtype=jnp.float32)
bits_of = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.int32)  # of float32
number_of = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.float32)


def filled(like: Array, value: ArrayLike) -> Array:
    """Returns a number, with its own dtype, in the shape of an array."""
    return lax.broadcast(value, like.shape)


def spread(x: Array, like: Array) -> Array:
    """Returns x in the shape of another array of as many axes; its axes of size 1 are repeated."""
    return lax.broadcast_in_dim(x, like.shape, tuple(range(x.ndim)))


def select(where: Array, x: Array | np.number, y: Array | np.number) -> Array:
    """Returns x where `where` is true, else y; each an array of its shape, or a NumPy scalar."""
    x, y = (filled(where, v) if isinstance(v, np.generic) else v for v in (x, y))
    return lax.select(where, x, y)
