"""Softmax and log-sum-exp whose sums do not overflow float16.

In float16 the exponentials are float16, while their sum and what is computed from it (quotient,
logarithm and both gradients) are float32: in float16, 65536 equal terms add up to inf, and the
quotient by it is 0. Other dtypes go to `jax.nn` as they are.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mpjax.precision import sum_dtype
from mpjax.typing import Array, DTypeLike


def _powers(x: Array, compute: DTypeLike) -> tuple[Array, Array, Array]:
    """max x, e^(x - max x) in the compute dtype and then float32, and their sum."""
    top = jnp.max(x, axis=-1, keepdims=True)
    powers = jnp.exp((x - top).astype(compute)).astype(jnp.float32)
    return top, powers, jnp.sum(powers, axis=-1, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax(x: Array, compute: DTypeLike) -> Array:
    _, powers, total = _powers(x, compute)
    return (powers / total).astype(compute)


@_softmax.defjvp
def _softmax_jvp(
    compute: DTypeLike, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    y = _softmax(*primals, compute)
    wide = y.astype(jnp.float32)
    terms = wide * tangents[0].astype(jnp.float32)
    return y, (terms - wide * jnp.sum(terms, axis=-1, keepdims=True)).astype(compute)


def softmax(x: Array, compute: DTypeLike) -> Array:
    r"""Returns $e^{x_i} / \sum_j e^{x_j}$ along the last axis, in the compute dtype.

    Args:
      x: (..., S) in `sum_dtype(compute)`, in which the maximum is subtracted.
      compute: dtype of the powers and of the result.

    Example:
      >>> softmax(jnp.zeros(2**17), jnp.float16)[0].item() == 2.0**-17
      True
    """
    return _softmax(x, compute) if compute == jnp.float16 else jax.nn.softmax(x, axis=-1)


@jax.custom_jvp
def _log_sum_exp(x: Array) -> Array:
    top, _, total = _powers(x, x.dtype)
    return (jnp.log(total) + top.astype(jnp.float32))[..., 0]


@_log_sum_exp.defjvp
def _log_sum_exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    _, powers, total = _powers(primals[0], primals[0].dtype)
    terms = powers / total * tangents[0].astype(jnp.float32)
    return _log_sum_exp(*primals), jnp.sum(terms, axis=-1)


def log_sum_exp(x: Array) -> Array:
    r"""Returns $\log \sum_j e^{x_j}$ along the last axis, in `sum_dtype` of that of x.

    Args:
      x: (..., V).

    Example:
      >>> round(float(jnp.exp2(log_sum_exp(jnp.zeros(2**17, jnp.float16)) / jnp.log(2.0))), -1)
      131070.0
    """
    if x.dtype != jnp.float16:
        return jax.nn.logsumexp(x, axis=-1).astype(sum_dtype(x.dtype))
    return _log_sum_exp(x)
