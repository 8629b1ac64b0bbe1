"""Number formats from their definition in float64 numpy: slow, with no bits and no JAX in them."""

from __future__ import annotations

import dataclasses
import fractions
import math
from typing import Any

import ml_dtypes
import numpy as np

# Our name -> the dtype of ml_dtypes or numpy that holds exactly this format.
DTYPES: dict[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
# ml_dtypes maps NaN to a number there (-0); ours stays NaN, so that no NaN is lost in emulation.
NO_NAN = ("e3m2", "e2m3", "e2m1")
SMALL = [name for name in DTYPES if name not in ("bfloat16", "float16")]  # at most 8 bits


def _finfo(dtype: Any) -> Any:
    return (ml_dtypes if dtype == ml_dtypes.bfloat16 else np).finfo(dtype)


def cast(x: np.ndarray, name: str) -> np.ndarray:
    """x cast to the dtype of a format and back to its own, by ml_dtypes or numpy."""
    with np.errstate(all="ignore"):
        return x.astype(DTYPES[name]).astype(np.float32).astype(x.dtype)


def same(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Where two arrays of one dtype hold the same bits, or both a NaN."""
    assert ours.dtype == theirs.dtype
    whole = {2: np.uint16, 4: np.uint32}[ours.dtype.itemsize]
    nan = np.isnan(ours.astype(np.float32)) & np.isnan(theirs.astype(np.float32))
    return (ours.view(whole) == theirs.view(whole)) | nan


@dataclasses.dataclass(frozen=True)
class Grid:
    """The numbers k 2^q of a format: q from the binade of a float, or fixed.

    Args:
      mantissa: bits, or fraction bits of fixed point.
      least: exponent of the smallest normal number; None for fixed point.
      max: largest number.
      min: most negative one.
      inf: whether what lies beyond becomes inf, where it does not saturate.
    """

    mantissa: int
    least: int | None
    max: float
    min: float
    inf: bool = True

    @classmethod
    def ieee(cls, exponent_bits: int, mantissa: int) -> Grid:
        bias = 2 ** (exponent_bits - 1) - 1
        top = (2 - 2.0**-mantissa) * 2.0**bias
        return cls(mantissa, 1 - bias, top, -top)

    @classmethod
    def full(cls, exponent_bits: int, mantissa: int) -> Grid:
        """Without inf and NaN: one binade more."""
        bias = 2 ** (exponent_bits - 1) - 1
        top = (2 - 2.0**-mantissa) * 2.0 ** (bias + 1)
        return cls(mantissa, 1 - bias, top, -top, inf=False)

    @classmethod
    def fixed(cls, integer: int, fraction: int) -> Grid:
        top = 2.0 ** (integer - 1)
        return cls(fraction, None, top - 2.0**-fraction, -top, inf=False)

    def spacing(self, x: np.ndarray) -> np.ndarray:
        """log2 of the distance between neighbours around x."""
        if self.least is None:
            return np.full(np.shape(x), -self.mantissa)
        exponent = np.frexp(x)[1] - 1
        return np.maximum(np.where(x == 0, self.least, exponent), self.least) - self.mantissa

    def held(self, limit: float, dtype: Any) -> float:
        """The number of this format and of dtype that is nearest to a limit, towards zero."""
        limit = np.clip(limit, *(float(m) for m in (_finfo(dtype).min, _finfo(dtype).max)))
        for power in range(-60, 1000):  # a shorter and shorter mantissa
            step = 2.0**power
            value = float(np.trunc(limit / step) * step)
            with np.errstate(over="ignore"):
                in_dtype = float(np.float64(value).astype(dtype)) == value
            if in_dtype and self.round(value, saturate=False) == value:
                return value
        raise AssertionError("no number is held by both")

    def round(
        self, x: Any, rounding: str = "nearest", saturate: bool = True, dtype: Any = np.float64
    ) -> np.ndarray:
        """Rounds finite or infinite float64 numbers; saturates at what dtype holds."""
        x = np.asarray(x, np.float64)
        inf = np.isinf(x)
        finite = np.where(inf, 0, x)
        spacing = self.spacing(finite)
        k = np.ldexp(finite, -spacing)
        k = np.rint(k) if rounding == "nearest" else np.floor(k)
        out = np.where(inf, x, np.ldexp(k, spacing))
        if saturate or not self.inf:
            if dtype == np.float64:
                return np.clip(out, self.min, self.max)
            return np.clip(out, self.held(self.min, dtype), self.held(self.max, dtype))
        top = np.inf
        if rounding == "floor":  # IEEE 754, towards negative: no finite number rises to inf
            top = self.max if dtype == np.float64 else self.held(self.max, dtype)
        out = np.where((out > self.max) | (out > top), np.where(inf, np.inf, top), out)
        return np.where(out < self.min, -np.inf, out)

    def neighbours(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """The largest number at or below x, and the next one above that."""
        low = self.round(x, "floor", saturate=False)
        step = np.ldexp(1.0, self.spacing(np.asarray(x, np.float64)))
        return low, low + step


GRIDS = {
    "e3m3": Grid.ieee(3, 3),
    "e4m4": Grid.ieee(4, 4),
    "e5m3": Grid.ieee(5, 3),
    "e6m9": Grid.ieee(6, 9),
    "e8m1": Grid.ieee(8, 1),
    "e8m10": Grid.ieee(8, 10),
    "e8m25": Grid.ieee(8, 25),
    "e9m4": Grid.ieee(9, 4),
    "e11m5": Grid.ieee(11, 5),
    "e11m52": Grid.ieee(11, 52),
    "e3m3none": Grid.full(3, 3),
    "e5m2none": Grid.full(5, 2),
    "q4.4": Grid.fixed(4, 4),
    "q8.8": Grid.fixed(8, 8),
    "q16.16": Grid.fixed(16, 16),
    "q1.15": Grid.fixed(1, 15),
    "q32.0": Grid.fixed(32, 0),
    "int16": Grid.fixed(16, 0),
    "int8": Grid.fixed(8, 0),
    "int4": Grid.fixed(4, 0),
    "int2": Grid.fixed(2, 0),
}
# The formats of ml_dtypes as grids, for what it has no cast for: floor and stochastic.
KNOWN = {
    "bfloat16": Grid.ieee(8, 7),
    "float16": Grid.ieee(5, 10),
    "e5m2": Grid.ieee(5, 2),
    "e4m3": Grid(3, -6, 448.0, -448.0),
    "e3m2": Grid.full(3, 2),
    "e2m3": Grid.full(2, 3),
    "e2m1": Grid.full(2, 1),
    "q8.8": GRIDS["q8.8"],
}


def groups(shape: tuple[int, int], scaling: str) -> list[tuple[slice, slice]]:
    """Which numbers of a matrix share a scale, when its last axis is the contracted one."""
    rows, columns = shape
    name, _, size = scaling.rstrip(")").partition("(")
    if name == "tensor":
        height, width = rows, columns
    elif name == "row":
        height, width = 1, columns
    else:
        height, width = map(int, size.split("x")) if "x" in size else (1, int(size))
    return [
        (slice(r, r + height), slice(c, c + width))
        for r in range(0, rows, height)
        for c in range(0, columns, width)
    ]


def slow_scale(amax: np.float32, top: float, scale_rounding: str, least: int = -126) -> np.float32:
    """A group's scale from its largest magnitude; powers of two in exact arithmetic.

    Args:
      amax: largest magnitude.
      top: largest number of the format.
      scale_rounding: none, up or down.
      least: exponent of the smallest scale, -127 of e8m0.
    """
    one = np.float32(1)
    if amax == 0:
        return np.float32(1)
    if scale_rounding == "none":
        return np.maximum(np.float32(amax) * (one / np.float32(top)), np.float32(2.0**-126))
    if scale_rounding == "up":  # the least power of two under which nothing overflows
        power = math.frexp(amax)[1] - math.frexp(top)[1] - 2
        while fractions.Fraction(2) ** power * fractions.Fraction(top) < fractions.Fraction(
            float(amax)
        ):
            power += 1
    else:  # OCP Microscaling 1.0, section 6.3
        power = (math.frexp(amax)[1] - 1) - (math.frexp(top)[1] - 1)
    return np.float32(2.0 ** max(power, least))


def slow_quantize(
    x: np.ndarray, name: str, scaling: str, scale_rounding: str
) -> tuple[np.ndarray, list[np.float32]]:
    """What a float32 matrix becomes, and the scales of its groups, one after the other."""
    grid, out, scales = (GRIDS | KNOWN)[name], np.empty_like(x), []
    whole = one = np.float32(1)
    if scaling.startswith("nv") and np.abs(x).max() > 0:
        whole = slow_scale(np.abs(x).max(), grid.max, "none") * (one / np.float32(448))
        whole = np.maximum(whole, np.float32(2.0**-117))
    for place in groups(x.shape, scaling):
        amax = np.abs(x[place]).max()
        if scaling.startswith("nv"):
            wanted = np.float32(amax) * (one / np.float32(grid.max)) * (one / whole)
            wanted = np.clip(wanted, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
            scales.append(np.float32(wanted))
            scale = scales[-1] * whole
        else:
            least = -127 if scaling.startswith("mx") else -126
            scale = slow_scale(amax, grid.max, scale_rounding, least)
            scales.append(scale)
        with np.errstate(under="ignore"):  # NumPy keeps subnormal numbers
            values = grid.round(x[place] * (one / scale)).astype(np.float32)
            out[place] = values * scale
    return out, scales


def random_patterns(count: int, seed: int) -> np.ndarray:
    """float32 of random bits: every class of number, NaN among them."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return bits.view(np.float32)


def near(values: np.ndarray) -> np.ndarray:
    """float32: values, ties between neighbours, and what lies one float32 beside them."""
    values = np.unique(values[np.isfinite(values)].astype(np.float64))
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    with np.errstate(all="ignore"):
        sides = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([points, *sides])


def special() -> np.ndarray:
    """float32: zeros, subnormals, the largest, inf and several NaN, of both signs."""
    bits = [0, 1, 2, 3, 0x3FFFFF, 0x400000, 0x5FFFFF, 0x600000, 0x7FFFFF, 0x800000, 0x800001]
    bits += [0x7F7FFFFE, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    both = np.array(bits + [b | 0x80000000 for b in bits], np.uint32)
    return both.view(np.float32)


def patterns(name: str, count: int, seed: int) -> np.ndarray:
    """float32 patterns for a format of `DTYPES`: random ones, and those where it can go wrong."""
    dtype = DTYPES[name]
    width = 16 if np.dtype(dtype).itemsize == 2 else ml_dtypes.finfo(dtype).bits
    whole = np.arange(2**width, dtype=np.uint16 if width == 16 else np.uint8)
    values = whole.view(dtype).astype(np.float32)
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0].astype(np.float64)
    rng = np.random.default_rng(seed)
    low, high = np.log2([positive.min(), positive.max()])
    size = np.exp2(rng.uniform(max(low - 3, -149), min(high + 3, 127.99), count // 4))
    inside = (size * rng.choice([-1.0, 1.0], size.shape)).astype(np.float32)
    # what lies beyond the largest: up to where the next number would be
    edge = positive.max() * np.array([1, 1.0625, 1.125, 1.25, 1.5, 1.75, 2])
    edge = near(edge[edge < 2.0**128])
    parts = [near(finite), edge, -edge, special(), inside]
    return np.concatenate([*parts, random_patterns(count - count // 4, seed + 1)])
