"""What a caller gives for a loss and its gradient, checked while it is traced."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.formats import is_quantized
from mpjax.paths import leaves_with_names
from mpjax.typing import Array, ArrayLike, Params, Tree

_PROTOCOL = ("scale", "unscale", "adjust")


class Scales(Protocol):
    """What scales a loss and unscales its gradients: a loss scale of ours or of jmp."""

    def scale(self, tree: Tree) -> Tree: ...

    def unscale(self, tree: Tree) -> Tree: ...


def check_function(fn: object) -> None:
    """Checks that a loss is a function.

    Raises:
      ConfigError: it is not.
    """
    if not callable(fn):
        raise ConfigError(f"loss: {brief(fn)} is not a function; give loss_fn(params, ...) -> loss")


def check_scale(loss_scale: object) -> None:
    """Checks that an argument is a loss scale: that it has the three methods of the protocol.

    Raises:
      ConfigError: it is something else.
    """
    if not all(callable(getattr(loss_scale, name, None)) for name in _PROTOCOL):
        raise ConfigError(
            f"loss scale: {brief(loss_scale)} is no loss scale; pass DynamicLossScale(),"
            " StaticLossScale(1024.0) or state.loss_scale, before params"
        )


def check_differentiable(params: Params) -> None:
    """Checks that gradients can be taken with respect to every leaf.

    Raises:
      ConfigError: a leaf that is no floating-point array.
    """
    for path, leaf in leaves_with_names(params, is_quantized):
        where = path or "params"
        if is_quantized(leaf):
            raise ConfigError(
                f"loss: {where} is stored in {leaf.format.name} with scales; take gradients with"
                " respect to mpjax.optim.weight_view(params)"
            )
        dtype = getattr(leaf, "dtype", None)
        if not (isinstance(leaf, float) or jnp.issubdtype(dtype or jnp.int32, jnp.floating)):
            what = brief(leaf) if dtype is None else dtype
            raise ConfigError(
                f"loss: {where} is {what}, of which there is no gradient; pass floating-point"
                " params first and the rest after them"
            )


def with_aux(out: object) -> tuple[Any, Any]:
    """Returns the loss and the auxiliary output beside it.

    Raises:
      ConfigError: the function returned no such pair.
    """
    if not isinstance(out, tuple) or len(out) != 2:
        raise ConfigError(
            f"loss: the function returned {brief(out)}; return (loss, aux), or leave has_aux out"
        )
    return out


def as_loss(loss: ArrayLike) -> Array:
    """Returns a loss as a floating-point scalar.

    Raises:
      ConfigError: it is none.
    """
    if isinstance(loss, int | float) or getattr(loss, "shape", None) == ():
        loss = loss if isinstance(loss, jax.Array) else jnp.asarray(loss)
        if jnp.issubdtype(loss.dtype, jnp.floating):
            return loss
    cure = "return one floating-point number"
    if isinstance(loss, tuple):
        cure = "return (loss, aux) with has_aux=True"
    elif getattr(loss, "shape", ()):
        cure = "take its mean"
    raise ConfigError(f"loss: the function returned {brief(loss)}; {cure}")
