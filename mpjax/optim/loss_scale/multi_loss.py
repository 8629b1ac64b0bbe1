"""Several losses that share parameters, each with its own scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mpjax.errors import ConfigError, brief
from mpjax.optim.gate import all_finite
from mpjax.optim.loss_scale.loss_checks import (
    as_loss,
    check_differentiable,
    check_function,
    check_scale,
    with_aux,
)
from mpjax.optim.loss_scale.scalers import LossScale
from mpjax.typing import Grads, Metrics, Params

Values = TypeVar("Values")  # the losses, or (losses, aux)


class MultiLossScale:
    """One loss scale a loss, for `scaled_value_and_grads` and for `wrap(..., losses=n)`.

    Args:
      scales: static, dynamic or no-op loss scales in the order of the losses; each is copied, so
        that `[DynamicLossScale()] * 3` are three.

    Raises:
      ConfigError: no scale, or one that needs more of a step than whether it was finite.

    Example:
      >>> from mpjax.optim import DynamicLossScale
      >>> scale = MultiLossScale([DynamicLossScale(1024.0)] * 2)
      >>> scale.adjust(jnp.array([True, False])).value.tolist()
      [1024.0, 512.0]

    References:
      NVIDIA Apex, amp.initialize(num_losses=...) and amp.scale_loss(loss_id=...).
    """

    scales: tuple[LossScale, ...]

    def __init__(self, scales: Sequence[LossScale]) -> None:
        if not isinstance(scales, list | tuple) or not scales:
            raise ConfigError("loss scale: no scale for any loss; give a sequence of loss scales")
        for scale in scales:
            check_scale(scale)
            kind = getattr(getattr(scale, "settings", None), "kind", "none")
            if kind not in ("none", "static", "dynamic"):
                raise ConfigError(
                    f"loss scale: {kind} reads the gradients of one loss and several are summed;"
                    " take DynamicLossScale or StaticLossScale for each loss"
                )
        self.scales = tuple(jax.tree.map(jnp.copy, scale) for scale in scales)

    @property
    def settings(self) -> NoReturn:
        """A Precision holds the scale of one loss.

        Raises:
          ConfigError: always.
        """
        raise ConfigError(
            "loss scale: a Precision trains one loss; take mpjax.tasks.Mixture(own_scales=True),"
            " or give it loss_scale=none and take MultiLossScale with scaled_value_and_grads"
        )

    @property
    def value(self) -> Float[Array, " losses"]:
        """The scales, float32, one a loss."""
        return jnp.stack([scale.value for scale in self.scales])

    def adjust(self, finite: Bool[Array, " losses"]) -> MultiLossScale:
        """Returns the scales of the next step, each by the finiteness of its own loss.

        Args:
          finite: a bool for each loss.

        Raises:
          ConfigError: not as many as scales.
        """
        if getattr(finite, "shape", None) != (len(self.scales),):
            raise ConfigError(
                f"losses: finite is {brief(finite)} and there are {len(self.scales)} scales; pass"
                " what scaled_value_and_grads returned"
            )
        each = zip(self.scales, finite, strict=True)
        return _of(tuple(scale.adjust(ok) for scale, ok in each))

    def unscale(self, tree: Grads) -> Grads:
        """Returns a sum of gradients that were unscaled before they were added, in float32."""
        return jax.tree.map(lambda g: g.astype(jnp.float32), tree)

    def at_minimum(self, finite: Bool[Array, " losses"]) -> Bool[Array, ""]:
        """Returns whether no scale of a loss that is not finite can fall further."""
        each = zip(self.scales, finite, strict=True)
        return jnp.all(jnp.stack([ok | scale.at_minimum() for scale, ok in each]))

    def of_optimizer(self) -> MultiLossScale:
        """Returns the same as part of an optimizer's state."""
        return _of(tuple(scale.of_optimizer() for scale in self.scales))

    def metrics(self) -> Metrics:
        """Returns `loss_scale`, the smallest of them."""
        return {"loss_scale": jnp.min(self.value)}

    def __repr__(self) -> str:
        return f"MultiLossScale({list(self.scales)})"


def _of(scales: tuple[LossScale, ...]) -> MultiLossScale:
    out = object.__new__(MultiLossScale)
    out.scales = scales
    return out


jax.tree_util.register_pytree_with_keys(
    MultiLossScale,
    lambda x: ([(jax.tree_util.SequenceKey(i), s) for i, s in enumerate(x.scales)], None),
    lambda _, scales: _of(tuple(scales)),
    lambda x: (x.scales, None),
)


