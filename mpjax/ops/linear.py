"""Matrix products, scales, shifts and look-ups whose weight gradients are float32.

Shapes: N tokens (all leading axes), D inputs, F outputs, V rows of a table.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jmp
from jax import lax
from jaxtyping import Array, Float, Int

from mpjax.formats import widest
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops.products.dot import add_parts, dot
from mpjax.ops.products.dot_general import Dot, ProductSpec, Scales, Sums, product
from mpjax.precision import Recipe, sum_dtype
from mpjax.typing import DType, DTypeLike, Key

_ROWS = 2**17  # whose gradients are added to a table at a time: 64 MiB of float32 on a TPU
_Residuals = tuple[Array, Array, Array]  # x, W, an empty array of the dtype of x


def _dot(a: Array, b: Array, contract: tuple[int, int], out: DType) -> Array:
    """2-D product."""
    return dot(a, b, (((contract[0],), (contract[1],)), ((), ())), out)


def _multiply(
    x_ND: Array, w: Array, policy: jmp.Policy, gradient_dtype: DType, tied: bool
) -> Array:
    del gradient_dtype  # of the backward pass
    compute = policy.compute_dtype
    out = widest(compute, policy.output_dtype)  # the product loses no bits of the output dtype
    y = _dot(x_ND.astype(compute), w.astype(compute), (1, int(tied)), out)
    return y.astype(policy.output_dtype)


def _product_fwd(
    x_ND: Array, w: Array, policy: jmp.Policy, gradient_dtype: DType, tied: bool
) -> tuple[Array, _Residuals]:
    # Not _product: a remat policy that saves products must see the product itself.
    y = _multiply(x_ND, w, policy, gradient_dtype, tied)
    # The residual is x in the compute dtype; the cast of W is repeated, to save memory.
    return y, (x_ND.astype(policy.compute_dtype), w, jnp.zeros(0, x_ND.dtype))


def _product_bwd(
    policy: jmp.Policy, gradient_dtype: DType, tied: bool, residuals: _Residuals, dy_NF: Array
) -> tuple[Array, Array]:
    x_ND, w, like = residuals
    compute = policy.compute_dtype
    dy_NF = dy_NF.astype(compute)
    dx = _dot(dy_NF, w.astype(compute), (1, int(not tied)), widest(compute, like.dtype))
    # The weight gradient leaves its product in float32: a sum over replicas that XLA places
    # behind this product is then float32 too (a bfloat16 product would be summed in bfloat16).
    wide = widest(compute, gradient_dtype)
    dw = _dot(dy_NF, x_ND, (0, 0), wide) if tied else _dot(x_ND, dy_NF, (0, 0), wide)
    return dx.astype(like.dtype), dw.astype(w.dtype)


_product = jax.custom_vjp(_multiply, nondiff_argnums=(2, 3, 4))
_product.defvjp(_product_fwd, _product_bwd)


def linear(
    x: Float[Array, "... D"],
    kernel: Float[Array, "D F"],
    policy: jmp.Policy,
    *,
    gradient_dtype: DTypeLike = jnp.float32,
    transposed: bool = False,
    recipe: Recipe | None = None,
    key: Key | None = None,
    amax: AmaxHistory | None = None,
    where: str = "linear",
    sums: Sums | None = None,
    scales: Scales = (None, None),
) -> Any:
    r"""Multiplies by a matrix under a policy, $y = x W$.

    Operands are cast to the compute dtype, the result to the output dtype; the product emits the
    wider of the two. $\partial L/\partial x$ has the dtype of x. $\partial L/\partial W$ leaves
    its product in at least `gradient_dtype` and then takes the dtype of W.

    Args:
      x: (..., D).
      kernel: (D, F), or (F, D) when transposed.
      policy: only compute and output dtype are used.
      gradient_dtype: dtype in which weight gradients are summed over tokens and replicas.
      transposed: whether kernel is (F, D), as a tied embedding table.
      recipe: how the product is quantised, or None; weight gradients of a quantised product are
        summed in float32.
      key: random key, for recipes that draw.
      amax: state of delayed scaling.
      where: path of the module, for errors.
      sums: how devices hold the terms of sums under a recipe; None on one device.
      scales: of x and the kernel, numbers, where tensors are scaled as a whole and they are known.

    Returns:
      (..., F) in the output dtype; with delayed scaling `(y, amax)`.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> linear(jnp.ones((2, 3)), jnp.ones((3, 4)), parse_policy("c=bf16")).dtype.name
      'bfloat16'

    References:
      Micikevicius et al. 2018, Mixed Precision Training, section 3.3 (float32 accumulation).
    """
    x_ND = x.reshape(-1, x.shape[-1])  # 2-D products are faster than 3-D ones on CPU
    if recipe is None:
        y_NF = _product(x_ND, kernel, policy, jnp.dtype(gradient_dtype), transposed)
    else:
        dims = (((1,), (int(transposed),)), ((), ()))
        dtypes = jnp.dtype(policy.compute_dtype), jnp.dtype(policy.output_dtype)
        sums = sums and sums._replace(dtypes=dtypes[::-1])
        y_NF, amax = product(
            x_ND, kernel, ProductSpec(Dot(dims, sums), recipe, *dtypes, where), key, amax, scales
        )
    y = y_NF.reshape(*x.shape[:-1], y_NF.shape[-1])
    return y if amax is None else (y, amax)


def _sum_tokens(x: Array, gradient_dtype: DTypeLike, like: DType) -> Array:
    wide = x.astype(widest(x.dtype, gradient_dtype))
    return jnp.sum(wide, axis=tuple(range(x.ndim - 1))).astype(like)


def _row(vector: Array, like: Array) -> Array:
    """A vector as the last axis of an array, in its dtype."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale_by(
    x: Float[Array, "... D"], scale: Float[Array, " D"], gradient_dtype: DTypeLike
) -> Float[Array, "... D"]:
    """Returns x * scale in the dtype of x; the gradient of scale is summed in gradient_dtype."""
    return x * _row(scale, x)


