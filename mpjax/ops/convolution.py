"""Convolutions of images under a policy, whose weight gradients are float32.

Shapes: N images, H height, W width, C inputs, F outputs, K kernel size; h, w of the result.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jmp
from jax import lax
from jaxtyping import Array, Float

from mpjax.formats.delayed import AmaxHistory
from mpjax.ops.conv import conv_general_dilated
from mpjax.precision import Recipe, wider

Pads = tuple[tuple[int, int], ...]


def _pads(sizes: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...]) -> Pads:
    """`SAME`: ceil(size / stride) results, the odd zero behind."""
    return tuple(
        (total // 2, total - total // 2)
        for size, k, s in zip(sizes, kernel, strides, strict=True)
        for total in [max((-(-size // s) - 1) * s + k - size, 0)]
    )


def _convolve(
    a: Any, b: Any, numbers: tuple[str, str, str], pads: Pads, out: Any, *,
    strides: Any = (1, 1), **dilation: Any,
) -> Any:  # fmt: skip
    """float32 operands are multiplied as float32 on every platform."""
    full = lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
    return lax.conv_general_dilated(
        a, b, strides, pads, dimension_numbers=numbers, precision=full, preferred_element_type=out,
        **dilation,
    )  # fmt: skip


def _forward(x_NHWC: Any, w: Any, policy: jmp.Policy, gradient_dtype: Any, strides: Any) -> Any:
    del gradient_dtype  # of the backward pass
    compute = policy.compute_dtype
    out = wider(compute, policy.output_dtype)  # never emit less than is asked for
    pads = _pads(x_NHWC.shape[1:3], w.shape[:2], strides)
    y = _convolve(
        x_NHWC.astype(compute), w.astype(compute), ("NHWC", "HWIO", "NHWC"), pads, out,
        strides=strides,
    )  # fmt: skip
    return y.astype(policy.output_dtype)


def _forward_kept(x: Any, w: Any, policy: Any, gradient_dtype: Any, strides: Any) -> Any:
    y = _forward(x, w, policy, gradient_dtype, strides)
    # x is kept as the convolution used it; the weight's cast is repeated, which costs no memory.
    return y, (x.astype(policy.compute_dtype), w, jnp.zeros(0, x.dtype))


def _backward(policy: Any, gradient_dtype: Any, strides: Any, residuals: Any, dy: Any) -> Any:
    # JAX's own rules would emit both gradients in the dtype of the operands, and refuse operands
    # that differ from the result; so the two convolutions are written out.
    x, w, like = residuals
    compute = policy.compute_dtype
    dy = dy.astype(compute)
    sizes, kernel = x.shape[1:3], w.shape[:2]
    spread = tuple((n - 1) * s + 1 for n, s in zip(dy.shape[1:3], strides, strict=True))
    pads = _pads(sizes, kernel, strides)

    edges = tuple(
        (k - 1 - before, size - wide + before)
        for size, k, wide, (before, _) in zip(sizes, kernel, spread, pads, strict=True)
    )
    turned = w.astype(compute)[::-1, ::-1]
    dx = _convolve(
        dy, turned, ("NHWC", "HWOI", "NHWC"), edges, wider(compute, like.dtype),
        lhs_dilation=strides,
    )  # fmt: skip

    # The weight gradient leaves in float32, so that a sum over replicas behind it is float32 too.
    edges = tuple(
        (before, k - 1 - size - before + wide)
        for size, k, wide, (before, _) in zip(sizes, kernel, spread, pads, strict=True)
    )
    dw = _convolve(
        x, dy, ("CHWN", "IHWO", "HWNC"), edges, wider(compute, gradient_dtype),
        rhs_dilation=strides,
    )  # fmt: skip
    return dx.astype(like.dtype), dw.astype(w.dtype)


_convolution = jax.custom_vjp(_forward, nondiff_argnums=(2, 3, 4))
_convolution.defvjp(_forward_kept, _backward)


def convolution(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "K K2 C F"],
    policy: jmp.Policy,
    *,
    strides: tuple[int, int] = (1, 1),
    gradient_dtype: Any = jnp.float32,
    recipe: Recipe | None = None,
    key: Any = None,
    amax: AmaxHistory | None = None,
    where: str = "convolution",
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
        x, kernel, strides, _pads(x.shape[1:3], kernel.shape[:2], strides), recipe, key=key,
        amax=amax, compute_dtype=policy.compute_dtype, preferred_element_type=policy.output_dtype,
        where=where,
    )  # fmt: skip
