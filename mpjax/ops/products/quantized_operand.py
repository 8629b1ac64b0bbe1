"""Matrix products whose operands are quantised by a Recipe, forward and backward.

The values of each operand lie on its format's grid, so a hardware unit and an emulation in a wider
dtype multiply the same numbers; they differ only in the order of their sums.

Qwix quantises whole models by interception and has more inference schemes. It is not used here,
because the rounding, the key and the amax of each of the three products must be reported and
tested, and because it silently leaves an operand unquantised that it cannot quantise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.errors import ConfigError, brief
from mpjax.formats import Format, Scaling, round_to
from mpjax.formats.pattern import select
from mpjax.formats.quantize import find_scales, scaled_values
from mpjax.formats.scaling import to_scale
from mpjax.formats.tiles import amax_of, scale_up
from mpjax.ops.checks import Axes, Dims
from mpjax.ops.products.dot import dot, free_axes
from mpjax.precision import Operand, Recipe, get_recipe
from mpjax.typing import Array, DTypeLike, Key, Shape

_FLOAT8 = ("e4m3", "e5m2")
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_LARGEST = float(jnp.finfo(jnp.float32).max)
_INT32_TERMS = (2**31 - 1) // 128**2  # products of two int8 that an int32 can sum

_Product = Callable[[Array, Array], Array]
Transposed = tuple[Dims, Axes]  # a product and the permutation of its result


class QuantizedOperand(NamedTuple):
    """An operand as it enters a product.

    Args:
      values: numbers of the format in float32, or the operand in its compute dtype.
      scales: what the values are to be multiplied by, or None.
      tile: of the scales.
      format: of the values, or None.
      blocks: whether the scales change along the axes that are summed over.
      short: whether bfloat16 holds the values exactly; of blocks, the values times their scales.
      top: the largest magnitude of a scaled value; 0 without scales.
    """

    values: Array
    scales: Array | None
    tile: Shape
    format: Format | None
    blocks: bool
    short: bool
    top: float


def quantize_operand(
    x: Array, operand: Operand | None, axes: Axes, key: Key | None, compute: DTypeLike,
    amax: Array | None = None, scale: Array | None = None,
) -> QuantizedOperand:  # fmt: skip
    """Quantises an operand along the axes that its product sums over.

    Args:
      amax: of delayed scaling, margin included; where it is 0 the tensor's own is used.
      scale: of the whole tensor, where it is known.
    """
    if operand is None:
        return QuantizedOperand(x.astype(compute), None, x.shape, None, False, False, 0.0)
    format, scaling = Format(operand.format), Scaling.parse(operand.scaling)
    tile = scaling.tiles(x.shape, axes)
    if scale is None:
        scales = operand_scales(x, operand, tile, amax)
    else:
        scales = scale.reshape((1,) * x.ndim)
    values = scaled_values(x, scales, format, tile, operand.rounding, key)
    short, top = is_short(operand), 0.0 if scaling.kind == "none" else format.max
    return QuantizedOperand(values, scales, tile, format, scaling.blocks, short, top)


def operand_scales(x: Array, operand: Operand, tile: Shape, amax: Array | None = None) -> Array:
    """Returns the scales of an operand, one for each tile.

    Args:
      x: the operand.
      operand: how it is quantised.
      tile: that shares a scale.
      amax: of delayed scaling, margin included; where it is 0 the tensor's own is used.
    """
    format, scaling = Format(operand.format), Scaling.parse(operand.scaling)
    if amax is None and scaling.kind != "none":
        scales, whole = find_scales(x, format, scaling, tile, operand.scales_rounded)
        return scales if whole is None else scales * whole
    current = amax_of(x, tile)
    if amax is None:
        scales, _ = find_scales(x, format, scaling, tile, operand.scales_rounded)
    else:
        scales = to_scale(jnp.where(amax > 0, amax, current), format, operand.scales_rounded)
    # they do not come from x: inf would saturate unnoticed
    return select(lax.is_finite(current), scales, np.float32(np.nan))


def is_short(operand: Operand | None) -> bool:
    """Returns whether bfloat16 holds the numbers of an operand exactly."""
    if operand is None:
        return False
    format, scaling = Format(operand.format), Scaling.parse(operand.scaling)
    if scaling.blocks and operand.scales_rounded == "none":
        return False  # the product multiplies values times scales, which have 24 bits
    if format.kind == "fixed":
        return format.bits <= 8
    return format.mantissa_bits <= 7 and format.exponent_bits <= 8


def native_unit(left: Format | None, right: Format | None, blocks: bool, terms: int) -> str:
    """Returns the hardware unit that can multiply two formats: `int8`, `float8` or "" for none.

    Args:
      left: format of the left operand, None where it is not quantised.
      right: of the right one.
      blocks: whether a scale changes along the axes that are summed over.
      terms: how many products are summed.
    """
    if left is None or right is None or blocks:
        return ""
    if all(f.is_integer and f.bits <= 8 for f in (left, right)) and terms <= _INT32_TERMS:
        return "int8"
    return "float8" if left.name in _FLOAT8 and right.name in _FLOAT8 else ""


def _dot(a: Array, b: Array, dims: Dims, parts: int) -> Array:
    """A product, float32; of several parts that of each part of the terms, along a first axis."""
    if parts == 1:
        return dot(a, b, dims)
    (ca, cb), (ba, bb) = dims

    def lay_out(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def behind(axes: Axes) -> Axes:
        return tuple(axis + 1 for axis in axes)

    each = (behind(ca), behind(cb)), ((0, *behind(ba)), (0, *behind(bb)))
    return dot(lay_out(a, ca[0]), lay_out(b, cb[0]), each)


def _multiply(a: QuantizedOperand, b: QuantizedOperand, dims: Dims, parts: int) -> Array:
    """The product of the values of two operands, float32."""
    terms = math.prod(a.values.shape[axis] for axis in dims[0][0])
    unit = native_unit(a.format, b.format, False, terms)
    if unit == "int8":
        return _dot(a.values.astype(jnp.int8), b.values.astype(jnp.int8), dims, parts)

    def multiply_as(left: DTypeLike | None, right: DTypeLike | None) -> _Product:
        return lambda x, y: _dot(x.astype(left), y.astype(right), dims, parts)

    wide = jnp.bfloat16 if a.short and b.short else jnp.float32  # it holds all values exactly
    emulated = multiply_as(wide, wide)
    if unit != "float8" or a.format is None or b.format is None:
        return emulated(a.values, b.values)
    native = multiply_as(a.format.dtype, b.format.dtype)
    return lax.platform_dependent(a.values, b.values, cuda=native, default=emulated)


def _spread(scales: Array, batch: Axes, free: Axes, summed: Axes, before: int, after: int) -> Array:
    """Scales of an operand, laid out as the product: batch, left free, right free axes."""
    moved = jnp.transpose(scales, (*batch, *free, *summed))
    groups, rows = ([scales.shape[d] for d in axes] for axes in (batch, free))
    return moved.reshape(*groups, *(1,) * before, *rows, *(1,) * after)


def opened(f: QuantizedOperand) -> Array:
    """The numbers of an operand with their scales applied."""
    return f.values if f.scales is None else scale_up(f.values, f.scales, f.tile)


def _chunked(a: Array, b: Array, dims: Dims, accumulate: Format, chunk: int) -> Array:
    """A product whose running sum is rounded to a format after each chunk of summands."""
    (ca, cb), (ba, bb) = dims
    fa, fb = free_axes(a.ndim, ca, ba), free_axes(b.ndim, cb, bb)
    shape = [a.shape[d] for d in (*ba, *fa)] + [b.shape[d] for d in fb]
    groups, terms = math.prod(a.shape[d] for d in ba), math.prod(a.shape[d] for d in ca)
    pad = (0, -terms % chunk)

    def lay_out(x: Array, *axes: Axes) -> Array:
        flat = jnp.transpose(x, sum(axes, ())).reshape(groups, -1, terms)
        parts = jnp.pad(flat, ((0, 0), (0, 0), pad)).reshape(groups, flat.shape[1], -1, chunk)
        return jnp.moveaxis(parts, 2, 0).astype(jnp.float32)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        dims = (((2,), (2,)), ((0,), (0,)))
        left, right = part
        return round_to(total + dot(left, right, dims), accumulate, saturate=False), None

    left, right = lay_out(a, ba, fa, ca), lay_out(b, bb, fb, cb)
    zero = jnp.zeros((groups, left.shape[2], right.shape[2]), jnp.float32)
    return lax.scan(add, zero, (left, right))[0].reshape(shape)


def combine(
    a: QuantizedOperand, b: QuantizedOperand, dims: Dims, recipe: Recipe, parts: int = 1
) -> Array:
    """Returns the product of two operands, float32, in `lax.dot_general`'s layout.

    Args:
      a: the left operand.
      b: the right operand.
      dims: dimension numbers.
      recipe: how sums are accumulated.
      parts: of the terms, which lie along one axis, each of equal size; with several the result
        has a first axis, the sums of each part. Only of sums in float32.
    """
    if recipe.accumulate != "float32":
        return _chunked(opened(a), opened(b), dims, Format(recipe.accumulate), recipe.chunk)
    if a.format is None and b.format is None:
        return _dot(a.values, b.values, dims, parts)
    if a.blocks or b.blocks or a.format is None or b.format is None:
        wide = jnp.bfloat16 if a.short and b.short else jnp.float32
        return _dot(opened(a).astype(wide), opened(b).astype(wide), dims, parts)
    (ca, cb), (ba, bb) = dims
    terms = math.prod(a.values.shape[axis] for axis in ca)
    if a.top * b.top * terms > _LARGEST:  # bfloat16 and wider: a sum of values would overflow
        return _dot(opened(a).astype(jnp.float32), opened(b).astype(jnp.float32), dims, parts)
    fa, fb = free_axes(a.values.ndim, ca, ba), free_axes(b.values.ndim, cb, bb)
    y = _multiply(a, b, dims, parts)
    each = (None,) * (parts > 1)
    # one after the other, since the product of two small scales may underflow
    if a.scales is not None:
        y = y * _spread(a.scales, ba, fa, ca, 0, len(fb))[each]
    if b.scales is not None:
        y = y * _spread(b.scales, bb, fb, cb, len(fa), 0)[each]
    return y


def backward_dims(dims: Dims, a_ndim: int, b_ndim: int) -> tuple[Transposed, Transposed]:
    """Returns (dims, permutation) of dgrad, dy by b, and of wgrad, a by dy."""
    (ca, cb), (ba, bb) = dims
    fa, fb = free_axes(a_ndim, ca, ba), free_axes(b_ndim, cb, bb)
    n = len(ba)
    dy = tuple(range(n + len(fa) + len(fb)))
    batch, dy_a, dy_b = dy[:n], dy[n : n + len(fa)], dy[n + len(fa) :]
    to_a = (*ba, *fa, *(ca[cb.index(c)] for c in sorted(cb)))
    to_b = (*bb, *(cb[ca.index(c)] for c in sorted(ca)), *fb)
    dgrad = (((dy_b, fb), (batch, bb)), tuple(map(to_a.index, range(a_ndim))))
    wgrad = (((fa, dy_a), (ba, batch)), tuple(map(to_b.index, range(b_ndim))))
    return dgrad, wgrad


def how_it_runs(recipe: str | Recipe, platform: str, terms: int = 1) -> dict[str, str]:
    """Returns how each product of a recipe is computed on a platform.

    Args:
      recipe: a Recipe or its name.
      platform: `cpu`, `cuda`, `rocm` or `tpu`.
      terms: how many products are summed.

    Raises:
      ConfigError: unknown recipe or platform.

    Example:
      >>> how_it_runs("fp8", "cuda")["dgrad"]
      'native float8 product'
    """
    recipe, found = get_recipe(recipe), {}
    if platform not in _PLATFORMS:
        raise ConfigError(f"platform: {brief(platform)} is none; known: {' '.join(_PLATFORMS)}")
    plain = recipe.accumulate == "float32"
    for name in ("fprop", "dgrad", "wgrad"):
        left, right = getattr(recipe, name)
        formats = [None if o is None else Format(o.format) for o in (left, right)]
        blocks = any(o is not None and Scaling.parse(o.scaling).blocks for o in (left, right))
        unit = native_unit(formats[0], formats[1], blocks, terms) if plain else ""
        if left is None and right is None:
            found[name] = "not quantised: compute dtype"
        elif unit == "int8" or (unit == "float8" and platform == "cuda"):
            found[name] = f"native {unit} product"
        else:
            wide = "bfloat16" if plain and is_short(left) and is_short(right) else "float32"
            found[name] = f"emulated: {wide} product of exact values"
    return found


def need_key(recipe: Recipe, key: Array | None, backward: bool, where: str) -> None:
    """Checks that a recipe that draws random numbers has a key.

    Raises:
      ConfigError: it has none.
    """
    uses = recipe.backward_uses_key if backward else recipe.forward_uses_key
    if uses and key is None:
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} draws random numbers (stochastic rounding or"
            " Hadamard signs) and has no key; pass key=jax.random.key(...), folded with the step"
        )
