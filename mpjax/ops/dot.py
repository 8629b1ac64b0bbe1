"""`lax.dot_general` of short operands in a form that every backend runs.

XLA's CPU backend decides early that a product of bfloat16 operands goes to a library, which takes
it only if the left operand's contracting axes are its last. A transpose that is folded into the
product later, of the left operand or of the result, takes the product out of that form again, and
then the backend has nothing that runs it ("Unsupported element type for DotThunk"). So the left
operand is laid out here, and on the CPU a barrier keeps transposes out. Other platforms see the
plain product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax.ops.given import Axes, Dims


def free_axes(ndim: int, *used: Axes) -> Axes:
    """Returns the axes of an array that are in none of the given ones."""
    return tuple(d for d in range(ndim) if not any(d in axes for axes in used))


# The identity of its operands. `barrier`: the CPU moves no transpose across it. Where a mapped axis
# goes: `first`, of each operand that has it; or of all operands, `all first`; or it stays (`any`).
settled_p = Primitive("settled")
settled_p.multiple_results = True
settled_p.def_impl(lambda *xs, barrier, mapped: list(xs))
settled_p.def_abstract_eval(lambda *avals, barrier, mapped: list(avals))


def _batch(
    xs: Sequence[Any], axes: Sequence[Any], *, barrier: bool, mapped: str
) -> tuple[list[Any], list[int | None]]:
    out, places = list(xs), list(axes)
    (size,) = {x.shape[axis] for x, axis in zip(xs, axes, strict=True) if axis is not None}
    for i, (x, axis) in enumerate(zip(xs, axes, strict=True)):
        if axis is not None and mapped != "any":
            out[i], places[i] = jnp.moveaxis(x, axis, 0), 0
        elif axis is None and mapped == "all first":
            out[i], places[i] = lax.broadcast(x, (size,)), 0
    return settled_p.bind(*out, barrier=barrier, mapped=mapped), places


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[list[Any], list[Any]]:
    return settled_p.bind(*primals, **params), list(tangents)


def _lower(*xs: Any, barrier: bool, mapped: str) -> list[Any]:
    return list(lax.optimization_barrier(xs)) if barrier else list(xs)


batching.primitive_batchers[settled_p] = _batch
ad.primitive_jvps[settled_p] = _jvp
mlir.register_lowering(settled_p, lambda ctx, *xs, barrier, mapped: xs)
mlir.register_lowering(settled_p, mlir.lower_fun(_lower, multiple_results=True), platform="cpu")


def dot(a: Any, b: Any, dims: Dims) -> Any:
    """Returns `lax.dot_general` of two arrays of one dtype, float32.

    Args:
      a: the left operand; float32 is multiplied as float32 on every platform.
      b: the right operand.
      dims: dimension numbers, none negative.
    """
    if a.dtype == jnp.float32:
        return lax.dot_general(
            a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    (ca, cb), (ba, bb) = dims
    fa, fb = free_axes(a.ndim, ca, ba), free_axes(b.ndim, cb, bb)
    leading = tuple(range(len(ba)))
    laid_out = free_axes(a.ndim, ba) == (*fa, *ca)  # a batch axis may stand anywhere
    if not laid_out and ba == bb == leading and len(ca) == len(fa) == 1 and len(fb) <= 1:
        # The library never takes this form, XLA does it in float32 and needs no barrier, as long
        # as an axis that is mapped is a batch axis of both.
        a, b = settled_p.bind(a, b, barrier=False, mapped="all first")
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    if not laid_out:
        a = lax.transpose(a, (*ba, *fa, *ca))
        ba, ca = leading, tuple(range(a.ndim - len(ca), a.ndim))
    (a,) = settled_p.bind(a, barrier=True, mapped="first")
    y = lax.dot_general(a, b, ((ca, cb), (ba, bb)), preferred_element_type=jnp.float32)
    return settled_p.bind(y, barrier=True, mapped="any")[0]
