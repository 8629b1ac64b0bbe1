"""Arrays stored as 8- or 4-bit codes, one float32 absmax for each block of numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError
from mpjax.formats import Format, round_to
from mpjax.formats.checks import as_array
from mpjax.formats.tiles import amax_of, per_tile
from mpjax.precision.moments import MomentFormat
from mpjax.typing import Array, ArrayLike, Key, Shape

_BITS = {"int8": 8, "int4": 4, "int8-linear": 8}

Runs: TypeAlias = list[tuple[float, float, int]]  # first number, step, how many


def tree_runs(bits: int, signed: bool) -> Runs:
    r"""Returns the positive numbers of the dynamic tree data type as runs of equal steps.

    After the sign, $e$ zeros, an indicator bit and $F - e$ bits of a fraction $k$ mean the centre
    of the $k$-th of $2^{F-e}$ equal parts of $[0.1, 1]$, times $10^{-e}$. Without a sign each
    fraction has one bit more, and the range stays. The last pattern means 1.

    Args:
      bits: of a code.
      signed: whether one of them is the sign.

    References:
      Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 1.3 and
      appendix F.
    """
    runs = []
    for e in reversed(range(bits - 1)):
        count = 2 ** (bits - 1 - signed - e)
        step = 10.0**-e * 0.9 / count
        runs.append((10.0**-e * 0.1 + step / 2, step, count))
    return [*runs, (1.0, 1.0, 1)]


def _runs(name: str, signed: bool) -> tuple[Runs, int]:
    """The positive numbers of a book and the place of the first: 1, or 0 if there is no zero."""
    if name == "int8-linear":
        count = 127 if signed else 255
        return [(1 / count, 1 / count, count)], 1
    if name == "int4" and not signed:
        # Without zero: a second moment of zero would divide the first by epsilon alone.
        return [(1 / 16, 1 / 16, 16)], 0
    return tree_runs(_BITS[name], signed), 1


@functools.cache
def code_book(name: str, signed: bool) -> np.ndarray:
    """Returns the number in [-1, 1] that each code means, float32.

    A code counts the numbers from zero up, and down from zero modulo 2^bits, as two's complement
    does; the highest positive number takes the place of the lowest negative one (-1 has no code
    in a tree).

    Args:
      name: `int8`, `int4` or `int8-linear`.
      signed: which of its two books.

    Example:
      >>> code_book("int4", True)[:9].astype(float).round(4).tolist()
      [0.0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
    """
    runs, place = _runs(name, signed)
    book = np.zeros(2 ** _BITS[name])
    for first, step, count in runs:
        book[place : place + count] = first + step * np.arange(count)
        place += count
    if signed:
        book[len(book) // 2 + 1 :] = -book[1 : len(book) // 2][::-1]
    return book.astype(np.float32)


def encode(x: Array, name: str, signed: bool, key: Key | None = None) -> Array:
    r"""Returns the codes of numbers of a book near x, uint8.

    Without a key the nearest number is taken, ties towards zero. With one, $x$ between the
    neighbours $a < x < b$ becomes $b$ with probability $(x - a) / (b - a)$, so that its mean is
    $x$; in a book without signs $b$ alone is taken where $a$ is zero, because a running square
    of zero makes the next step arbitrarily large.

    The place in a run of equal steps is computed, which is faster than a search, so that numbers
    within a float32 rounding of a tie (with a key, of a number of the book) may go either way.

    Args:
      x: float32 in [-1, 1].
      name: `int8`, `int4` or `int8-linear`.
      signed: which of its two books.
      key: random key of stochastic rounding; None rounds to nearest.
    """
    size = 2 ** _BITS[name]
    book = code_book(name, signed)
    magnitude = jnp.abs(x) if signed else x
    runs, start = _runs(name, signed)
    place = jnp.zeros(x.shape, jnp.int32)
    share = None if key is None else _uniform(key, x.shape)
    for first, step, count in runs:
        steps = (magnitude - np.float32(first)) * np.float32(1 / step)
        steps = jnp.ceil(steps - 0.5) if share is None else jnp.floor(steps + share)
        inside = jnp.clip(steps, 0, count - 1).astype(jnp.int32) + start
        below = book[start - 1] if start else np.float32(-np.inf)
        if share is None or not start:
            above = magnitude > np.float32((below + book[start]) / 2)
        elif not signed and below == 0:
            above = magnitude > 0
        else:  # between the last number of a run and the first of the next
            gap = np.float32(book[start] - below)
            above = (magnitude >= book[start]) | (magnitude - below > (1 - share) * gap)
        place = jnp.where(above, inside, place)
        start += count
    if signed:
        place = jnp.where(x < 0, size - jnp.minimum(place, size // 2 - 1), place)
    return (place & (size - 1)).astype(jnp.uint8)


def _uniform(key: Key, shape: Shape) -> Array:
    """Multiples of 2^-24 in [0, 1)."""
    bits = jax.random.bits(key, shape, jnp.uint32)
    return (bits >> jnp.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)


def decode(codes: Array, name: str, signed: bool) -> Array:
    """Returns the numbers that codes mean, float32."""
    book = jnp.asarray(code_book(name, signed))
    return book.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def tile_of(shape: Shape, block: int) -> Shape:
    """Returns the block as a tile of the array: at most so many numbers, no axis flattened.

    It takes equal parts of the last axis, whole rows where they fit, and then of the axis before:
    codes keep the shape of the weight, and both codes and absmax can be cut over devices like it.

    Args:
      shape: of the array.
      block: largest number of elements; 0 is all of them.

    Example:
      >>> tile_of((512, 128), 256), tile_of((512, 384), 256), tile_of((3, 5, 7), 0)
      ((2, 128), (1, 192), (3, 5, 7))
    """
    room, tile = block or max(1, math.prod(shape)), []
    for size in reversed(shape):
        parts = -(-size // room)
        tile.append(-(-size // max(1, parts)) or 1)
        room = room // size if tile[-1] == size else 1
    return tuple(reversed(tile))


def _pack(codes: Array) -> Array:
    """Two 4-bit codes a byte, along the last axis."""
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _unpack(packed: Array, size: int) -> Array:
    pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :size]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "absmax"),
    meta_fields=("format", "signed", "shape"),
)
@dataclasses.dataclass(frozen=True)
class Blockwise:
    """A moment stored as codes; `dequantize()` is the code's number times its block's absmax.

    Args:
      codes: uint8 or float8, shape of the moment; 4-bit codes lie two a byte along the last axis.
      absmax: float32, one for each block.
      format: what the codes mean.
      signed: whether they can be negative.
      shape: of the moment.
    """

    codes: Array
    absmax: Array
    format: MomentFormat
    signed: bool
    shape: Shape

    def dequantize(self) -> Array:
        """Returns the moment, float32."""
        name, codes = self.format.name, self.codes
        shape = self.shape or (1,)
        if name in _BITS:
            codes = _unpack(codes, shape[-1]) if _BITS[name] == 4 else codes
            numbers = decode(codes, name, self.signed)
        else:
            numbers = codes.astype(jnp.float32) / Format(name).max
        tile = tile_of(shape, self.format.block or 0)
        return per_tile(numbers, self.absmax, tile, lambda n, a: n * a).reshape(self.shape)


def round_moment(x: Array, format: str, signed: bool, key: Key | None = None) -> Array:
    """Returns float32 numbers rounded to a format, in float32.

    Args:
      x: float32.
      format: `bfloat16 float16 e4m3 e5m2`.
      signed: False for a moment that is never negative; rounded stochastically, it stays above 0.
      key: random key of stochastic rounding; None rounds to nearest.
    """
    number, saturate = Format(format), format in ("e4m3", "e5m2")
    if key is None:
        return round_to(x, number, saturate=saturate)
    rounded = round_to(x, number, "stochastic", key, saturate=saturate)
    if signed:
        return rounded
    return jnp.where((x > 0) & (rounded == 0), np.float32(number.min_subnormal), rounded)


def quantize_blocks(
    x: ArrayLike, format: str | MomentFormat, signed: bool, key: Key | None = None
) -> Blockwise:
    r"""Returns a moment as codes, $x \approx b_{code} \max_{block} \lvert x \rvert$.

    Codes are those of the nearest numbers or, with a key, of one of the two neighbours, drawn so
    that the mean is x. A block of zeros has absmax 0 and stays zero. A block that holds inf or NaN
    becomes non-finite as a whole: its absmax is.

    Args:
      x: float32.
      format: with a block, such as `int8@256`.
      signed: False for a moment that is never negative; rounded stochastically, what is above 0
        stays above 0.
      key: random key of stochastic rounding; None rounds to nearest. With a key absmax may be
        larger than it says, so that its code exists.

    Raises:
      ConfigError: a format without blocks, or no array.

    Example:
      >>> q = quantize_blocks(jnp.array([0.0, 3.0, -1.5]), "int8", signed=True)
      >>> q.codes.dtype.name, q.absmax.tolist(), q.dequantize().round(2).tolist()
      ('uint8', [3.0], [0.0, 3.0, -1.5])
    """
    x, format = as_array(x, "quantize_blocks: x"), MomentFormat.parse(format, second=not signed)
    if format.block is None:
        raise ConfigError(f"quantize_blocks: {format} has no blocks; write int8@256")
    wide = x.astype(jnp.float32).reshape(x.shape or (1,))
    tile = tile_of(wide.shape, format.block or 0)
    absmax = amax_of(wide, tile)
    if key is not None and signed and format.name in _BITS:
        # A tree has no code for -1: a largest number below zero must not shrink at each step.
        lowest = -code_book(format.name, signed).min()
        absmax = amax_of(jnp.where(wide < 0, wide / lowest, wide), tile)
    # A division, because 1 / absmax overflows where absmax is subnormal.
    unit = per_tile(wide, jnp.where(absmax > 0, absmax, 1.0), tile, lambda n, a: n / a)
    if format.name in _BITS:
        codes = encode(unit, format.name, signed, key)
        codes = _pack(codes) if _BITS[format.name] == 4 else codes
    else:
        number = Format(format.name)
        codes = round_moment(unit * number.max, format.name, signed, key).astype(number.dtype)
    return Blockwise(codes, absmax, format, signed, x.shape)


def stored(
    x: Array, format: MomentFormat, signed: bool, key: Key | None = None
) -> Array | Blockwise:
    """Returns a float32 moment in its format, rounded to nearest without a key."""
    if format.block is not None:
        return quantize_blocks(x, format, signed, key)
    if key is None or jnp.dtype(format.dtype).itemsize > 2:
        return x.astype(format.dtype)
    return round_moment(x, format.name, signed, key).astype(format.dtype)  # exact
