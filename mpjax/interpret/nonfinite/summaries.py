"""Arrays in a few numbers, and from these why an operation broke, in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from mpjax.interpret.core.retrace import aval_of, is_float
from mpjax.interpret.nonfinite.fault import is_inexact
from mpjax.typing import Array, Shape


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
    return jnp.any(jnp.isnan(x)) if is_inexact(x) else jnp.zeros((), jnp.bool_)


def _real(x: Array) -> Array:
    """Numbers as float32, to be shown; complex ones by their magnitudes."""
    x = jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else jnp.asarray(x)
    return x.astype(jnp.float32)


def range_of(x: Array) -> Array:
    """Returns smallest, largest and largest finite magnitude, without NaN, as float32."""
    if not is_inexact(x) or not jnp.size(x):
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


@dataclasses.dataclass(frozen=True)
class Range:
    """The values of an array, in short; NaN are left out.

    Args:
      dtype: its name.
      shape: of the array.
      min: smallest value.
      max: largest value.
      amax: largest finite magnitude.
    """

    dtype: str
    shape: Shape
    min: float
    max: float
    amax: float

    @classmethod
    def of(cls, x: Array) -> Range:
        """Returns the range of an array of numbers that is not empty."""
        return cls(x.dtype.name, tuple(x.shape), *map(float, range_of(x)))

    def __str__(self) -> str:
        size = f"[{','.join(map(str, self.shape))}]" if self.shape else ""
        if self.min > self.max:
            return f"{self.dtype}{size}: all nan"
        if self.min == self.max:
            return f"{self.dtype}{size}: {self.min:.4g}"
        finite = math.isfinite(self.min) and math.isfinite(self.max)
        more = "" if finite else f", largest finite magnitude {self.amax:.4g}"
        return f"{self.dtype}{size}: {self.min:.4g} to {self.max:.4g}{more}"


_MAY_OVERFLOW = {
    *("dot_general", "conv_general_dilated", "reduce_sum", "cumsum", "reduce_prod", "cumprod"),
    *("scatter-add", "psum", "psum_invariant", "add", "add_any", "sub", "mul", "square", "exp"),
    *("exp2", "expm1", "integer_pow", "pow", "sinh", "cosh", "reduce_scatter"),
}


def reason(eqn: JaxprEqn, kind: str, ranges: Sequence[Range]) -> str:
    """Returns what happened, in a few words.

    Args:
      eqn: the operation.
      kind: `inf` or `nan`.
      ranges: of its floating-point inputs.
    """
    name = eqn.primitive.name
    dtype = aval_of(eqn.outvars[0]).dtype
    infinite = any(math.isinf(r.min) or math.isinf(r.max) for r in ranges)
    if name == "div" and len(ranges) == 2 and ranges[1].min <= 0 <= ranges[1].max:
        return "0 / 0" if kind == "nan" and not infinite else "a division by 0"
    if name in ("log", "log2", "rsqrt", "sqrt", "log1p", "pow") and ranges:
        edge = -1.0 if name == "log1p" else 0.0
        if kind == "nan" and ranges[0].min < edge:
            return f"{name} of a negative number" if edge == 0 else "log1p of a number below -1"
        if kind == "inf" and ranges[0].min <= edge and name != "sqrt":
            return f"{name} of {edge:g}" if name != "pow" else "a negative power of 0"
    if name == "integer_pow" and eqn.params["y"] < 0 and ranges[0].min <= 0 <= ranges[0].max:
        return "a negative power of 0"
    if infinite and kind == "nan":
        if name in ("mul", "dot_general", "conv_general_dilated"):
            return "0 * inf, or inf - inf in its sum"
        return "inf - inf" if name in ("sub", "add", "add_any") else "an operation on inf"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"{name} is not defined there"
    largest = f"the largest {dtype.name} is {float(jnp.finfo(dtype).max):.6g}"
    if name == "convert_element_type":
        return f"the value does not fit; {largest}"
    if kind == "inf" or name in _MAY_OVERFLOW:
        return f"overflow; {largest}"
    return f"{name} is not defined there"
