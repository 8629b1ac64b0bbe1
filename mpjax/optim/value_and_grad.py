"""Loss and unscaled float32 gradients through a loss scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mpjax.errors import ConfigError
from mpjax.optim.gate import all_finite
from mpjax.optim.leaf_scale import LeafLossScale


def scaled_grad(
    loss_scale: Any, fn: Callable[..., tuple[Any, Any]], argnums: int | tuple[int, int] = 0
) -> Callable[..., tuple[Any, Any]]:
    """Returns the function that gives the scaled gradients of a loss.

    Args:
      loss_scale: of this step.
      fn: `fn(params, *args) -> (loss, aux)`.
      argnums: 0, or (0, 1) for the cotangent of a second argument too.

    Returns:
      `grad(params, *args) -> (gradients, aux)`; the gradients are to be unscaled.

    Raises:
      ConfigError: a second argument that is not empty under a `LeafLossScale` (at the call).
    """
    if not isinstance(loss_scale, LeafLossScale):

        def scaled(*args: Any) -> tuple[Any, Any]:
            loss, aux = fn(*args)
            return loss_scale.scale(loss), aux

        return jax.grad(scaled, argnums, has_aux=True)
    if argnums == 0:
        return loss_scale.grad(fn)

    def grad(params: Any, seen: Any, *args: Any) -> tuple[Any, Any]:
        if jax.tree.leaves(seen):
            raise ConfigError(
                "loss scale: leaf pulls gradients at several scales, and delayed scaling keeps"
                " their amax at one; take loss_scale=dynamic or a recipe with current scaling"
            )
        grads, aux = loss_scale.grad(lambda params, *args: fn(params, seen, *args))(params, *args)
        return (grads, seen), aux

    return grad


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
        def loss_and_out(params: Any) -> tuple[Any, Any]:
            out = loss_fn(params, *args)
            return (out[0] if has_aux else out), out

        grads, out = scaled_grad(loss_scale, loss_and_out)(params)
        grads = loss_scale.unscale(grads)
        loss = (out[0] if has_aux else out).astype("float32")
        return ((loss, out[1]) if has_aux else loss), grads, all_finite(grads)

    return fn