def scaled_grads(
    loss_scale: LossScale | MultiLossScale,
    fn: Callable[..., tuple[Float[Array, " losses"], Any]],
    count: int,
) -> Callable[..., tuple[tuple[list[Grads], Any], Any]]:
    """Returns the function that gives the scaled gradients of each of several losses.

    One forward pass serves all; each loss has a backward pass of its own, in which it does not meet
    another's overflow. Where a loss is NaN already, so are the gradients of all.

    Args:
      loss_scale: of this step; one for all losses, or a `MultiLossScale`.
      fn: `fn(params, amax, *args) -> (losses, aux)`, losses float32 (losses,).
      count: losses.

    Returns:
      `grads(params, amax, *args) -> ((gradients, amax), aux)`: the gradients of each loss, to be
      unscaled by its scale, and the largest cotangent of any of them for the second argument.
    """

    def grads(params: Params, amax: Any, *args: object) -> tuple[tuple[list[Grads], Any], Any]:
        check_differentiable(params)
        _, pull, aux = jax.vjp(lambda p, a: fn(p, a, *args), params, amax, has_aux=True)
        rows = jnp.diag(jnp.broadcast_to(loss_scale.value, (count,)))
        each, largest = zip(*(pull(row) for row in rows), strict=True)
        return (list(each), jax.tree.map(lambda *a: jnp.max(jnp.stack(a), 0), *largest)), aux

    return grads


def scaled_value_and_grads(
    loss_fn: Callable[..., Values], *, has_aux: bool = False
) -> Callable[..., tuple[Values, Grads, Bool[Array, " losses"]]]:
    r"""Transforms a function with several losses into their sum's unscaled gradients.

    $$g = \sum_i \frac{1}{s_i} \nabla_\theta\,(s_i L_i(\theta))$$ Each loss has a backward pass of
    its own, so that none meets another's scale or another's NaN; the sum is in float32. The
    function is called once a loss; XLA merges the equal forward passes outside of loops.

    Args:
      loss_fn: `loss_fn(params, *args) -> losses` or `(losses, aux)`; a tuple of scalar losses.
      has_aux: whether it returns `(losses, aux)`.

    Returns:
      `fn(scale, params, *args) -> (value, grads, finite)` with a `MultiLossScale` of as many
      scales; value is the tuple of float32 losses, or `(losses, aux)`; grads are float32 with the
      structure of params; finite is a bool for each loss: skip the step unless all are true, then
      `scale.adjust(finite)`.

    Raises:
      ConfigError: no function; at the call, no MultiLossScale, another number of losses than of
        scales, a loss that is no scalar, or params without floating-point arrays.

    Example:
      >>> from mpjax.optim import StaticLossScale
      >>> fn = scaled_value_and_grads(lambda w: (jnp.sum(w), jnp.sum(w * w)))
      >>> scale = MultiLossScale([StaticLossScale(8.0), StaticLossScale(64.0)])
      >>> losses, grads, finite = fn(scale, jnp.ones(2, jnp.float16))
      >>> grads.tolist(), finite.tolist()
      ([3.0, 3.0], [True, True])

    References:
      Micikevicius et al. 2018, Mixed Precision Training, section 3.2; NVIDIA Apex, num_losses.
    """

    check_function(loss_fn)

    def fn(
        scale: MultiLossScale, params: Params, *args: object
    ) -> tuple[Values, Grads, Bool[Array, " losses"]]:
        if not isinstance(scale, MultiLossScale):
            raise ConfigError(
                f"losses: the scale is {brief(scale)}; pass MultiLossScale([DynamicLossScale()] *"
                " 2), with a scale a loss, before params"
            )
        check_differentiable(params)

        def of(index: int) -> Callable[[Params], tuple[Array, Any]]:
            def scaled(params: Params) -> tuple[Array, Any]:
                out: Any = loss_fn(params, *args)
                losses = with_aux(out)[0] if has_aux else out
                if not isinstance(losses, tuple | list) or len(losses) != len(scale.scales):
                    count = len(losses) if isinstance(losses, tuple | list) else "no tuple of"
                    raise ConfigError(
                        f"losses: the function returns {count} losses and there are"
                        f" {len(scale.scales)} scales; return a tuple with one loss a scale"
                    )
                return scale.scales[index].scale(as_loss(losses[index])), out

            return scaled

        total: Grads = None
        finite = []
        for index, one in enumerate(scale.scales):
            grads, out = jax.grad(of(index), has_aux=True)(params)
            grads = one.unscale(grads)
            finite.append(all_finite(grads))
            total = grads if index == 0 else jax.tree.map(lambda t, g: t + g, total, grads)
        losses = tuple(as_loss(loss).astype(jnp.float32) for loss in (out[0] if has_aux else out))
        values: Any = (losses, out[1]) if has_aux else losses
        return values, total, jnp.stack(finite)

    return fn
