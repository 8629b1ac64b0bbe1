"""Arrays in a few numbers: a digest of their bits, whether they hold NaN, their range."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.interpret.core.retrace import is_float
from mpjax.interpret.nonfinite.fault import is_number
from mpjax.typing import Array


def digest(x: Array) -> Array:
    """Returns a uint32 that changes when a bit of an array does; all NaN are alike."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if is_float(x):
        x = jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, x.dtype), x)
        x = lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
    bits = x.astype(jnp.uint32).ravel()
    odd = lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435769) | jnp.uint32(1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def has_nan(x: Array) -> Array:
    """Returns whether an array holds a NaN, as a bool scalar."""
    return jnp.any(jnp.isnan(x)) if is_number(x) else jnp.zeros((), jnp.bool_)


def _real(x: Array) -> Array:
    """Numbers as float32, to be shown; complex ones by their magnitudes."""
    x = jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else jnp.asarray(x)
    return x.astype(jnp.float32)


def range_of(x: Array) -> Array:
    """Returns smallest, largest and largest finite magnitude, without NaN, as float32."""
    if not is_number(x) or not jnp.size(x):
        return jnp.zeros(3, jnp.float32)
    x, inf = _real(x), jnp.float32(jnp.inf)
    nan = jnp.isnan(x)
    low, high = jnp.min(jnp.where(nan, inf, x)), jnp.max(jnp.where(nan, -inf, x))
    amax = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.float32(0)))
    return jnp.stack([low, high, amax])


def among(x: Array, mask: Array, least: Array, most: Array) -> tuple[Array, Array]:
    """Returns the smaller of `least` and the values where a mask is set, and the larger of `most`.

    Args:
      x: an array; of complex numbers the magnitudes count.
      mask: in its shape.
      least: a float32 number.
      most: a float32 number.
    """
    x, inf = _real(x), jnp.float32(jnp.inf)
    low, high = jnp.min(jnp.where(mask, x, inf)), jnp.max(jnp.where(mask, x, -inf))
    return jnp.minimum(least, low), jnp.maximum(most, high)
