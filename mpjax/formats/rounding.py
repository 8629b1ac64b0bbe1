"""Rounding to a format, on integer bits, so that it is exact under `jit`.

Jitted float32 arithmetic flushes subnormals to zero, and XLA may elide a narrowing cast that is
cast back at once; integer operations on the float32 pattern suffer neither.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mpjax.errors import ConfigError, brief
from mpjax.formats.given import ROUNDED, as_array, check_key
from mpjax.formats.table import Format, FormatLike

ROUNDINGS = ("nearest", "stochastic", "floor")
_INF = 0x7F800000
_NAN = 0x7FC00000


def _u(value: int) -> Any:
    return jnp.uint32(value)


def _top(limit: float, format: Format, dtype: Any) -> int:
    """The float32 pattern of the largest number within a limit that format and dtype both hold."""
    info = jnp.finfo(dtype)
    limit = min(limit, float(info.max))
    if limit <= 0:  # q1.0 has the numbers -1 and 0
        return 0
    exponent = math.floor(math.log2(limit))
    step = 2.0 ** (exponent - info.nmant)
    if format.kind == "fixed":
        step = max(step, format.epsilon)
    else:
        step = max(step, 2.0 ** (exponent - format.mantissa_bits))
    return int(np.float32(math.floor(limit / step) * step).view(np.uint32))


def _quantum(format: Format, e: Any, sig: Any, lsb: Any) -> Any:
    """Exponent of the spacing of the format's numbers around sig * 2^lsb."""
    if format.kind == "fixed":
        return jnp.full_like(lsb, -format.mantissa_bits)
    top = lsb + 23  # of a float32 subnormal too high, which counts only below
    if format.exponent_bits > 8:  # float32's subnormals are normal numbers there
        leading = 31 - jax.lax.clz(sig).astype(jnp.int32)
        top = jnp.where(e == 0, lsb + leading, top)
    return jnp.maximum(top, 1 - format.bias) - format.mantissa_bits


def _random_up(sig: Any, low: Any, shift: Any, bits: Any) -> Any:
    """Whether to round up, with probability (dropped bits) / 2^shift."""
    s = jnp.clip(shift, 0, 56).astype(jnp.uint32)
    dropped = jnp.where(s >= 25, sig, low)
    # Compares as many random bits as are dropped, at most 32 (s = 0: 0 < 0 is never true).
    drawn = (bits >> _u(1)) >> (_u(31) - jnp.minimum(s, _u(31)))
    drawn = jnp.where(s >= 32, bits, drawn)
    return drawn < (dropped >> (jnp.maximum(s, _u(32)) - _u(32)))


def _round_pattern(
    u: Any, format: Format, rounding: str, bits: Any, saturate: bool, dtype: Any
) -> Any:
    """The float32 pattern of a float32 pattern rounded to a format, for a result in dtype."""
    sign, m = u & _u(0x80000000), u & _u(0x7FFFFFFF)
    e = m >> _u(23)
    # magnitude = sig * 2^lsb
    sig = jnp.where(e == 0, m, (m & _u(0x7FFFFF)) | _u(0x800000))
    base = jnp.maximum(e, _u(1)).astype(jnp.int32) - 1
    lsb = base - 149
    quantum = _quantum(format, e, sig, lsb)
    shift = jnp.maximum(quantum - lsb, 0)
    s = jnp.minimum(shift, 25).astype(jnp.uint32)  # sig has 24 bits
    ones = (_u(1) << s) - _u(1)
    if rounding == "nearest":
        odd = (sig >> s) & _u(1) if format.kind != "power" else _u(1)  # e8m0's ties go up
        kept = (sig + (ones >> _u(1)) + (odd & (ones & _u(1)))) >> s
    elif rounding == "floor":
        negative = sign != 0
        kept = (sig >> s) + (negative & ((sig & ones) != 0)).astype(jnp.uint32)
    else:
        kept = (sig >> s) + _random_up(sig, sig & ones, shift, bits).astype(jnp.uint32)
    # With base = exponent - 1, adding the significand adds its leading one to the exponent.
    normal = (base.astype(jnp.uint32) << _u(23)) + (kept << s)
    step = (jnp.maximum(quantum + 127, 0).astype(jnp.uint32)) << _u(23)  # kept is 1 there
    out = jnp.where(kept == 0, _u(0), jnp.where(s == 25, step, normal))

    if saturate or format.specials == "none":
        edge: Any = _u(_top(format.max, format, dtype))
        if format.kind == "fixed":
            edge = jnp.where(sign != 0, _u(_top(-format.min, format, dtype)), edge)
        out = jnp.minimum(out, edge)
    else:
        edge = _u(_top(format.max, format, jnp.float32))
        out = jnp.where(out > edge, _u(_INF if format.specials == "ieee" else _NAN), out)
        if rounding == "floor":  # IEEE 754, towards negative: no finite number rises to inf
            largest = _u(_top(format.max, format, dtype))
            out = jnp.where((sign == 0) & (m < _u(_INF)) & (m > largest), largest, out)
    out = jnp.where(m > _u(_INF), m, out)  # NaN stays, whatever the format
    if format.kind == "fixed" or format.specials == "fnuz":
        sign = jnp.where(out == 0, _u(0), sign)  # there is no -0
    return out | sign


