"""Gradients that are known to be scaled or not, so that they are unscaled exactly once.

`Optimizer.value_and_grad` returns a `ScaledGradients`: `step` takes it, and functions of plain
gradients refuse it. `scaled_value_and_grad` returns plain trees, for any optimizer; their arrays
are remembered for as long as they live, and `step` refuses them.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator

import jax
from jax.tree_util import GetAttrKey

from mpjax.errors import ConfigError
from mpjax.typing import Grads, PyTree, Tree

# Arrays and tracers that an unscaling returned, by their id; none is kept alive.
_UNSCALED: weakref.WeakValueDictionary[int, jax.Array] = weakref.WeakValueDictionary()


@jax.tree_util.register_pytree_with_keys_class
class ScaledGradients:
    """Gradients of a loss times the loss scale: what `Optimizer.step` takes.

    A pytree: `jax.tree.map` and `jax.lax.psum` return a `ScaledGradients` again. For the gradients
    themselves write `opt_state.loss_scale.unscale(grads)`.

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


def mark_unscaled(tree: Tree) -> Tree:
    """Returns a tree of gradients, and remembers that they are unscaled."""
    for leaf in jax.tree.leaves(tree):
        _UNSCALED[id(leaf)] = leaf
    return tree


def check_scaled(grads: Grads) -> None:
    """Checks that gradients are not known to be unscaled.

    Raises:
      ConfigError: `scaled_value_and_grad` returned them, so that they are.
    """
    if any(_UNSCALED.get(id(leaf)) is leaf for leaf in jax.tree.leaves(grads)):
        raise ConfigError(
            "gradients: scaled_value_and_grad has unscaled them, and step divides by the loss scale"
            " of its own state; write loss, grads = opt.value_and_grad(loss_fn)(opt_state, params,"
            " batch)"
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
