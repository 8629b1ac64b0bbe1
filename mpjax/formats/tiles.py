"""Tiles: arrays cut into the groups of numbers that share a scale."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def split(x: Any, tile: tuple[int, ...], padding: str = "constant") -> Any:
    """Cuts each axis into (groups, tile), after padding to whole tiles, with zeros or the edge."""
    pad = [(0, -n % t) for n, t in zip(x.shape, tile, strict=True)]
    if any(after for _, after in pad):
        x = jnp.pad(x, pad, padding)
    return x.reshape([k for n, t in zip(x.shape, tile, strict=True) for k in (n // t, t)])


def _join(x: Any, shape: tuple[int, ...]) -> Any:
    """Undoes `split`."""
    x = x.reshape([x.shape[2 * d] * x.shape[2 * d + 1] for d in range(len(shape))])
    return x if x.shape == shape else x[tuple(slice(n) for n in shape)]


@functools.partial(jax.jit, static_argnums=1, inline=True)
def amax_of(x: Any, tile: tuple[int, ...]) -> Any:
    """Returns the largest magnitude of each tile, float32, NaN where a tile holds one."""
    parts = split(x, tile)
    return largest(parts, tuple(range(1, parts.ndim, 2)))


def largest(x: Any, axes: tuple[int, ...]) -> Any:
    """Returns the largest magnitude along axes, float32.

    On bits, where magnitudes are ordered as their numbers and NaN is above inf: on CPU a compiled
    maximum of floats passes over a NaN.
    """
    whole = jnp.uint32 if x.dtype == jnp.float32 else jnp.uint16
    u = jax.lax.bitcast_convert_type(x, whole) & whole(jnp.iinfo(whole).max >> 1)
    return jax.lax.bitcast_convert_type(jnp.max(u, axis=axes), x.dtype).astype(jnp.float32)


def sum_of(x: Any, tile: tuple[int, ...]) -> Any:
    """Returns the sum of each tile."""
    parts = split(x, tile)
    return jnp.sum(parts, axis=tuple(range(1, parts.ndim, 2)))


def per_tile(x: Any, scales: Any, tile: tuple[int, ...], work: Any) -> Any:
    """Returns work(x, scales), scales repeated over the numbers of their tile."""
    if scales.size == 1:
        return work(x, scales.reshape((1,) * x.ndim))
    if all(t in (1, n) for t, n in zip(tile, x.shape, strict=True)):
        return work(x, scales)  # they broadcast as they are
    wide = scales.reshape([k for n in scales.shape for k in (n, 1)])
    return _join(work(split(x, tile), wide), x.shape)


# Compiled arithmetic on CPUs takes subnormal float32 for zero. So 2^-127, the smallest number of
# e8m0, subnormal numbers and subnormal products are read and made as integers, which count 2^-149.
_LEAST = 0x00400000  # the pattern of 2^-127
_COUNTS = 149 << 23  # a factor of 2^149, added to a pattern


def _pattern(x: Any) -> Any:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(pattern: Any) -> Any:
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)


def _divide(x: Any, inverse: Any) -> Any:
    pattern = _pattern(x)
    magnitude = pattern & 0x7FFFFFFF
    count = jnp.where(pattern < 0, -magnitude, magnitude).astype(jnp.float32)
    # 1 / scale of one of them: nothing, and NaN of NaN, where the scale is far above 2^-149
    large = inverse > 2.0**24
    one = _float(jnp.where(large, _pattern(inverse), _COUNTS) - _COUNTS)
    one = jnp.where(large, one, inverse * 0)
    divided = jnp.where(magnitude < 0x00800000, count * one, x * inverse)
    return jnp.where(inverse == 1, x, divided)


def _multiply(values: Any, scales: Any) -> Any:
    pattern = _pattern(scales)
    least = pattern == _LEAST
    half, safe = jnp.where(least, 0.5, 1.0), jnp.where(least, jnp.float32(2.0**-126), scales)
    small = scales < 2.0**-24  # else no product of a format's numbers is subnormal
    counts = _float(jnp.where(small & ~least, pattern, 0) + _COUNTS)  # of 2^-127 they are 2^22
    # Of 4 or more no product is subnormal either, and larger counts would not be finite.
    count = jnp.minimum(jnp.abs(values), 4) * counts
    sign = _pattern(values) & jnp.int32(-(2**31))
    subnormal = _float(jnp.round(count).astype(jnp.int32) | sign)
    product = jnp.where(small & (count < 2.0**23), subnormal, values * half * safe)
    return jnp.where(scales == 1, values, product)


def scale_down(x: Any, scales: Any, tile: tuple[int, ...]) -> Any:
    """Returns x times 1 / scales, float32: what XLA makes of a division by repeated numbers."""
    inverse = 1 / scales
    inverse = jnp.where(inverse > 2.0**127, jnp.float32(2.0**127), inverse)  # inf, of 2^-127
    return per_tile(x.astype(jnp.float32), inverse, tile, _divide)


def scale_up(values: Any, scales: Any, tile: tuple[int, ...]) -> Any:
    """Returns values times scales, float32.

    Args:
      values: numbers of a format.
      scales: float32; of its subnormal numbers only 2^-127.
      tile: of the scales.
    """
    return per_tile(values.astype(jnp.float32), scales, tile, _multiply)
