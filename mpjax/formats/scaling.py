"""Scaling: which numbers share a scale, and how the scale is chosen.

A number x is stored as the format's nearest to x / s and read back as that times s, so s is about
amax / max: the largest magnitude of the group goes to the format's largest number.
"""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.errors import ConfigError, brief
from mpjax.formats.format_table import Format
from mpjax.formats.pattern import as_int, as_uint, bits_of, left, number_of, right, select
from mpjax.formats.rounding import round_to
from mpjax.typing import Array, Shape

SCALE_ROUNDINGS = ("none", "down", "up")
_BLOCK = re.compile(r"(block|mx|nv)\((?:([1-9][0-9]*)x)?([1-9][0-9]*)\)")
_TINY = 2.0**-126  # smallest normal float32: jitted arithmetic flushes what is below
_SMALLEST = np.uint32(0x00400000)  # the float32 pattern of 2^-127, e8m0's smallest number


def _is_zero(amax: Array) -> Array:
    """Whether a magnitude is 0; on bits, since compiled comparisons flush subnormals to it."""
    return lax.eq(bits_of(amax), np.int32(0))


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Which numbers share a scale.

    Args:
      kind: `none`, `tensor`, `row`, `block`, `mx` or `nv`.
      rows: numbers of a block along the other axis (`block`, `mx`, `nv`).
      columns: numbers of a block along the contracted axis.

    Example:
      >>> str(Scaling.parse("block(1x128)")), str(Scaling.parse("nv(16)"))
      ('block(1x128)', 'nv(16)')
    """

    kind: str
    rows: int = 1
    columns: int = 0

    def __post_init__(self) -> None:
        blocks = self.kind in ("block", "mx", "nv")
        sizes = (self.rows, self.columns)
        whole = all(type(n) is int and n > 0 for n in sizes) if blocks else sizes == (1, 0)
        if self.kind not in ("none", "tensor", "row", "block", "mx", "nv") or not whole:
            raise ConfigError(
                f"scaling: kind={brief(self.kind)}, rows={brief(self.rows)},"
                f" columns={brief(self.columns)}; write Scaling('tensor'), Scaling('row') or, with"
                " the size of a block, Scaling('block', 1, 128)"
            )

    @classmethod
    def parse(cls, text: str | Scaling) -> Scaling:
        """Reads `none`, `tensor`, `row`, `block(RxC)`, `mx(N)`, `nv(N)` or `nv(RxN)`.

        Raises:
          ConfigError: anything else.
        """
        if isinstance(text, Scaling):
            return text
        if isinstance(text, str) and text in ("none", "tensor", "row"):
            return cls(text)
        match = _BLOCK.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[1] == "block" and match[2] is None):
            raise ConfigError(
                f"scaling: unknown {brief(text)}; write none, tensor, row, block(1x128),"
                " block(128x128), mx(32), nv(16) or nv(16x16)"
            )
        return cls(match[1], int(match[2] or 1), int(match[3]))

    def __str__(self) -> str:
        if not self.columns:
            return self.kind
        if self.kind != "block" and self.rows == 1:
            return f"{self.kind}({self.columns})"
        return f"{self.kind}({self.rows}x{self.columns})"

    @property
    def blocks(self) -> bool:
        """Whether the scale changes along the contracted axis."""
        return self.columns > 0

    @property
    def scale_bits(self) -> int:
        """Bits of a scale, which is float32, e8m0 (mx) or e4m3 (nv); 0 without scales."""
        return {"none": 0, "mx": 8, "nv": 8}.get(self.kind, 32)

    @property
    def least(self) -> float:
        """Smallest scale, of mx that of e8m0, else the smallest normal float32."""
        return 2.0**-127 if self.kind == "mx" else _TINY

    @property
    def default_rounding(self) -> str:
        """How its scales are rounded by default, `up` to a power of two for mx."""
        return "up" if self.kind == "mx" else "none"

    def tiles(self, shape: Shape, axes: tuple[int, ...]) -> Shape:
        """Returns the size of a group along each axis of an array.

        Args:
          shape: of the array.
          axes: the contracted axes; blocks lie along the last of them, their rows along the last
            axis that is not contracted.
        """
        if self.kind in ("none", "tensor"):
            return shape
        if self.kind == "row":
            return tuple(n if d in axes else 1 for d, n in enumerate(shape))
        if not axes:  # nothing is summed over: each number is a group
            return (1,) * len(shape)
        other = max((d for d in range(len(shape)) if d not in axes), default=-1)
        sizes = {other: self.rows, axes[-1]: self.columns}
        return tuple(min(sizes.get(d, 1), n) for d, n in enumerate(shape))


def check_scaling(format: Format, scaling: Scaling, scale_rounding: str, where: str = "") -> None:
    """Checks that a format, a scaling and the rounding of its scales fit each other.

    Raises:
      ConfigError: they do not.
    """
    where = where and f"{where}: "
    if scale_rounding not in SCALE_ROUNDINGS:
        raise ConfigError(
            f"{where}scale_rounding: unknown {brief(scale_rounding)}; known:"
            f" {' '.join(SCALE_ROUNDINGS)}"
        )
    if format.kind == "power":
        raise ConfigError(
            f"{where}format e8m0 holds scales, not values; take e4m3, e2m1 or another"
        )
    if format.kind == "fixed" and not format.is_integer and scaling.kind != "none":
        raise ConfigError(
            f"{where}fixed point {format.name} has its point where it is and takes no scale, got"
            f" scaling={scaling}; set scaling=none, or take int8 for scaled integers"
        )
    if scaling.kind == "nv" and format.is_integer:
        raise ConfigError(
            f"{where}{scaling} has e4m3 scales, which integer format {format.name} does not take;"
            " use row or block scaling, whose scales are float32"
        )
    if scaling.kind == "mx" and scale_rounding == "none":
        raise ConfigError(
            f"{where}{scaling} has e8m0 scales, powers of two; set scale_rounding to up or down,"
            " or use block(1x32) for float32 scales"
        )
    if scaling.kind == "none" and scale_rounding != "none":
        raise ConfigError(
            f"{where}scale_rounding={scale_rounding!r}: scaling=none has no scale to round; leave"
            " it out, or set scaling=tensor"
        )
    if scaling.kind == "nv" and scale_rounding != "none":
        raise ConfigError(f"{where}{scaling} rounds its scales to e4m3; leave scale_rounding out")


def check_offset(format: Format, scaling: Scaling, scale_rounding: str) -> None:
    """Checks that a format and a scaling take an offset.

    Raises:
      ConfigError: they do not.
    """
    if not format.is_integer or scaling.kind not in ("tensor", "row", "block"):
        raise ConfigError(
            f"{format.name} with scaling={scaling} takes no offset; take int8, int4 or"
            " int2 with tensor, row or block scaling, or leave the offset out"
        )
    if scale_rounding != "none":
        raise ConfigError(
            f"scale_rounding={scale_rounding!r} beside an offset, which is not rounded;"
            " leave it out"
        )


def _limit(format: Format) -> np.float32:
    """What a group's largest magnitude is scaled to: the format's largest number, at most 2^125.

    The reciprocal of a larger one is a subnormal float32, which compiled arithmetic flushes.
    """
    return np.float32(min(format.max, 2.0**125))


def _quotient(x: Array, by: np.float32) -> Array:
    """Returns x times the rounded 1 / by; XLA sometimes rewrites a division by a constant so."""
    return lax.mul(x, np.float32(1) / by)


def _power_of_two(amax: Array, limit: np.float32, up: bool, least: float) -> Array:
    """Returns powers of two for finite amax: 2^ceil(log2(amax / limit)), or floors of both logs.

    On bits: where the exact quotient is a power of two, the rounded one may differ from it.
    """
    u = lax.bitcast_convert_type(amax, jnp.uint32)
    # numbers up to 2^-127 take the smallest scale, as zero does below
    u = select(lax.le(u, _SMALLEST), np.uint32(0), u)
    largest = int(limit.view(np.uint32))
    if up:  # carries into the exponent where amax has the larger mantissa
        u = lax.add(u, np.uint32(0x7FFFFF - (largest & 0x7FFFFF)))
    exponent = lax.sub(as_int(right(u, np.uint32(23))), np.int32((largest >> 23) - 127))
    lowest = np.int32(least >= _TINY)
    field = as_uint(lax.clamp(lowest, exponent, np.int32(254)))  # of 2^(field - 127)
    return number_of(select(lax.eq(field, np.uint32(0)), _SMALLEST, left(field, np.uint32(23))))


def to_scale(amax: Array, format: Format, scale_rounding: str, least: float = _TINY) -> Array:
    """Returns the scale of groups from their largest magnitudes, float32.

    1 where amax is 0, so that nothing is divided by zero; NaN where amax is not finite, so that
    every number of the group becomes NaN and the step is skipped.

    Args:
      amax: largest magnitudes, float32.
      format: of the values.
      scale_rounding: `none`; `up` to a power of two, so that nothing overflows; `down`, the OCP
        rule $2^{\\lfloor \\log_2 amax \\rfloor - e_{max}}$, under which the largest may saturate.
      least: smallest scale, 2^-126 or, of powers of two, 2^-127.
    """
    limit = _limit(format)
    if scale_rounding == "none":
        scale = lax.max(_quotient(amax, limit), np.float32(_TINY))
    else:
        scale = _power_of_two(amax, limit, scale_rounding == "up", least)
    scale = select(_is_zero(amax), np.float32(1), scale)
    return select(lax.is_finite(amax), scale, np.float32(np.nan))


def to_range(low: Array, high: Array, format: Format) -> tuple[Array, Array]:
    r"""Returns scale and offset of groups of numbers in [low, high], float32: x = s v + m.

    $$s = (high - low) / (max - min),\qquad m = low - min\,s$$

    A group of equal numbers has s = 1 and v = 0, so that it is exact.

    Args:
      low: smallest numbers, finite.
      high: largest numbers, finite.
      format: of the values.
    """
    steps = np.float32(format.max - format.min)
    scale = jnp.maximum(_quotient(high, steps) - _quotient(low, steps), jnp.float32(_TINY))
    same = high == low
    scale = jnp.where(same, jnp.float32(1), scale)
    return scale, jnp.where(same, low, low - np.float32(format.min) * scale)


def two_level(amax: Array, format: Format, tensor_amax: Array) -> tuple[Array, Array]:
    """Returns NVFP4's block scales, numbers of e4m3, and the tensor's float32 scale.

    $$s = amax / (448\\,max),\\qquad s_b = e4m3(amax_b / (max\\,s))$$

    A block of zeros has e4m3's smallest number; s is at least 2^-117, so that s s_b is normal.

    References:
      NVIDIA 2025, Pretraining Large Language Models with NVFP4, appendix B.
    """
    e4m3 = Format("e4m3")
    least = jnp.float32(_TINY / e4m3.min_subnormal)
    whole = jnp.maximum(_quotient(to_scale(tensor_amax, format, "none"), _limit(e4m3)), least)
    whole = jnp.where(_is_zero(tensor_amax), jnp.float32(1), whole)
    block = round_to(_quotient(amax, _limit(format)) * (1 / whole), e4m3)
    # a block whose scale rounds to zero would be 0 / 0
    return jnp.maximum(block, jnp.float32(e4m3.min_subnormal)), whole
