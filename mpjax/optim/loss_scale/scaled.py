"""Gradients that are known to be scaled or not, so that they are unscaled exactly once.

`Optimizer.value_and_grad` returns a `ScaledGradients`: `step` takes it, and functions of plain
gradients refuse it. `scaled_value_and_grad` and `jax.grad` return plain trees, for any optimizer;
a `step` that divides by a loss scale refuses them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import jax
from jax.tree_util import GetAttrKey

from mpjax.errors import ConfigError, brief
from mpjax.typing import Grads, PyTree


@jax.tree_util.register_pytree_with_keys_class
class ScaledGradients:
    """Gradients of a loss times the loss scale: what `Optimizer.step` takes.

    A pytree: `jax.tree.map` and `jax.lax.psum` return a `ScaledGradients` again. For the gradients
    themselves write `opt_state.loss_scale.unscale(grads)`. Gradients of a loss that you scaled by
    `opt_state.loss_scale.scale(loss)` are made ones by `ScaledGradients(grads)`.

    Args:
      tree: the gradients, in the structure of params.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = ScaledGradients({"w": jnp.ones(2)})
      >>> doubled = jax.tree.map(lambda g: 2 * g, grads)
      >>> type(doubled).__name__, doubled["w"].tolist()
      ('ScaledGradients', [2.0, 2.0])
    """

    def __init__(self, tree: Grads) -> None:
        self.tree = tree

    def __getitem__(self, key: Hashable) -> Grads:
        return self.tree[key]

    def __contains__(self, key: Hashable) -> bool:
        return key in self.tree

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.tree)

    def __repr__(self) -> str:
        return f"ScaledGradients({self.tree})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[GetAttrKey, Grads]], None]:
        """See `jax.tree_util`."""
        return ((GetAttrKey("tree"), self.tree),), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Grads]) -> ScaledGradients:
        """See `jax.tree_util`."""
        return cls(*children)


def bare(tree: PyTree) -> PyTree:
    """Returns the tree of scaled gradients, and any other tree as it is."""
    return tree.tree if isinstance(tree, ScaledGradients) else tree


def check_plain(name: str, tree: object) -> None:
    """Checks that gradients are not scaled.

    Raises:
      ConfigError: they are.
    """
    if isinstance(tree, ScaledGradients):
        raise ConfigError(
            f"{name}: these are gradients of the scaled loss, from opt.value_and_grad; give them to"
            " opt.step, or take opt_state.loss_scale.unscale(grads)"
        )


def check_scaled(grads: Grads) -> None:
    """Checks that gradients are marked as scaled.

    Raises:
      ConfigError: they are a plain tree, which may be scaled or not.
    """
    if not isinstance(grads, ScaledGradients):
        raise ConfigError(
            f"gradients: {brief(grads)} may be unscaled, and step divides by the loss scale; write"
            " loss, grads = opt.value_and_grad(loss_fn)(opt_state, params, batch), or"
            " mpjax.optim.ScaledGradients(grads) if they are of opt_state.loss_scale.scale(loss)"
        )


def check_unowned(loss_scale: object) -> None:
    """Checks that a loss scale is no optimizer's, whose step unscales.

    Raises:
      ConfigError: it is.
    """
    if getattr(loss_scale, "owned", False):
        raise ConfigError(
            "loss scale: it belongs to an optimizer, whose step unscales; write loss, grads ="
            " opt.value_and_grad(loss_fn)(opt_state, params, batch), or take a loss scale of your"
            " own and a raw optax optimizer"
        )
