"""Rounding to a format, on integer bits, so that it is exact under `jit`.

Jitted float32 arithmetic flushes subnormals to zero, and XLA may remove a narrowing cast that is
cast back immediately; integer operations on the float32 pattern are safe from both.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from mpjax.errors import ConfigError, brief, explains_calls
from mpjax.formats.checks import ROUNDED, as_array, check_key
from mpjax.formats.format_table import Format, FormatLike
from mpjax.formats.pattern import as_float, as_int, as_uint, filled, left, right, select
from mpjax.typing import DTypeLike, Key, Shape

ROUNDINGS = ("nearest", "stochastic", "floor")
_INF = 0x7F800000
_NAN = 0x7FC00000
_U, _I = np.uint32, np.int32
_Pair = tuple[Array, Array | None]  # x and the random bits


def _top(limit: float, format: Format, dtype: DTypeLike) -> int:
    """The float32 pattern of the largest number up to a limit that format and dtype both hold."""
    info = jnp.finfo(dtype)
    limit = min(limit, float(info.max))
    if limit <= 0:  # q1.0 has the numbers -1 and 0
        return 0
    exponent = math.floor(math.log2(limit))
    leading = 0 if format.kind == "fixed" else exponent
    step = 2.0 ** max(exponent - info.nmant, leading - format.mantissa_bits)
    return int(np.float32(math.floor(limit / step) * step).view(np.uint32))


def _quantum(format: Format, e: Array, sig: Array, lsb: Array) -> Array:
    """Exponent of the spacing of the format's numbers around sig * 2^lsb."""
    if format.kind == "fixed":
        return filled(lsb, np.int32(-format.mantissa_bits))
    top = lax.add(lsb, _I(23))  # too high for a float32 subnormal, which matters only below
    if format.exponent_bits > 8:  # float32's subnormals are normal numbers of the format
        leading = lax.sub(_I(31), as_int(lax.clz(sig)))
        top = select(lax.eq(e, _U(0)), lax.add(lsb, leading), top)
    return lax.sub(lax.max(top, _I(1 - format.bias)), _I(format.mantissa_bits))


def _random_up(sig: Array, low: Array, shift: Array, bits: Array) -> Array:
    """Whether to round up, with probability (dropped bits) / 2^shift."""
    s = as_uint(lax.min(shift, _I(56)))
    dropped = select(lax.ge(s, _U(25)), sig, low)
    # Compares as many random bits as are dropped, at most 32; for s = 0, 0 < 0 is false.
    unused = lax.sub(_U(31), lax.min(s, _U(31)))
    drawn = right(right(bits, _U(1)), unused)
    drawn = select(lax.ge(s, _U(32)), bits, drawn)
    return lax.lt(drawn, right(dropped, lax.sub(lax.max(s, _U(32)), _U(32))))


def _round_pattern(
    u: Array, format: Format, rounding: str, bits: Array | None, saturate: bool, dtype: DTypeLike
) -> Array:
    """Rounds a float32 pattern to a format, to numbers that dtype holds."""
    sign, m = lax.bitwise_and(u, _U(0x80000000)), lax.bitwise_and(u, _U(0x7FFFFFFF))
    e = right(m, _U(23))
    # magnitude = sig * 2^lsb
    leading_one = lax.bitwise_or(lax.bitwise_and(m, _U(0x7FFFFF)), _U(0x800000))
    sig = select(lax.eq(e, _U(0)), m, leading_one)
    base = lax.sub(as_int(lax.max(e, _U(1))), _I(1))
    lsb = lax.sub(base, _I(149))
    quantum = _quantum(format, e, sig, lsb)
    shift = lax.max(lax.sub(quantum, lsb), _I(0))
    s = as_uint(lax.min(shift, _I(25)))  # sig has 24 bits
    ones = lax.sub(left(_U(1), s), _U(1))
    if rounding == "nearest":
        half = right(ones, _U(1))
        # e8m0's ties go up, all others' to even
        odd: Array | np.number = right(sig, s) if format.kind != "power" else _U(1)
        carry = lax.bitwise_and(lax.bitwise_and(odd, ones), _U(1))
        rounded = right(lax.add(lax.add(sig, half), carry), s)
    else:
        low = lax.bitwise_and(sig, ones)
        if bits is None:  # floor
            up = lax.bitwise_and(lax.ne(sign, _U(0)), lax.ne(low, _U(0)))
        else:
            up = _random_up(sig, low, shift, bits)
        rounded = lax.add(right(sig, s), as_uint(up))
    # With base = exponent - 1, adding the significand adds its leading one to the exponent.
    normal = lax.add(left(as_uint(base), _U(23)), left(rounded, s))
    step = left(as_uint(lax.max(lax.add(quantum, _I(127)), _I(0))), _U(23))  # rounded is 1 there
    out = select(lax.eq(s, _U(25)), step, normal)
    out = select(lax.eq(rounded, _U(0)), _U(0), out)

    if saturate or format.specials == "none":
        edge: Array | np.number = _U(_top(format.max, format, dtype))
        if format.kind == "fixed":
            lowest = _U(_top(-format.min, format, dtype))
            edge = select(lax.ne(sign, _U(0)), lowest, filled(sign, edge))
        out = lax.min(out, edge)
    else:
        edge = _U(_top(format.max, format, jnp.float32))
        over = _U(_INF if format.specials == "ieee" else _NAN)
        out = select(lax.gt(out, edge), over, out)
        if rounding == "floor":  # IEEE 754, towards negative: no finite number rises to inf
            largest = _U(_top(format.max, format, dtype))
            finite = lax.bitwise_and(lax.lt(m, _U(_INF)), lax.gt(m, largest))
            out = select(lax.bitwise_and(lax.eq(sign, _U(0)), finite), largest, out)
    out = select(lax.gt(m, _U(_INF)), m, out)  # NaN stays, whatever the format
    if format.kind == "fixed" or format.specials == "fnuz":
        sign = select(lax.eq(out, _U(0)), _U(0), sign)  # there is no -0
    return lax.bitwise_or(out, sign)


