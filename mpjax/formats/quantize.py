"""Quantising arrays: finding scales and rounding values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mpjax.errors import ConfigError, brief, explains_calls
from mpjax.formats.checks import ROUNDED, as_array
from mpjax.formats.format_table import Format, FormatLike
from mpjax.formats.quantized import Quantized
from mpjax.formats.rounding import _round, check_rounding, random_bits
from mpjax.formats.scaling import (
    Scaling,
    check_offset,
    check_scaling,
    to_range,
    to_scale,
    two_level,
)
from mpjax.formats.tiles import amax_of, largest, per_tile, scale_down, split
from mpjax.typing import Key, Shape


def find_scales(
    x: Array, format: Format, scaling: Scaling, tile: Shape, scale_rounding: str
) -> tuple[Array, Array | None]:
    """Returns the scales of all tiles and, for nv, the scale of the tensor, else None."""
    if scaling.kind == "none":
        return jnp.ones((1,) * x.ndim, jnp.float32), None
    amax = amax_of(x, tile)
    if scaling.kind == "nv":
        return two_level(amax, format, largest(amax, tuple(range(amax.ndim))))
    return to_scale(amax, format, scale_rounding, scaling.least), None


def scaled_values(
    x: Array, scales: Array, format: Format, tile: Shape, rounding: str, key: Key | None
) -> Array:
    """Returns x / scales rounded to the format, float32; saturates, and NaN stays NaN."""
    bits = random_bits(key, x.shape, rounding)
    return _round(scale_down(x, scales, tile), bits, format, rounding, True)


@explains_calls
def quantize(
    x: Float[Array, "*shape"],
    format: FormatLike,
    scaling: str | Scaling = "tensor",
    *,
    axis: int | tuple[int, ...] = -1,
    rounding: str = "nearest",
    key: Key | None = None,
    scale_rounding: str | None = None,
    offset: bool = False,
) -> Quantized:
    r"""Quantises an array: values $q = \mathrm{round}(x / s)$ and scales $s \approx amax / max$.

    With an offset, $q = \mathrm{round}((x - m) / s)$, and s and m take the smallest and the largest
    number of a group to the format's: no pattern is spent on a sign that does not occur, and zero
    is no longer exact.

    The last block of an axis may be shorter. A group of zeros has scale 1 (with nv its block has
    e4m3's smallest); a group that holds inf or NaN becomes NaN, and with nv the whole array.
    Without scaling, inf saturates and NaN stays alone, or where the format has no NaN makes the
    whole array NaN. No gradient passes; see `fake_quantize`.

    Args:
      x: float32, bfloat16 or float16.
      format: of the values: a Format, its name or a dtype.
      scaling: who shares a scale: `none`, `tensor`, `row`, `block(1x128)`, `block(128x128)`,
        `mx(32)` (e8m0 scales), `nv(16)` (e4m3 scales and one of float32).
      axis: the axis, or a tuple of axes, over which a product will sum; rows and blocks lie along
        it.
      rounding: of the values: `nearest`, `stochastic`, `floor`.
      key: random key, for stochastic rounding.
      scale_rounding: `none`, or to a power of two, `up` (nothing overflows) or `down` (OCP's
        rule); by default `up` for mx, else `none`.
      offset: whether each group has an offset beside its scale (asymmetric quantisation); for
        `int8 int4 int2` with `tensor`, `row` or `block` scaling.

    Returns:
      Values in the format's dtype (or the narrowest that holds it) and float32 scales, which
      `dequantize()` multiplies.

    Raises:
      ConfigError: names that are unknown or do not fit each other, no key, or an array that has
        no such axis or no elements.

    Example:
      >>> q = quantize(jnp.array([[1.0, 2.0, 896.0]]), "e4m3")
      >>> q.values.dtype.name, q.scales.item(), q.dequantize().tolist()
      ('float8_e4m3fn', 2.0, [[1.0, 2.0, 896.0]])

    References:
      Open Compute Project, Microscaling Formats (MX) 1.0, section 6.3.
    """
    format, scaling = Format.of(format), Scaling.parse(scaling)
    x = jax.lax.stop_gradient(as_array(x, "quantize: x"))
    if x.dtype not in ROUNDED:
        raise ConfigError(
            f"quantize: x is {x.dtype.name}; float32, bfloat16 and float16 can be quantised"
        )
    scale_rounding = scaling.default_rounding if scale_rounding is None else scale_rounding
    check_scaling(format, scaling, scale_rounding, "quantize")
    check_rounding(rounding, key, "quantize")
    key = key if rounding == "stochastic" else None
    if x.size == 0:
        raise ConfigError(f"quantize: x of shape {x.shape} has no elements; leave it out")
    tile = x.shape
    if scaling.kind not in ("none", "tensor"):
        chosen = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
        axes = tuple(_axis(a, x.ndim) for a in chosen)
        if len(set(axes)) < len(axes):
            raise ConfigError(f"quantize: axis={axis} names an axis twice; name it once")
        tile = scaling.tiles(x.shape, axes)
    if offset:
        check_offset(format, scaling, scale_rounding)
        return _with_offset(x, format, scaling, tile, rounding, key)
    return _scaled(x, format, scaling, tile, rounding, key, scale_rounding)


# One program in an eager call of `quantize`, part of the caller's jaxpr under a trace.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 6), inline=True)
def _scaled(
    x: Array, format: Format, scaling: Scaling, tile: Shape, rounding: str, key: Key | None,
    scale_rounding: str,
) -> Quantized:  # fmt: skip
    scales, whole = find_scales(x, format, scaling, tile, scale_rounding)
    both = scales if whole is None else scales * whole
    values = scaled_values(x, both, format, tile, rounding, key)
    holder = format.dtype
    if holder is None or holder.itemsize > 4:  # float64 takes what float32 holds
        holder = x.dtype if scaling.kind == "none" else jnp.dtype(jnp.float32)
    elif scaling.kind == "none" and format.specials == "none":
        scales = jnp.where(jnp.any(jnp.isnan(x)), jnp.float32(jnp.nan), scales)
    return Quantized(
        values.astype(holder), scales, whole, format, tile, x.dtype, scaling.scale_bits
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _with_offset(
    x: Array, format: Format, scaling: Scaling, tile: Shape, rounding: str, key: Key | None
) -> Quantized:
    wide = x.astype(jnp.float32)
    parts = split(wide, tile, "edge")  # a zero of the padding might widen the range
    axes = tuple(range(1, parts.ndim, 2))
    scales, offsets = to_range(jnp.min(parts, axes), jnp.max(parts, axes), format)
    # a group that holds inf or NaN becomes NaN
    scales = jnp.where(jnp.isfinite(amax_of(x, tile)), scales, jnp.float32(jnp.nan))
    over = per_tile(wide, offsets, tile, lambda x, m: x - m)
    values = scaled_values(over, scales, format, tile, rounding, key)
    return Quantized(
        values.astype(format.dtype), scales, None, format, tile, x.dtype, scaling.scale_bits,
        offsets,
    )  # fmt: skip


def _axis(axis: object, ndim: int) -> int:
    if not isinstance(axis, int | np.integer) or not -ndim <= axis < ndim:
        cure = f"give one of {-ndim} .. {ndim - 1}" if ndim else "take scaling=tensor"
        raise ConfigError(f"quantize: axis {brief(axis)} of an array of {ndim} axes; {cure}")
    return int(axis) % ndim


@explains_calls
def fake_quantize(
    x: Float[Array, "*shape"],
    format: FormatLike,
    scaling: str | Scaling = "tensor",
    *,
    axis: int | tuple[int, ...] = -1,
    rounding: str = "nearest",
    key: Key | None = None,
    scale_rounding: str | None = None,
    offset: bool = False,
) -> Float[Array, "*shape"]:
    """Returns `quantize(...).dequantize()`, straight-through: gradients pass unchanged.

    Args:
      x: see `quantize`, as all the rest.
      format: of the values.
      scaling: who shares a scale.
      axis: over which a product will sum.
      rounding: of the values.
      key: random key, for stochastic rounding.
      scale_rounding: of the scales.
      offset: whether each group has an offset.

    Raises:
      ConfigError: as `quantize`.

    Example:
      >>> jax.grad(lambda x: fake_quantize(x, "e2m1").sum())(jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    x = as_array(x, "fake_quantize: x")
    q = quantize(
        x, format, scaling, axis=axis, rounding=rounding, key=key, scale_rounding=scale_rounding,
        offset=offset,
    )  # fmt: skip
    return _straight(x, q.dequantize())


@jax.custom_jvp
def _straight(x: Array, rounded: Array) -> Array:
    """Returns the rounded numbers, whose derivative is that of x."""
    return rounded


_straight.defjvp(lambda primals, tangents: (_straight(*primals), tangents[0]))
