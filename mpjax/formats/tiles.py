"""Tiles: arrays cut into the groups of numbers that share a scale."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.formats.pattern import as_float, as_int, bits_of, filled, number_of, select, spread
from mpjax.typing import Array, Shape


def split(x: Array, tile: Shape, padding: str = "constant") -> Array:
    """Cuts each axis into (groups, tile), after padding to whole tiles, with zeros or the edge."""
    pad = [(0, -n % t) for n, t in zip(x.shape, tile, strict=True)]
    if any(after for _, after in pad):
        x = jnp.pad(x, pad, padding)
    return lax.reshape(x, [k for n, t in zip(x.shape, tile, strict=True) for k in (n // t, t)])


def _join(x: Array, shape: Shape) -> Array:
    """Undoes `split`."""
    x = lax.reshape(x, [x.shape[2 * d] * x.shape[2 * d + 1] for d in range(len(shape))])
    return x if x.shape == shape else lax.slice(x, (0,) * len(shape), shape)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def amax_of(x: Array, tile: Shape) -> Array:
    """Returns the largest magnitude of each tile, float32, NaN where a tile holds one."""
    parts = split(x, tile)
    return largest(parts, tuple(range(1, parts.ndim, 2)))


def largest(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns the largest magnitude along axes, float32.

    It compares bit patterns, which are ordered as their numbers, with NaN above inf: on CPU a
    compiled maximum of floats ignores a NaN.
    """
    whole = np.uint32 if x.dtype == jnp.float32 else np.uint16
    magnitude = whole(np.iinfo(whole).max >> 1)
    u = lax.bitwise_and(lax.bitcast_convert_type(x, whole), magnitude)
    top = lax.reduce(u, whole(0), lax.max, axes)
    return as_float(lax.bitcast_convert_type(top, x.dtype))


def sum_of(x: Array, tile: Shape) -> Array:
    """Returns the sum of each tile."""
    parts = split(x, tile)
    return jnp.sum(parts, axis=tuple(range(1, parts.ndim, 2)))


def per_tile(x: Array, scales: Array, tile: Shape, work: Callable[[Array, Array], Array]) -> Array:
    """Returns work(x, scales), with the scale of its tile for each number of x."""
    if scales.size == 1:
        return work(x, lax.reshape(scales, (1,) * x.ndim))
    if all(t in (1, n) for t, n in zip(tile, x.shape, strict=True)):
        return work(x, scales)
    wide = lax.reshape(scales, [k for n in scales.shape for k in (n, 1)])
    return _join(work(split(x, tile), wide), x.shape)


# Compiled arithmetic on CPUs flushes subnormal float32 to zero. So 2^-127, the smallest number of
# e8m0, subnormal numbers and subnormal products are handled as integer multiples of 2^-149.
_LEAST = np.int32(0x00400000)  # the pattern of 2^-127
_COUNTS = np.int32(149 << 23)  # a factor of 2^149, added to a pattern
_F, _I = np.float32, np.int32


def _divide(x: Array, inverse: Array) -> Array:
    pattern = bits_of(x)
    magnitude = lax.bitwise_and(pattern, _I(0x7FFFFFFF))
    count = as_float(select(lax.lt(pattern, _I(0)), lax.neg(magnitude), magnitude))
    # 2^-149 / scale: 0 (NaN for a NaN) where the scale is far above 2^-149
    large = lax.gt(inverse, _F(2.0**24))
    one = number_of(lax.sub(select(large, bits_of(inverse), _COUNTS), _COUNTS))
    one = select(large, one, lax.mul(inverse, _F(0)))
    exact, one, inverse = (spread(v, x) for v in (lax.eq(inverse, _F(1)), one, inverse))
    small = lax.lt(magnitude, _I(0x00800000))
    divided = select(small, lax.mul(count, one), lax.mul(x, inverse))
    return select(exact, x, divided)


def _multiply(values: Array, scales: Array) -> Array:
    pattern = bits_of(scales)
    least = lax.eq(pattern, _LEAST)
    half, safe = select(least, _F(0.5), _F(1)), select(least, _F(2.0**-126), scales)
    small = lax.lt(scales, _F(2.0**-24))  # else no product of a format's numbers is subnormal
    # the count of 2^-127 is 2^22, whose pattern is _COUNTS
    truncated = select(lax.bitwise_and(small, lax.bitwise_not(least)), pattern, _I(0))
    counts, exact = number_of(lax.add(truncated, _COUNTS)), lax.eq(scales, _F(1))
    counts, exact, small, half, safe = (
        spread(v, values) for v in (counts, exact, small, half, safe)
    )
    # No product of a value of 4 or more is subnormal, and larger counts would not be finite.
    count = lax.mul(lax.min(lax.abs(values), _F(4)), counts)
    sign = lax.bitwise_and(bits_of(values), _I(-(2**31)))
    whole = lax.round(count, lax.RoundingMethod.TO_NEAREST_EVEN)
    subnormal = number_of(lax.bitwise_or(as_int(whole), sign))
    few = lax.bitwise_and(small, lax.lt(count, _F(2.0**23)))
    product = select(few, subnormal, lax.mul(lax.mul(values, half), safe))
    return select(exact, values, product)


def scale_down(x: Array, scales: Array, tile: Shape) -> Array:
    """Returns x times 1 / scales, float32: XLA rewrites a division by repeated numbers so."""
    inverse = lax.div(filled(scales, _F(1)), scales)
    inverse = select(lax.gt(inverse, _F(2.0**127)), _F(2.0**127), inverse)  # 1 / 2^-127 is inf
    return per_tile(as_float(x), inverse, tile, _divide)


def scale_up(values: Array, scales: Array, tile: Shape) -> Array:
    """Returns values times scales, float32.

    Args:
      values: numbers of a format.
      scales: float32; of its subnormal numbers only 2^-127.
      tile: of the scales.
    """
    return per_tile(as_float(values), scales, tile, _multiply)
