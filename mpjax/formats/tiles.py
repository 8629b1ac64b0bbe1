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


def scale_down(x: Any, scales: Any, tile: tuple[int, ...]) -> Any:
    """Returns x times 1 / scales, float32: what XLA makes of a division by repeated numbers."""
    return per_tile(x.astype(jnp.float32), 1 / scales, tile, lambda x, s: x * s)
