"""`lax.dot_general` of 8- and 16-bit operands in the form that a CPU runs, and runs fast.

XLA's CPU backend assigns a product of bfloat16 operands to a library early. The library accepts it
only if the left operand's contracting axes are its last. If a transpose of the left operand or of
the result is folded into the product later, the product no longer has that form and fails to
compile ("Unsupported element type for DotThunk"). A transpose of the result of a product with batch
axes, folded after layout assignment, crashes the process. The library is twice as fast as float32
if the result is float32, the left operand row-major. So on the CPU the left operand is transposed
and laid out here, an optimization barrier keeps later transposes out of it, and the result leaves
in float32 and is rounded to more bits than it has, an identity that no transpose crosses. Other
platforms see the plain product, and so do several CPU devices where a narrower result is asked for:
they add up their parts of it in its dtype, as others do.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax.ops.checks import Axes, Dims
from mpjax.ops.target import on_one_cpu, target_platform
from mpjax.typing import Array, DTypeLike


def free_axes(ndim: int, *used: Axes) -> Axes:
    """Returns the axes of an array that are in none of the given ones."""
    return tuple(d for d in range(ndim) if not any(d in axes for axes in used))


# The identity of an operand or result of a product; on the CPU no transpose crosses it. `vmap`
# moves the mapped axis of an `operand` to the front, and leaves that of a `result` in place.
settled_p = Primitive("settled")
settled_p.def_impl(lambda x, what: x)
settled_p.def_abstract_eval(lambda aval, what: aval)


def _batch(xs: Sequence[Array], axes: Sequence[int], *, what: str) -> tuple[Array, int]:
    (x,), (axis,) = xs, axes
    if what == "operand":
        x, axis = jnp.moveaxis(x, axis, 0), 0
    return settled_p.bind(x, what=what), axis


def _jvp(primals: Sequence[Array], tangents: Sequence[Array], *, what: str) -> tuple[Array, Array]:
    return settled_p.bind(*primals, what=what), tangents[0]


def _lower(x: Array, what: str) -> Array:
    if what == "operand":
        return lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    # a barrier would be gone when the last transposes are folded
    return lax.reduce_precision(x, exponent_bits=11, mantissa_bits=52)


batching.primitive_batchers[settled_p] = _batch
ad.primitive_jvps[settled_p] = _jvp
mlir.register_lowering(settled_p, lambda ctx, x, what: [x])
mlir.register_lowering(settled_p, mlir.lower_fun(_lower, multiple_results=False), platform="cpu")


def add_parts(parts: Array) -> Array:
    """Returns the sum over a first axis, along which devices hold parts, in its own dtype.

    Not `jnp.sum`, which takes 16-bit terms as float32 and would send them so.
    """
    return lax.reduce_sum(parts, axes=(0,))


def dot(a: Array, b: Array, dims: Dims, out: DTypeLike = jnp.float32) -> Array:
    """Returns `lax.dot_general` of two arrays of one dtype; sums are float32, or int32 of int8.

    Args:
      a: the left operand; float32 is multiplied as float32 on every platform.
      b: the right operand.
      dims: dimension numbers, none negative.
      out: dtype of the result, which the product emits; on one CPU device, where operands have
        less than 32 bits, it emits the dtype of the sums, which is then cast.
    """
    wide = jnp.dtype(jnp.int32 if a.dtype == jnp.int8 else jnp.float32)
    if a.dtype.itemsize >= 4:
        full = lax.Precision.HIGHEST
        return lax.dot_general(a, b, dims, precision=full, preferred_element_type=out)
    narrow = a.dtype != jnp.int8 and jnp.dtype(out) != wide
    plain = a.dtype == jnp.float16 or not on_one_cpu()  # float16 has no fast code
    if target_platform() != "cpu" or (narrow and plain):
        emitted = wide if a.dtype == jnp.int8 else out
        return lax.dot_general(a, b, dims, preferred_element_type=emitted).astype(out)
    (ca, cb), (ba, bb) = dims
    fa, fb = free_axes(a.ndim, ca, ba), free_axes(b.ndim, cb, bb)
    # The smaller operand that is not laid out is the left one; of int8 both are to be laid out.
    swapped = not _laid_out(a, fa, ca, ba) and b.size < a.size
    if swapped:
        a, b, ca, cb, ba, bb, fa, fb = b, a, cb, ca, bb, ba, fb, fa
    a, ca, ba = _laid(a, fa, ca, ba)
    if b.dtype == jnp.int8:
        b, cb, bb = _laid(b, fb, cb, bb)
    y = lax.dot_general(a, b, ((ca, cb), (ba, bb)), preferred_element_type=wide)
    y = settled_p.bind(y, what="result").astype(out)
    if not swapped:
        return y
    order = range(y.ndim)
    first, middle = len(ba), len(ba) + len(fa)
    return lax.transpose(y, (*order[:first], *order[middle:], *order[first:middle]))


def _laid_out(x: Array, free: Axes, summed: Axes, batch: Axes) -> bool:
    """Whether the axes that are summed over are the last; a batch axis may stand anywhere."""
    return free_axes(x.ndim, batch) == (*free, *summed)


def _laid(x: Array, free: Axes, summed: Axes, batch: Axes) -> tuple[Array, Axes, Axes]:
    """An operand, row-major with its summed axes last, and where these and its batch axes are."""
    if not _laid_out(x, free, summed, batch):
        x = lax.transpose(x, (*batch, *free, *summed))
        axes = tuple(range(x.ndim))
        batch, summed = axes[: len(batch)], axes[len(batch) + len(free) :]
    return settled_p.bind(x, what="operand"), summed, batch
