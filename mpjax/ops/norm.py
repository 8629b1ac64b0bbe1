"""LayerNorm, RMSNorm and GroupNorm; statistics in the compute dtype, of float16 in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import jmp
from jax import lax
from jaxtyping import Array, Float

from mpjax.ops.checks import Axes
from mpjax.ops.linear import scale_by, shift_by
from mpjax.precision import sum_dtype
from mpjax.typing import DType, DTypeLike

_Residuals = tuple[Array, Array | None, Array]  # x, mean, 1 / deviation


def _statistics(
    x: Array, compute: DType, centre: bool, epsilon: float, axes: Axes
) -> tuple[Array, Array | None, Array]:
    # float16 overflows in the square of 256, in a difference of two of its numbers, and in the
    # reciprocal of a subnormal deviation
    x = x.astype(sum_dtype(compute))
    mean = jnp.mean(x, axis=axes, keepdims=True) if centre else None
    centred = x if mean is None else x - mean
    inverse = lax.rsqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True) + epsilon)
    return centred * inverse, mean, inverse


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _normalise(x: Array, compute: DType, centre: bool, epsilon: float, axes: Axes) -> Array:
    return _statistics(x, compute, centre, epsilon, axes)[0].astype(compute)


def _normalise_fwd(
    x: Array, compute: DType, centre: bool, epsilon: float, axes: Axes
) -> tuple[Array, _Residuals]:
    y, mean, inverse = _statistics(x, compute, centre, epsilon, axes)
    return y.astype(compute), (x, mean, inverse)  # x in its own dtype: no float32 copy is kept


def _normalise_bwd(
    compute: DType, centre: bool, epsilon: float, axes: Axes, residuals: _Residuals, dy: Array
) -> tuple[Array]:
    # dx = (dy - mean(dy) - y mean(dy y)) / sigma. Differentiating the rsqrt instead would form
    # sigma^-3, which overflows float16 once sigma is below 0.025.
    x, mean, inverse = residuals
    wide = sum_dtype(compute)
    centred = x.astype(wide) if mean is None else x.astype(wide) - mean
    y, dy = centred * inverse, dy.astype(wide)
    dx = dy - y * jnp.mean(dy * y, axis=axes, keepdims=True)
    if centre:
        dx = dx - jnp.mean(dy, axis=axes, keepdims=True)
    return ((dx * inverse).astype(x.dtype),)


_normalise.defvjp(_normalise_fwd, _normalise_bwd)


def norm(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    policy: jmp.Policy,
    *,
    centre: bool,
    epsilon: float = 1e-5,
    gradient_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "... D"]:
    r"""Normalises the last axis, $y = \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta$.

    RMSNorm leaves out $\mu$, so that $\sigma^2$ is the mean square.

    Args:
      x: (..., D).
      scale: $\gamma$, (D,).
      bias: $\beta$, (D,) or None.
      policy: normalised, scaled and shifted in its compute dtype; the statistics of float16 are
        float32, as in torch and Apex. The result has its output dtype.
      centre: True for LayerNorm, False for RMSNorm.
      epsilon: $\epsilon$.
      gradient_dtype: dtype in which the gradients of scale and bias are summed.

    Returns:
      (..., D) in the output dtype.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> x = jnp.array([[100.0, 102.0]], jnp.bfloat16)
      >>> policy = parse_policy("c=f32,o=bf16")
      >>> norm(x, jnp.ones(2), None, policy, centre=True).tolist()
      [[-1.0, 1.0]]

    References:
      Ba et al. 2016, Layer Normalization; Zhang and Sennrich 2019, RMSNorm.
    """
    y = _normalise(x, jnp.dtype(policy.compute_dtype), centre, epsilon, (-1,))
    y = scale_by(y, scale, gradient_dtype)
    if bias is not None:
        y = shift_by(y, bias, gradient_dtype)
    return y.astype(policy.output_dtype)


def group_norm(
    x: Float[Array, "N H W C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    policy: jmp.Policy,
    *,
    groups: int,
    epsilon: float = 1e-5,
    gradient_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "N H W C"]:
    r"""Normalises each image over space and groups of channels, then scales and shifts channels.

    $$y = \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta$$ with $\mu$ and $\sigma$ over
    height, width and the C / G channels of a group.

    Args:
      x: images.
      scale: $\gamma$, one a channel.
      bias: $\beta$, one a channel.
      policy: as of `norm`.
      groups: G, a divisor of C.
      epsilon: $\epsilon$.
      gradient_dtype: dtype in which the gradients of scale and bias are summed.

    Returns:
      Images in the output dtype.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> x = jnp.array([[[[1.0, 3.0, 10.0, 30.0]]]])
      >>> y = group_norm(x, jnp.ones(4), jnp.zeros(4), parse_policy("f32"), groups=2)
      >>> y.round(3).ravel().tolist()
      [-1.0, 1.0, -1.0, 1.0]

    References:
      Wu and He 2018, Group Normalization.
    """
    N, H, W, C = x.shape
    x = x.reshape(N, H, W, groups, C // groups)
    y = _normalise(x, jnp.dtype(policy.compute_dtype), True, epsilon, (1, 2, 4))
    y = scale_by(y.reshape(N, H, W, C), scale, gradient_dtype)
    return shift_by(y, bias, gradient_dtype).astype(policy.output_dtype)