def _power_pattern(u: Any, rounded: Any, rounding: str, bits: Any) -> Any:
    """Rounding to e8m0 where the general way ends: below 2^-126, and at what is not positive."""
    smallest, next_one = _u(0x00400000), _u(0x00800000)  # 2^-127, a float32 subnormal, and 2^-126
    if rounding == "stochastic":
        limit = smallest + (bits >> _u(10)) + _u(1)
    else:
        # as XLA and ml_dtypes: nearest takes all between these two up
        limit = smallest + _u(1) if rounding == "nearest" else next_one
    low = jnp.where(u < limit, smallest, next_one)
    out = jnp.where(u < next_one, low, rounded)
    return jnp.where((u == 0) | (u >= _u(0x80000000)), _u(_NAN), out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
# one program where it is called by itself; part of the caller's jaxpr where that is traced
@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _round(x: Any, bits: Any, format: Format, rounding: str, saturate: bool) -> Any:
    u = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    out = _round_pattern(u, format, rounding, bits, saturate, x.dtype)
    if format.kind == "power":
        out = _power_pattern(u, out, rounding, bits)
    y = jax.lax.bitcast_convert_type(out, jnp.float32)
    return y.astype(x.dtype)


@_round.defjvp
def _round_jvp(format: Any, rounding: Any, saturate: Any, primals: Any, tangents: Any) -> Any:
    # Straight-through; `round_to` stops the gradient where it is not asked for.
    return _round(*primals, format, rounding, saturate), tangents[0]


def check_rounding(rounding: str, key: Any, where: str = "rounding") -> None:
    """Checks a rounding's name and that it has a key where it draws random bits.

    Raises:
      ConfigError: unknown rounding, or stochastic without a random key.
    """
    if not isinstance(rounding, str) or rounding not in ROUNDINGS:
        raise ConfigError(
            f"{where}: unknown rounding {brief(rounding)}; known: {' '.join(ROUNDINGS)}"
        )
    if rounding != "stochastic":
        return
    if key is None:
        raise ConfigError(
            f"{where}: stochastic rounding needs random bits; pass key=jax.random.key(...),"
            " folded with step and place, or rounding='nearest'"
        )
    check_key(key, where)


def round_to(
    x: Float[Array, "*shape"],
    format: FormatLike,
    rounding: str = "nearest",
    key: Any = None,
    *,
    saturate: bool = True,
    straight_through: bool = False,
) -> Float[Array, "*shape"]:
    r"""Rounds to the numbers of a format; the result keeps the dtype of x.

    Nearest rounds ties to even (`e8m0`: up, and so all below its second number $2^{-126}$, as XLA
    and ml_dtypes do; zero and negative numbers become NaN there); floor rounds towards $-\infty$;
    stochastic rounds $x$ between neighbours $a < x < b$ to $b$ with probability
    $(x - a) / (b - a)$, so that its mean is $x$.

    Args:
      x: float32, bfloat16 or float16.
      format: a Format, its name or a dtype.
      rounding: `nearest`, `stochastic` or `floor`.
      key: random key, for stochastic rounding.
      saturate: whether what lies beyond the largest number, inf too, becomes that number;
        otherwise it becomes inf where the format has one, else NaN, else still the largest
        number; but floor takes finite numbers above the largest to it, as IEEE 754 does. NaN stays
        NaN in every format.
      straight_through: whether gradients pass as if nothing had been rounded; otherwise they are
        zero.

    Returns:
      The rounded numbers, in the shape and dtype of x.

    Raises:
      ConfigError: unknown format or rounding, stochastic without a key, or what is not rounded.

    Example:
      >>> round_to(jnp.array([0.3, 500.0]), "e4m3").tolist()
      [0.3125, 448.0]
      >>> round_to(jnp.float32(500.0), "e4m3", saturate=False).item()
      nan

    References:
      Gupta et al. 2015, Deep Learning with Limited Numerical Precision, section 3 (stochastic).
    """
    format = Format.of(format)
    x = as_array(x, "round_to: x")
    if x.dtype not in ROUNDED:
        raise ConfigError(
            f"round_to: x is {x.dtype.name}; float32, bfloat16 and float16 can be rounded, cast"
            " it first"
        )
    check_rounding(rounding, key)
    bits = jax.random.bits(key, x.shape, jnp.uint32) if rounding == "stochastic" else None
    if not straight_through:
        x = jax.lax.stop_gradient(x)
    return _round(x, bits, format, rounding, bool(saturate))
