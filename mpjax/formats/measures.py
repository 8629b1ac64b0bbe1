"""Error measures: what a quantisation did to an array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import as_array
from mpjax.formats.quantized import Quantized
from mpjax.formats.tiles import amax_of, per_tile, scale_down
from mpjax.typing import ArrayLike


def _nonzero(x: Array) -> Array:
    """Whether numbers are not zero; on bits, since compiled comparisons flush subnormals."""
    return (jax.lax.bitcast_convert_type(x, jnp.uint32) << jnp.uint32(1)) != 0


def _pair(x: ArrayLike, q: ArrayLike | Quantized, where: str) -> tuple[Array, Array]:
    """Both in float32, of one shape."""
    x = as_array(x, f"{where}: x").astype(jnp.float32)
    q = q.dequantize(jnp.float32) if isinstance(q, Quantized) else as_array(q, f"{where}: q")
    q = q.astype(jnp.float32)
    if x.shape != q.shape:
        raise ConfigError(f"{where}: x has shape {x.shape} and q {q.shape}; give what x became")
    return x, q


def sqnr(x: Float[Array, "*shape"], q: ArrayLike | Quantized) -> Float[Array, ""]:
    r"""Returns the signal-to-quantisation-noise ratio in dB, inf where nothing was lost.

    $$10 \log_{10} \frac{\sum x^2}{\sum (x - q)^2}$$

    Args:
      x: the array.
      q: what it became: a Quantized or an array.

    Raises:
      ConfigError: no arrays, or of two shapes; so in all measures.

    Example:
      >>> f"{sqnr(jnp.array([1.0, 1.0]), jnp.array([1.0, 0.9])):.2f} dB"
      '23.01 dB'
    """
    wide, became = _pair(x, q, "sqnr")
    # normalised before squaring: squares of small gradients would flush to zero
    size = jnp.maximum(jnp.max(jnp.abs(wide)), jnp.float32(2.0**-126))
    noise = jnp.sum(jnp.square((wide - became) / size))
    ratio = 10 * jnp.log10(jnp.sum(jnp.square(wide / size)) / noise)
    return jnp.where(noise == 0, jnp.float32(jnp.inf), ratio)


def max_error(x: Float[Array, "*shape"], q: ArrayLike | Quantized) -> Float[Array, ""]:
    """Returns the largest absolute error, NaN where one is.

    Example:
      >>> max_error(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.5])).item()
      0.5
    """
    wide, became = _pair(x, q, "max_error")
    error = wide - became
    return amax_of(error, error.shape).reshape(())


def underflow_rate(x: Float[Array, "*shape"], q: ArrayLike | Quantized) -> Float[Array, ""]:
    """Returns the share of numbers that were not zero and became zero.

    Example:
      >>> underflow_rate(jnp.array([0.0, 1e-3, 1.0, 2.0]), jnp.array([0.0, 0.0, 1.0, 2.0])).item()
      0.25
    """
    wide, became = _pair(x, q, "underflow_rate")
    lost = _nonzero(wide) & ~_nonzero(became)
    return jnp.mean(lost.astype(jnp.float32))


def saturation_rate(x: Float[Array, "*shape"], q: Quantized) -> Float[Array, ""]:
    """Returns the share of numbers that lie beyond the format's largest at their scale.

    Example:
      >>> from mpjax.formats import quantize
      >>> x = jnp.array([1.0, 600.0])
      >>> saturation_rate(x, quantize(x, "e4m3", "none")).item()
      0.5
    """
    if not isinstance(q, Quantized):
        raise ConfigError(f"saturation_rate: q is {brief(q)}; give what mpjax.quantize returned")
    wide, _ = _pair(x, q, "saturation_rate")
    if q.offsets is not None:
        wide = per_tile(wide, q.offsets, q.tile, lambda x, m: x - m)
    over = scale_down(wide, q.full_scales, q.tile)
    largest = float(jnp.finfo(jnp.float32).max)
    slack = 1 + 2.0**-21  # the scale and x / scale are rounded
    low, high = max(q.format.min * slack, -largest), min(q.format.max * slack, largest)
    beyond = (over > high) | (over < low)
    return jnp.mean(beyond.astype(jnp.float32))
