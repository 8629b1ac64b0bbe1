"""Loss and unscaled float32 gradients through a loss scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from mpjax.errors import ConfigError, explains_calls
from mpjax.optim.gate import all_finite
from mpjax.optim.loss_scale.leaf_scale import LeafLossScale
from mpjax.optim.loss_scale.loss_checks import (
    Scales,
    as_loss,
    check_differentiable,
    check_function,
    check_scale,
    with_aux,
)
from mpjax.optim.loss_scale.scaled import check_unowned
from mpjax.typing import Array, Grads, Params, PyTree

Aux = TypeVar("Aux")
Value = TypeVar("Value")  # a loss, or (loss, aux)


def scaled_grad(
    loss_scale: Scales, fn: Callable[..., tuple[Array, Aux]], argnums: int | tuple[int, int] = 0
) -> Callable[..., tuple[Grads, Aux]]:
    """Returns the function that gives the scaled gradients of a loss.

    Args:
      loss_scale: of this step.
      fn: `fn(params, *args) -> (loss, aux)`.
      argnums: 0, or (0, 1) for the cotangent of a second argument too.

    Returns:
      `grad(params, *args) -> (gradients, aux)`; the gradients are to be unscaled.

    Raises:
      ConfigError: no loss scale or no function; at the call, params without floating-point arrays,
        a function that returns no `(loss, aux)` with a scalar loss, or a second argument that is
        not empty under a `LeafLossScale`.
    """
    check_scale(loss_scale)
    check_function(fn)
    if not isinstance(loss_scale, LeafLossScale):

        def scaled(*args: object) -> tuple[Array, Aux]:
            loss, aux = with_aux(fn(*args))
            return loss_scale.scale(as_loss(loss)), aux

        pull = jax.grad(scaled, argnums, has_aux=True)

        def grad_of(params: Params, *args: object) -> tuple[Grads, Aux]:
            check_differentiable(params)
            return pull(params, *args)

        return grad_of
    if argnums == 0:
        return loss_scale.grad(fn)

    def grad(params: Params, observed_amax: PyTree, *args: object) -> tuple[Grads, Aux]:
        if jax.tree.leaves(observed_amax):
            raise ConfigError(
                "loss scale: leaf pulls gradients at several scales, and delayed scaling keeps"
                " their amax at one; take loss_scale=dynamic or a recipe with current scaling"
            )
        grads, aux = loss_scale.grad(lambda params, *args: fn(params, observed_amax, *args))(
            params, *args
        )
        return (grads, observed_amax), aux

    return grad


@explains_calls
def scaled_value_and_grad(
    loss_fn: Callable[..., Value], *, has_aux: bool = False
) -> Callable[..., tuple[Value, Grads, Array]]:
    r"""Transforms a loss into one that returns value, unscaled gradients and their finiteness.

    $$g = \frac{1}{s} \nabla_\theta\,(s\,L(\theta))$$ The product with $s$ is taken in float32, so
    the scale enters the backward pass as its first cotangent.

    Args:
      loss_fn: `loss_fn(params, *args) -> loss` or `(loss, aux)`; a scalar loss.
      has_aux: whether it returns `(loss, aux)`.

    Returns:
      `fn(loss_scale, params, *args) -> (value, grads, finite)`; value is the loss in float32, or
      `(loss, aux)`; grads are float32 with the structure of params; finite is a bool scalar.

    Raises:
      ConfigError: no function; at the call, as `scaled_grad`, or a loss scale that belongs to a
        wrapped optimizer, whose `value_and_grad` is to be taken.

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

    check_function(loss_fn)

    def fn(loss_scale: Scales, params: Params, *args: object) -> tuple[Value, Grads, Array]:
        check_unowned(loss_scale)
        value, grads = value_and_scaled_grad(loss_fn, has_aux, loss_scale, params, args)
        grads = loss_scale.unscale(grads)
        return value, grads, all_finite(grads)

    return fn


def value_and_scaled_grad(
    loss_fn: Callable[..., Value],
    has_aux: bool,
    loss_scale: Scales,
    params: Params,
    args: tuple[object, ...],
) -> tuple[Value, Grads]:
    """Returns the value of a loss in float32, with aux if it has one, and its scaled gradients."""

    def loss_and_out(params: Params) -> tuple[Array, tuple[Array, Any]]:
        out: Any = loss_fn(params, *args)
        loss, aux = with_aux(out) if has_aux else (out, None)
        loss = as_loss(loss)
        return loss, (loss, aux)

    grads, (loss, aux) = scaled_grad(loss_scale, loss_and_out)(params)
    loss = loss.astype("float32")
    value: Any = (loss, aux) if has_aux else loss
    return value, grads
