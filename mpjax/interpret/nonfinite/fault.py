"""What counts as a fault: an operation that makes an infinity or a NaN.

| out of an operation comes | and went in | fault |
|---|---|---|
| NaN | nothing that is NaN | yes, so for infinity - infinity, 0 * infinity, 0 / 0 |
| an infinity | finite numbers only | yes: overflow, log(0), x / 0, a cast that does not fit |
| an infinity | an infinity | no: masks of -inf and what follows from them |
| anything | a NaN | no: it came from elsewhere |
| integers, booleans | anything | no |

Operations that work value by value are looked at value by value, so an overflow beside a mask of
-inf is found; others as a whole. Operations that only move values never make any.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from mpjax.interpret.core.op_lists import COMPARE, ELEMENTWISE, FULL_CUDA, SHAPE
from mpjax.typing import Array

# Of several that one operation makes the largest is reported.
FINE, FROM_INFINITY, INFINITY, NAN = 0, 1, 2, 3
KINDS = {FROM_INFINITY: "nan", INFINITY: "inf", NAN: "nan"}

_MOVES = (
    (SHAPE - {"gather"})  # a gather out of bounds fills with NaN
    | COMPARE
    | {
        *("abs", "clamp", "copy", "copy_p", "is_finite", "max", "min", "name", "neg", "pvary"),
        *("select_n", "sign", "stop_gradient", "floor", "ceil", "round"),
        *("reduce_max", "reduce_min", "argmax", "argmin", "cummax", "cummin", "sort", "top_k"),
        *("reduce_window_max", "reduce_window_min", "scatter", "scatter-min", "scatter-max"),
        *("all_gather", "all_gather_invariant", "all_to_all", "ppermute", "pmax", "pmin"),
        *("pbroadcast", "optimization_barrier", "device_put", "iota", "random_bits"),
        *("settled", "with_derivative"),
    }
)
_STOPS = frozenset({"select_n", "max", "min", "clamp", "slice", "dynamic_slice"})
_BY_VALUE = (ELEMENTWISE | FULL_CUDA | {"convert_element_type"}) - {
    *("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp"),
}


def is_inexact(x: object) -> bool:
    """Returns whether a value or aval is an array of floating-point or complex numbers."""
    if "Ref" in type(x).__name__ or "Ref" in type(getattr(x, "aval", None)).__name__:
        return False  # a reference to an array
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def can_make(eqn: JaxprEqn) -> bool:
    """Returns whether an operation could make an infinity or a NaN at all."""
    if eqn.primitive.name in _MOVES:
        return False
    return any(is_inexact(var.aval) and getattr(var.aval, "size", 0) for var in eqn.outvars)


def can_stop(eqn: JaxprEqn) -> bool:
    """Returns whether an operation makes none but may leave one behind, such as `where`."""
    return eqn.primitive.name in _STOPS and any(is_inexact(var.aval) for var in eqn.outvars)


def _exact(x: Array) -> Array:
    """The same numbers in a dtype for which `is_finite` is defined."""
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 16:
        return lax.convert_element_type(x, jnp.float32)  # every float8 number is one
    return x


def all_finite(x: Array) -> Array:
    """Returns whether every number is finite, as a bool scalar, in few operations."""
    x = _exact(jnp.asarray(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return all_finite(x.real) & all_finite(x.imag)
    return lax.reduce_and(lax.is_finite(x), range(x.ndim))


def faults(eqn: JaxprEqn, args: Sequence[Array], out: Array) -> tuple[Array, Array]:
    """Returns how bad an output is, and where.

    Args:
      eqn: the operation.
      args: its arguments.
      out: one of its outputs, of floating-point or complex numbers.

    Returns:
      `FINE`, `FROM_INFINITY`, `INFINITY` or `NAN` as an int32 scalar; and a mask in the output's
      shape of the values that are at fault.
    """
    out = _exact(out)
    numbers = [_exact(x) for x in args if is_inexact(x)]
    is_nan, is_inf = jnp.isnan(out), jnp.isinf(out)
    aligned = all(jnp.shape(x) in ((), out.shape) for x in numbers)
    no, shape = jnp.zeros((), jnp.bool_), out.shape
    if eqn.primitive.name in _BY_VALUE and aligned:
        nans = [jnp.broadcast_to(jnp.isnan(x), shape) for x in numbers]
        infs = [jnp.broadcast_to(jnp.isinf(x), shape) for x in numbers]
        no = jnp.broadcast_to(no, shape)
    else:
        nans = [jnp.any(jnp.isnan(x)) for x in numbers]
        infs = [jnp.any(jnp.isinf(x)) for x in numbers]
    had_nan, had_inf = sum(nans, no), sum(infs, no)  # a sum of booleans is their union
    had_nan, had_inf = jnp.broadcast_to(had_nan, shape), jnp.broadcast_to(had_inf, shape)
    new_nan, new_inf = is_nan & ~had_nan, is_inf & ~had_nan & ~had_inf
    kind = jnp.int32
    code = jnp.where(
        new_nan,
        jnp.where(had_inf, kind(FROM_INFINITY), kind(NAN)),
        jnp.where(new_inf, kind(INFINITY), kind(FINE)),
    )
    return jnp.max(code), new_nan | new_inf


def repaired(x: Array, nonfinite: Array) -> Array:
    """Returns an array with finite numbers where `nonfinite`: 0 for NaN, the largest for infinity.

    Args:
      x: the array.
      nonfinite: mask in its shape.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.where(nonfinite, jnp.zeros((), x.dtype), x)
    most = jnp.asarray(float(jnp.finfo(x.dtype).max), x.dtype)
    finite = jnp.where(jnp.isnan(x), jnp.zeros((), x.dtype), jnp.clip(x, -most, most))
    return jnp.where(nonfinite, finite, x)