def _power_pattern(u: Array, rounded: Array, rounding: str, bits: Array | None) -> Array:
    """Completes the rounding to e8m0: below 2^-126, and of what is not positive."""
    smallest, next_one = _U(0x00400000), _U(0x00800000)  # 2^-127, a float32 subnormal, and 2^-126
    limit: Array | np.number
    if bits is not None:
        limit = lax.add(right(bits, _U(10)), _U(0x00400001))
    else:
        # as in XLA and ml_dtypes, nearest rounds all between these two up
        limit = _U(0x00400001) if rounding == "nearest" else next_one
    low = select(lax.lt(u, limit), smallest, filled(u, next_one))
    out = select(lax.lt(u, next_one), low, rounded)
    positive = lax.bitwise_and(lax.ne(u, _U(0)), lax.lt(u, _U(0x80000000)))
    return select(positive, out, _U(_NAN))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
# one program in an eager call; part of the caller's jaxpr under a trace
@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _round(x: Array, bits: Array | None, format: Format, rounding: str, saturate: bool) -> Array:
    u = lax.bitcast_convert_type(as_float(x), jnp.uint32)
    out = _round_pattern(u, format, rounding, bits, saturate, x.dtype)
    if format.kind == "power":
        out = _power_pattern(u, out, rounding, bits)
    y = lax.bitcast_convert_type(out, jnp.float32)
    return lax.convert_element_type(y, x.dtype)


@_round.defjvp
def _round_jvp(
    format: Format, rounding: str, saturate: bool, primals: _Pair, tangents: _Pair
) -> tuple[Array, Array]:
    # Straight-through; `round_to` stops the gradient unless it is asked for.
    return _round(*primals, format, rounding, saturate), tangents[0]


def random_bits(key: Key | None, shape: Shape, rounding: str) -> Array | None:
    """Returns random bits for stochastic rounding, None for another."""
    if rounding != "stochastic":
        return None
    assert key is not None  # `check_rounding` and `need_key` said so
    return jax.random.bits(key, shape, jnp.uint32)


def check_rounding(rounding: str, key: Key | None, where: str = "rounding") -> None:
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


@explains_calls
def round_to(
    x: Float[Array, "*shape"],
    format: FormatLike,
    rounding: str = "nearest",
    key: Key | None = None,
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
    if not isinstance(saturate, bool | np.bool_):
        raise ConfigError(f"round_to: saturate={brief(saturate)}; write True or False")
    x = as_array(x, "round_to: x")
    if x.dtype not in ROUNDED:
        raise ConfigError(
            f"round_to: x is {x.dtype.name}; float32, bfloat16 and float16 can be rounded, cast"
            " it first"
        )
    check_rounding(rounding, key)
    bits = random_bits(key, x.shape, rounding)
    if not straight_through:
        x = lax.stop_gradient(x)
    return _round(x, bits, format, rounding, bool(saturate))
