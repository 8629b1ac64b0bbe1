"""`lax.dot_general` of 8- and 16-bit operands in a form that every backend runs.

XLA's CPU backend assigns a product of bfloat16 operands to a library early. The library accepts it
only if the left operand's contracting axes are its last. If a transpose of the left operand or of
the result is folded into the product later, the product no longer has that form and fails to
compile ("Unsupported element type for DotThunk"). A transpose of the result of a product with batch
axes, folded after layout assignment, crashes the process. So on the CPU the left operand is
transposed here, an optimization barrier keeps later transposes out of it, and the result is rounded
to more bits than it has, an identity that no transpose crosses. Other platforms see the plain
product.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax.ops.checks import Axes, Dims
from mpjax.typing import Array


def free_axes(ndim: int, *used: Axes) -> Axes:
    """Returns the axes of an array that are in none of the given ones."""
    return tuple(d for d in range(ndim) if not any(d in axes for axes in used))


# The identity of an operand or result of a product; on the CPU no transpose crosses it. `vmap`
# moves the mapped axis of an `operand` to the front, that of both arrays of a `pair` (which
# transposes may cross) likewise, and leaves that of a `result` in place.
settled_p = Primitive("settled")
settled_p.multiple_results = True
settled_p.def_impl(lambda *xs, what: list(xs))
settled_p.def_abstract_eval(lambda *avals, what: list(avals))


def _batch(
    xs: Sequence[Array], axes: Sequence[int | None], *, what: str
) -> tuple[list[Array], list[int | None]]:
    out, places = list(xs), list(axes)
    (size,) = {x.shape[axis] for x, axis in zip(xs, axes, strict=True) if axis is not None}
    for i, (x, axis) in enumerate(zip(xs, axes, strict=True)):
        if axis is not None and what != "result":
            out[i], places[i] = jnp.moveaxis(x, axis, 0), 0
        elif axis is None and what == "pair":
            out[i], places[i] = lax.broadcast(x, (size,)), 0
    return settled_p.bind(*out, what=what), places


def _jvp(
    primals: Sequence[Array], tangents: Sequence[Array], *, what: str
) -> tuple[list[Array], list[Array]]:
    return settled_p.bind(*primals, what=what), list(tangents)


def _lower(*xs: Array, what: str) -> list[Array]:
    if what == "operand":
        return list(lax.optimization_barrier(xs))
    if what == "result":  # a barrier would be gone when the last transposes are folded
        return [lax.reduce_precision(x, exponent_bits=11, mantissa_bits=52) for x in xs]
    return list(xs)


batching.primitive_batchers[settled_p] = _batch
ad.primitive_jvps[settled_p] = _jvp
mlir.register_lowering(settled_p, lambda ctx, *xs, what: xs)
mlir.register_lowering(settled_p, mlir.lower_fun(_lower, multiple_results=True), platform="cpu")


def dot(a: Array, b: Array, dims: Dims) -> Array:
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
        # The library never accepts this form. XLA runs it in float32 and needs no barrier, if a
        # mapped axis is a batch axis of both operands.
        a, b = settled_p.bind(a, b, what="pair")
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    if not laid_out:
        a = lax.transpose(a, (*ba, *fa, *ca))
        ba, ca = leading, tuple(range(a.ndim - len(ca), a.ndim))
    (a,) = settled_p.bind(a, what="operand")
    y = lax.dot_general(a, b, ((ca, cb), (ba, bb)), preferred_element_type=jnp.float32)
    return settled_p.bind(y, what="result")[0]
