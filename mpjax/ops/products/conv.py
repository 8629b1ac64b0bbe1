"""Convolutions under a recipe, and those of images under a policy with float32 weight gradients.

Shapes: N images, H height, W width, C inputs, F outputs, K kernel size; h, w of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jmp
from jax import lax
from jaxtyping import Array, Float

from mpjax.errors import ConfigError, brief
from mpjax.formats import widest
from mpjax.formats.checks import as_array
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops.checks import Axes, float_dtype
from mpjax.ops.products.dot_general import ProductSpec, Scales, product
from mpjax.ops.products.quantized_operand import QuantizedOperand, opened
from mpjax.precision import Recipe, get_recipe
from mpjax.typing import ArrayLike, DType, DTypeLike, Key

Pads = tuple[tuple[int, int], ...]
_Strides = tuple[int, int]
_Residuals = tuple[Array, Array, Array]  # x, kernel, an empty array of the dtype of x


class Conv(NamedTuple):
    """`lax.conv_general_dilated`; see `mpjax.ops.products.dot_general.Bilinear`.

    Args:
      strides: of the window.
      padding: (before, after) of each spatial axis.
      dilations: of input and kernel.
      numbers: which axis is what.
      groups: of features.
    """

    strides: Axes
    padding: Pads
    dilations: tuple[Axes, Axes]
    numbers: lax.ConvDimensionNumbers
    groups: int

    def _apply(self, x: Array, w: Array) -> Array:
        return lax.conv_general_dilated(
            x.astype(jnp.float32), w.astype(jnp.float32), self.strides, self.padding,
            lhs_dilation=self.dilations[0], rhs_dilation=self.dilations[1],
            dimension_numbers=self.numbers, feature_group_count=self.groups,
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def axes(self, x: Array, w: Array) -> tuple[tuple[Axes, Axes], ...]:
        """See `Bilinear`; blocks lie along the last axis, the features where they are summed."""
        n, f, *space = self.numbers.lhs_spec
        out, into, *window = self.numbers.rhs_spec
        m, g, *places = self.numbers.out_spec
        return (
            ((*space, f), (*window, into)),
            ((*places, g), (*window, out)),
            ((n, *space), (m, *places)),
        )

    def fprop(self, x: QuantizedOperand, w: QuantizedOperand, recipe: Recipe) -> Array:
        """The result, float32."""
        return self._apply(opened(x), opened(w))

    def dgrad(self, dy: QuantizedOperand, w: QuantizedOperand, recipe: Recipe, x: Array) -> Array:
        """The gradient of x: the convolution is linear in it."""
        return _transposed(lambda x: self._apply(x, opened(w)), x, dy)

    def wgrad(self, x: QuantizedOperand, dy: QuantizedOperand, recipe: Recipe, w: Array) -> Array:
        """The gradient of the kernel: the convolution is linear in it."""
        return _transposed(lambda w: self._apply(opened(x), w), w, dy)


def _transposed(function: Callable[[Array], Array], like: Array, dy: QuantizedOperand) -> Array:
    whole = jax.ShapeDtypeStruct(like.shape, jnp.float32)
    return jax.linear_transpose(function, whole)(opened(dy).astype(jnp.float32))[0]


def conv_general_dilated(
    x: ArrayLike,
    kernel: ArrayLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    recipe: str | Recipe,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = ("NHWC", "HWIO", "NHWC"),
    feature_group_count: int = 1,
    key: Key | None = None,
    amax: AmaxHistory | None = None,
    compute_dtype: DTypeLike | None = None,
    preferred_element_type: DTypeLike | None = None,
    where: str = "conv_general_dilated",
    scales: Scales = (None, None),
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
      scales: of x and the kernel, numbers, where tensors are scaled as a whole and they are known.

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
        sides = ((x.shape, numbers.lhs_spec), (kernel.shape, numbers.rhs_spec))
        dilated = [
            [(shape[d] - 1) * step + 1 for d, step in zip(spec[2:], steps, strict=True)]
            for (shape, spec), steps in zip(sides, dilations, strict=True)
        ]
        padding = lax.padtype_to_pads(dilated[0], dilated[1], window_strides, padding)
    op = Conv(
        tuple(window_strides), tuple((int(a), int(b)) for a, b in padding), dilations, numbers,
        feature_group_count,
    )  # fmt: skip
    y, amax = product(x, kernel, ProductSpec(op, recipe, compute, output, where), key, amax, scales)
    return y if amax is None else (y, amax)


def _same(sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> Pads:
    """`SAME` padding: ceil(size / stride) results; an odd zero is added at the end."""
    return tuple(lax.padtype_to_pads(sizes, kernel, strides, "SAME"))


def _convolve(
    a: Array, b: Array, numbers: tuple[str, str, str], pads: Pads, out: DType, *,
    strides: _Strides = (1, 1), lhs_dilation: _Strides = (1, 1), rhs_dilation: _Strides = (1, 1),
) -> Array:  # fmt: skip
    """float32 operands are multiplied as float32 on every platform."""
    full = lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
    return lax.conv_general_dilated(
        a, b, strides, pads, lhs_dilation, rhs_dilation, dimension_numbers=numbers, precision=full,
        preferred_element_type=out,
    )  # fmt: skip


def _forward(
    x_NHWC: Array, w: Array, policy: jmp.Policy, gradient_dtype: DType, strides: _Strides
) -> Array:
    del gradient_dtype  # of the backward pass
    compute = policy.compute_dtype
    out = widest(compute, policy.output_dtype)  # the product loses no bits of the output dtype
    pads = _same(x_NHWC.shape[1:3], w.shape[:2], strides)
    y = _convolve(
        x_NHWC.astype(compute), w.astype(compute), ("NHWC", "HWIO", "NHWC"), pads, out,
        strides=strides,
    )  # fmt: skip
    return y.astype(policy.output_dtype)


def _forward_with_residuals(
    x: Array, w: Array, policy: jmp.Policy, gradient_dtype: DType, strides: _Strides
) -> tuple[Array, _Residuals]:
    y = _forward(x, w, policy, gradient_dtype, strides)
    # The residual is x in the compute dtype; the cast of the kernel is repeated, to save memory.
    return y, (x.astype(policy.compute_dtype), w, jnp.zeros(0, x.dtype))


def _backward(
    policy: jmp.Policy, gradient_dtype: DType, strides: _Strides, residuals: _Residuals, dy: Array
) -> tuple[Array, Array]:
    # JAX's own rules emit both gradients in the dtype of the operands, and refuse operands whose
    # dtype differs from that of the result; so the two convolutions are written out.
    x, w, like = residuals
    compute = policy.compute_dtype
    dy = dy.astype(compute)
    sizes, kernel = x.shape[1:3], w.shape[:2]
    spread = tuple((n - 1) * s + 1 for n, s in zip(dy.shape[1:3], strides, strict=True))
    pads = _same(sizes, kernel, strides)

    axes = list(zip(sizes, kernel, spread, pads, strict=True))
    edges = tuple((k - 1 - low, size - wide + low) for size, k, wide, (low, _) in axes)
    turned = w.astype(compute)[::-1, ::-1]
    dx = _convolve(
        dy, turned, ("NHWC", "HWOI", "NHWC"), edges, widest(compute, like.dtype),
        lhs_dilation=strides,
    )  # fmt: skip

    # The weight gradient leaves in float32, so that a sum over replicas behind it is float32 too.
    edges = tuple((low, k - 1 - size - low + wide) for size, k, wide, (low, _) in axes)
    dw = _convolve(
        x, dy, ("CHWN", "IHWO", "HWNC"), edges, widest(compute, gradient_dtype),
        rhs_dilation=strides,
    )  # fmt: skip
    return dx.astype(like.dtype), dw.astype(w.dtype)


_convolution = jax.custom_vjp(_forward, nondiff_argnums=(2, 3, 4))
_convolution.defvjp(_forward_with_residuals, _backward)


def convolution(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "K K2 C F"],
    policy: jmp.Policy,
    *,
    strides: tuple[int, int] = (1, 1),
    gradient_dtype: DTypeLike = jnp.float32,
    recipe: Recipe | None = None,
    key: Key | None = None,
    amax: AmaxHistory | None = None,
    where: str = "convolution",
    scales: Scales = (None, None),
) -> Any:
    r"""Convolves images with a kernel under a policy, zeros around (`SAME`).

    $$y_{hwf} = \sum_{ijc} x_{sh + i - p,\, sw + j - q,\, c} K_{ijcf}$$

    Operands are cast to the compute dtype, the result to the output dtype; the convolution emits
    the wider of the two. So `c=bf16,o=f32` is X32 * K16 -> Y32 and `c=bf16,o=bf16` is
    X16 * K16 -> Y16. $\partial L/\partial x$ has the dtype of x. $\partial L/\partial K$ leaves its
    convolution in at least `gradient_dtype` and then takes the dtype of the kernel.

    Args:
      x: images (N, H, W, C).
      kernel: (height, width, C, F).
      policy: only compute and output dtype are used.
      strides: s, down and across.
      gradient_dtype: dtype in which weight gradients are summed over images and replicas.
      recipe: how the operands are quantised, or None; see `conv_general_dilated`.
      key: random key, for recipes that draw.
      amax: state of delayed scaling.
      where: path of the module, for errors.
      scales: as in `conv_general_dilated`.

    Returns:
      (N, ceil(H / s), ceil(W / s), F) in the output dtype; with delayed scaling `(y, amax)`.

    Raises:
      ConfigError: a recipe that convolutions do not take.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> x, k = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4))
      >>> y = convolution(x, k, parse_policy("c=bf16,o=f32"), strides=(2, 2))
      >>> y.shape, y.dtype.name, y[0, 0, :, 0].tolist()
      ((1, 3, 3, 4), 'float32', [8.0, 12.0, 8.0])

    References:
      Micikevicius et al. 2018, Mixed Precision Training, section 3.3 (float32 accumulation).
    """
    if recipe is None:
        return _convolution(x, kernel, policy, jnp.dtype(gradient_dtype), strides)
    return conv_general_dilated(
        x, kernel, strides, "SAME", recipe, key=key, amax=amax, where=where, scales=scales,
        compute_dtype=policy.compute_dtype, preferred_element_type=policy.output_dtype,
    )  # fmt: skip
