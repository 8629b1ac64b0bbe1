"""Convolutions under a Recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import as_array
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops.bilinear import ProductSpec
from mpjax.ops.checks import Axes, float_dtype
from mpjax.ops.product import product
from mpjax.ops.quantized import QuantizedOperand, opened
from mpjax.precision import Recipe, get_recipe


class Conv(NamedTuple):
    """`lax.conv_general_dilated`; see `mpjax.ops.bilinear.Bilinear`.

    Args:
      strides: of the window.
      padding: (before, after) of each spatial axis.
      dilations: of input and kernel.
      numbers: which axis is what.
      groups: of features.
    """

    strides: Axes
    padding: tuple[tuple[int, int], ...]
    dilations: tuple[Axes, Axes]
    numbers: lax.ConvDimensionNumbers
    groups: int

    def _apply(self, x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x.astype(jnp.float32), w.astype(jnp.float32), self.strides, self.padding,
            lhs_dilation=self.dilations[0], rhs_dilation=self.dilations[1],
            dimension_numbers=self.numbers, feature_group_count=self.groups,
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def axes(self, x: Any, w: Any) -> tuple[tuple[Axes, Axes], ...]:
        """Axes that each product sums over; blocks lie along the last: features, if summed."""
        n, f, *space = self.numbers.lhs_spec
        out, into, *window = self.numbers.rhs_spec
        m, g, *places = self.numbers.out_spec
        return (
            ((*space, f), (*window, into)),
            ((*places, g), (*window, out)),
            ((n, *space), (m, *places)),
        )

    def fprop(self, x: QuantizedOperand, w: QuantizedOperand, recipe: Recipe) -> Any:
        """The result, float32."""
        return self._apply(opened(x), opened(w))

    def dgrad(self, dy: QuantizedOperand, w: QuantizedOperand, recipe: Recipe, x: Any) -> Any:
        """The gradient of x: the convolution is linear in it."""
        whole = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        pull = jax.linear_transpose(lambda x: self._apply(x, opened(w)), whole)
        return pull(opened(dy).astype(jnp.float32))[0]

    def wgrad(self, x: QuantizedOperand, dy: QuantizedOperand, recipe: Recipe, w: Any) -> Any:
        """The gradient of the kernel: the convolution is linear in it."""
        whole = jax.ShapeDtypeStruct(w.shape, jnp.float32)
        pull = jax.linear_transpose(lambda w: self._apply(opened(x), w), whole)
        return pull(opened(dy).astype(jnp.float32))[0]


def conv_general_dilated(
    x: Any,
    kernel: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    recipe: str | Recipe,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = ("NHWC", "HWIO", "NHWC"),
    feature_group_count: int = 1,
    key: Any = None,
    amax: AmaxHistory | None = None,
    compute_dtype: Any = None,
    preferred_element_type: Any = None,
    where: str = "conv_general_dilated",
) -> Any:
    """`lax.conv_general_dilated` with operands, and those of both gradients, quantised.

    It is emulated on every platform: a float32 convolution of the dequantised operands. Scales by
    row are one an image (x, forward), one a channel (kernel, and both operands of wgrad); blocks
    lie along the channels where a product sums over them, else along the last spatial axis.

    Args:
      x: images, laid out by dimension_numbers.
      kernel: laid out by dimension_numbers.
      window_strides: one a spatial axis.
      padding: `SAME`, `VALID` or (before, after) of each spatial axis.
      recipe: a Recipe or its name; none with a Hadamard transform or a running sum to be rounded.
      lhs_dilation: of x.
      rhs_dilation: of the kernel.
      dimension_numbers: as in `lax.conv_general_dilated`; NHWC and HWIO by default.
      feature_group_count: groups of channels.
      key: random key, for recipes that draw.
      amax: state of delayed scaling.
      compute_dtype: of operands that the recipe does not quantise; by default the dtype of x.
      preferred_element_type: of the result; by default the dtype of x.
      where: what to call the convolution in an error.

    Returns:
      The result; with delayed scaling `(result, amax)`.

    Raises:
      ConfigError: a recipe that convolutions do not take, and what `dot_general` raises.

    Example:
      >>> x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
      >>> conv_general_dilated(x, k, (1, 1), "VALID", "fp8").shape
      (1, 2, 2, 5)
    """
    recipe = get_recipe(recipe, where)
    if recipe.hadamard or recipe.accumulate != "float32":
        what = "a Hadamard transform" if recipe.hadamard else f"sums in {recipe.accumulate}"
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} has {what}, which a convolution does not take, since"
            " its operands meet at shifted places; use mxfp8, fp8 or another without"
        )
    x, kernel = as_array(x, f"{where}: x"), as_array(kernel, f"{where}: kernel")
    compute = float_dtype(compute_dtype, x.dtype, f"{where}: compute_dtype")
    output = float_dtype(preferred_element_type, x.dtype, f"{where}: preferred_element_type")
    if isinstance(window_strides, tuple | list) and not all(window_strides):
        raise ConfigError(f"{where}: window_strides={window_strides}; take strides of 1 or more")
    try:
        jax.eval_shape(
            lambda x, kernel: lax.conv_general_dilated(
                x, kernel.astype(x.dtype), window_strides, padding, lhs_dilation, rhs_dilation,
                dimension_numbers, feature_group_count,
            ),
            x,
            kernel,
        )  # fmt: skip
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ConfigError(
            f"{where}: {error}; x has shape {x.shape} and the kernel {kernel.shape}, laid out by"
            f" dimension_numbers={brief(dimension_numbers)}"
        ) from None
    space = x.ndim - 2
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    dilations = tuple(lhs_dilation or (1,) * space), tuple(rhs_dilation or (1,) * space)
    if isinstance(padding, str):
        spans = [
            [(shape[d] - 1) * step + 1 for d, step in zip(spec[2:], steps, strict=True)]
            for shape, spec, steps in (
                (x.shape, numbers.lhs_spec, dilations[0]),
                (kernel.shape, numbers.rhs_spec, dilations[1]),
            )
        ]
        padding = lax.padtype_to_pads(spans[0], spans[1], window_strides, padding)
    op = Conv(
        tuple(window_strides), tuple((int(a), int(b)) for a, b in padding), dilations, numbers,
        feature_group_count,
    )  # fmt: skip
    y, amax = product(x, kernel, ProductSpec(op, recipe, compute, output, where), key, amax)
    return y if amax is None else (y, amax)