def _scale_by_bwd(
    gradient_dtype: DTypeLike, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, scale = residuals
    wide = sum_dtype(dy.dtype)  # of the terms of the sum, too
    terms = dy.astype(wide) * x.astype(wide)
    return dy * _row(scale, dy), _sum_tokens(terms, gradient_dtype, scale.dtype)


scale_by.defvjp(lambda x, scale, dtype: (scale_by(x, scale, dtype), (x, scale)), _scale_by_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def shift_by(
    x: Float[Array, "... D"], bias: Float[Array, " D"], gradient_dtype: DTypeLike
) -> Float[Array, "... D"]:
    """Returns x + bias in the dtype of x; the gradient of bias is summed in gradient_dtype."""
    return x + _row(bias, x)


shift_by.defvjp(
    lambda x, bias, dtype: (shift_by(x, bias, dtype), jnp.zeros(0, bias.dtype)),
    lambda dtype, like, dy: (dy, _sum_tokens(dy, dtype, like.dtype)),
)


class TableCut(Protocol):
    """How several devices hold a table; hashable."""

    def whole(self, table: Array) -> Array:
        """The table with all of each row on a device."""

    def by_width(self, dy: Array) -> Array:
        """Gradients of rows, cut by width as the table is."""

    def every(self, ids: Array) -> Array:
        """The ids of these rows."""

    def replicas(self, rows: int) -> int:
        """How many devices with the same part of each row have rows of a batch of their own.

        0 where rows are not cut.
        """


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def look_up(
    table: Float[Array, "V D"],
    ids: Int[Array, "*N"],
    output_dtype: DTypeLike,
    gradient_dtype: DTypeLike,
    cut: TableCut | None = None,
) -> Float[Array, "*N D"]:
    """Returns rows of a table in the output dtype; their gradients are summed in gradient_dtype.

    An id outside of 0 .. V - 1 gives NaN.

    Args:
      table: V rows, as stored.
      ids: of rows.
      output_dtype: of the result.
      gradient_dtype: in which gradients of a row are summed.
      cut: how devices hold the table, None on one device. The table is brought together in the
        narrower one of its own and the output dtype, and the gradients of rows go in their own
        dtype to where the parts of the table are; no device has a gradient of all of it.
    """
    known = jnp.where(ids < 0, table.shape[0], ids)  # -1, often padding, is not the last row
    if cut is not None:
        narrow = jnp.dtype(output_dtype).itemsize < table.dtype.itemsize
        table = table.astype(output_dtype) if narrow else table
        # As bits: the compiler of TPUs would put the cast to float16 behind what brings it together
        low = table.dtype if table.dtype == jnp.float16 else None
        table = cut.whole(lax.bitcast_convert_type(table, jnp.uint16) if low else table)
        table = lax.bitcast_convert_type(table, low) if low else table
    return jnp.take(table, known, axis=0).astype(output_dtype)


def _look_up_bwd(
    output_dtype: DTypeLike,
    gradient_dtype: DTypeLike,
    cut: TableCut | None,
    residuals: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, None]:
    ids, like = residuals
    if cut is not None:
        dy, ids = cut.by_width(dy), cut.every(ids)
    wide = widest(dy.dtype, gradient_dtype)
    table = jnp.zeros(like.shape[1:], wide)
    replicas = 0 if cut is None or ids.ndim < 2 else cut.replicas(ids.shape[0])
    if not replicas:
        return table.at[ids].add(dy.astype(wide)).astype(like.dtype), None
    rows = (a.reshape(replicas, ids.size // replicas, *a.shape[ids.ndim :]) for a in (ids, dy))
    sums = jax.vmap(functools.partial(_add_rows, table))(*rows)
    return add_parts(sums).astype(like.dtype), None


def _add_rows(table: Array, ids: Array, rows: Array) -> Array:
    """The table plus rows (N, D), some at a time: a TPU takes at least 128 numbers for each."""
    count = len(ids)
    some = next(n for n in range(min(count, _ROWS), 0, -1) if count % n == 0)

    def add(table: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        return table.at[part[0]].add(part[1].astype(table.dtype)), None

    if some == count:
        return add(table, (ids, rows))[0]
    return lax.scan(add, table, (ids.reshape(-1, some), rows.reshape(-1, some, rows.shape[-1])))[0]


look_up.defvjp(
    lambda table, ids, out, dtype, cut: (
        look_up(table, ids, out, dtype, cut),
        (ids, jnp.zeros((0, *table.shape), table.dtype)),
    ),
    _look_up_bwd,
)
