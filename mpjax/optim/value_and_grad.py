"""Loss and unscaled float32 gradients through a loss scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mpjax.optim.gate import all_finite


def scaled_value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any, Any]]:
    r"""Transforms a loss into one that returns value, unscaled gradients and their finiteness.

    $$g = \frac{1}{s} \nabla_\theta\,(s\,L(\theta))$$ The product with $s$ is taken in float32, so
    the scale enters the backward pass as its first cotangent.

    Args:
      loss_fn: `loss_fn(params, *args) -> loss` or `(loss, aux)`; a scalar loss.
      has_aux: whether it returns `(loss, aux)`.

    Returns:
      `fn(loss_scale, params, *args) -> (value, grads, finite)`; value is the loss in float32, or
      `(loss, aux)`; grads are float32 with the structure of params; finite is a bool scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from mpjax.optim import StaticLossScale
      >>> fn = scaled_value_and_grad(lambda w: jnp.sum(w * w))
      >>> loss, grads, finite = fn(StaticLossScale(1024.0), jnp.ones(2, jnp.float16))
      >>> loss.item(), grads.dtype.name, grads.tolist(), finite.item()
      (2.0, 'float32', [2.0, 2.0], True)

    References:
      Micikevicius et al. 2018, Mixed Precision Training, section 3.2.
    """

    def fn(loss_scale: Any, params: Any, *args: Any) -> tuple[Any, Any, Any]:
        def scaled(params: Any) -> tuple[Any, Any]:
            out = loss_fn(params, *args)
            loss = out[0] if has_aux else out
            return loss_scale.scale(loss), out

        grads, out = jax.grad(scaled, has_aux=True)(params)
        grads = loss_scale.unscale(grads)
        loss = (out[0] if has_aux else out).astype("float32")
        return ((loss, out[1]) if has_aux else loss), grads, all_finite(grads)

    return fn
