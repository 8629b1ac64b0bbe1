"""Arrays that are saved for the backward pass in a narrow format.

`jax.checkpoint` chooses between keeping a number and computing it again. This is the third way: it
is kept in fewer bits. The forward pass reads the array itself, the backward pass what was kept: the
loss is that of the arrays, and gradients are those at rounded numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.errors import ConfigError
from mpjax.formats import Format, quantize
from mpjax.formats.delayed import AmaxHistory
from mpjax.formats.quantized import Quantized
from mpjax.ops.products.quantized_operand import operand_scales
from mpjax.precision import Operand, Recipe, Residuals
from mpjax.typing import Array, DTypeLike, PyTree

_LEAST = 16  # numbers of a block; an axis that has no divisor from here on has one scale
_Out = TypeVar("_Out")


class Saved(NamedTuple):
    """An array and what the backward pass reads in its place.

    Args:
      x: the array.
      low: what is kept of it; None where it is kept as it is.
    """

    x: Array
    low: Quantized | Array | None = None

    def restored(self) -> Array:
        """What was kept, in the dtype of the array."""
        assert self.low is not None
        low = self.low.dequantize(self.x.dtype) if isinstance(self.low, Quantized) else self.low
        return low.astype(self.x.dtype)


# What is kept is a constant of the first derivative. The second would need its own, which is 0 or,
# taken as the identity, goes through 8 bits.
@jax.custom_jvp
def _once(values: PyTree) -> PyTree:
    return values


@_once.defjvp
def _differentiated(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
    raise ConfigError(
        "residuals: gradients of gradients would pass through what was rounded for the first ones;"
        " take residuals=none"
    )


# Where there is a backward pass. A compiler may put what only that reads at the end of the forward
# pass, and hold the arrays until then: what follows must wait for it.
@jax.custom_jvp
def _after(x: Array, low: PyTree) -> Array:
    del low
    return x


_after.defjvp(lambda primals, tangents: (lax.optimization_barrier(primals)[0], tangents[0]))


def save_for_backward(
    x: Array, residuals: Residuals, operand: Operand | None = None, parts: int = 1
) -> Saved:
    """Returns an array and what is kept of it; as it is where that saves nothing.

    Args:
      x: the array.
      residuals: how it is kept.
      operand: how a product quantises it; where that takes 8 bits the same numbers are kept.
      parts: into how many parts devices cut the last axis; no block lies across two.

    Example:
      >>> x = jnp.array([[448.0, 1.0, 0.3]])
      >>> save_for_backward(x, Residuals.parse("e4m3")).restored().tolist()
      [[448.0, 1.0, 0.3125]]
    """
    if not residuals or not jnp.issubdtype(x.dtype, jnp.floating) or x.size == 0:
        return Saved(x)
    if residuals.dtype is not None:
        if residuals.dtype.itemsize >= x.dtype.itemsize:
            return Saved(x)
        low: Quantized | Array = lax.stop_gradient(x).astype(residuals.dtype)
    else:
        low = _rounded(x, residuals, operand, parts)
    # Behind a barrier XLA cannot take the narrow array and its way back for the array itself.
    low = lax.optimization_barrier(low)
    return Saved(_after(x, low), low)


def _rounded(x: Array, residuals: Residuals, operand: Operand | None, parts: int) -> Quantized:
    own = Format(operand.format) if operand and operand.rounding == "nearest" else None
    if operand and own and own.bits == 8 and own.dtype is not None:  # else it would lie in float32
        return quantize(x, operand.format, operand.scaling, scale_rounding=operand.scales_rounded)
    assert residuals.block is not None
    size, most = x.shape[-1] // parts, residuals.block
    block = next(n for n in range(min(size, most), 0, -1) if size % n == 0)
    cut = block >= min(_LEAST, most) and block < x.shape[-1]
    return quantize(x, residuals.name, f"block(1x{block})" if cut else "row")


def known_scales(
    saved: Saved, kernel: Array, recipe: Recipe | None, dtype: DTypeLike,
    amax: AmaxHistory | None = None,
) -> tuple[Array | None, Array | None]:  # fmt: skip
    """Returns the scales of two operands that the backward pass of a product must not find again.

    It could: they are those of what was kept. But several devices would ask each other for them
    once more, and a compiler that puts such questions together lets the first ones wait for the
    last, and all that they are about with them.

    Args:
      saved: the left operand and what was kept of it.
      kernel: the right one.
      recipe: of the product.
      dtype: in which it multiplies.
      amax: state of delayed scaling.

    Returns:
      A number for each that is scaled as a whole, alike in both passes; else None.
    """
    if recipe is None or saved.low is None:
        return None, None
    past = None if amax is None else amax.past(recipe.margin)

    def scale(x: Array, first: Operand | None, again: Operand | None, number: int) -> Array | None:
        if first is None or again is None or (first.scaling, again.scaling) != ("tensor",) * 2:
            return None
        if (first.format, first.scales_rounded) != (again.format, again.scales_rounded):
            return None
        own = None if past is None else past[number]
        return operand_scales(lax.stop_gradient(x), first, x.shape, own).reshape(())

    x, first = saved.x.astype(dtype), recipe.fprop[0]
    own = isinstance(saved.low, Quantized) and first and saved.low.format == Format(first.format)
    left = scale(x, first, recipe.wgrad[0], 0) if own and not recipe.hadamard else None
    return left, scale(kernel, recipe.fprop[1], recipe.dgrad[1], 1)


def from_saved(function: Callable[..., _Out], saved: tuple[Saved, ...], *others: PyTree) -> _Out:
    """Calls `function(*arrays, *others)`, whose backward pass reads what was kept of the arrays.

    Nothing that the function computes is kept, so what its backward pass needs is computed again.

    Args:
      function: of the arrays of `saved` and then of `others`; it must read no other traced array.
      saved: all kept low, or none, which is the function alone.
      others: kept as they are.

    Raises:
      ConfigError: the result is differentiated twice.
    """
    if all(one.low is None for one in saved):
        return function(*(one.x for one in saved), *others)
    count = len(saved)
    # A Python number stays one: a function may ask whether it is 0.
    numbers = {i: other for i, other in enumerate(others) if isinstance(other, int)}

    def called(*values: PyTree) -> _Out:
        rest = [numbers.get(i, other) for i, other in enumerate(values[count:])]
        return function(*values[:count], *rest)

    @jax.custom_vjp
    def run(arrays: tuple[Saved, ...], others: PyTree) -> _Out:
        return called(*(one.x for one in arrays), *others)

    def forward(arrays: tuple[Saved, ...], others: PyTree) -> tuple[_Out, PyTree]:
        # None of its numbers says which dtype x has, and that it was differentiated.
        none = (lax.slice_in_dim(one.x.ravel(), 0, 0) for one in arrays)
        residuals = [
            one if one.low is None else Saved(x, one.low)
            for one, x in zip(arrays, none, strict=True)
        ]
        # Not `run`: a remat policy that saves products must see the products themselves.
        y, _ = jax.vjp(called, *(one.x for one in arrays), *others)
        return y, (residuals, others)

    def backward(residuals: PyTree, cotangent: PyTree) -> tuple[PyTree, PyTree]:
        (arrays, others), cotangent = _once((residuals, cotangent))
        # Widened when the gradient is there, not before; and weights that lie cut over devices are
        # gathered again, as `jax.checkpoint` does, not held from the forward pass on.
        lows, others, cotangent = lax.optimization_barrier(
            ([one.low for one in arrays], others, cotangent)
        )
        arrays = [Saved(one.x, low) for one, low in zip(arrays, lows, strict=True)]
        read = [one.x if one.low is None else one.restored() for one in arrays]

        def pulled(values: tuple[PyTree, ...], cotangent: PyTree) -> tuple[PyTree, ...]:
            return jax.vjp(called, *values)[1](cotangent)

        # A program of its own, inlined: else names of operations would begin with their path twice.
        found = jax.jit(pulled, inline=True)((*read, *others), cotangent)
        return tuple(map(Saved, found[:count])), found[count:]

    run.defvjp(forward, backward)
    return run(saved, others)
