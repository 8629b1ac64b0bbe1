"""Delayed scaling: scales from the largest magnitudes of past steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.typing import ArrayLike, ModelState, Tree


class AmaxHistory(NamedTuple):
    r"""The state of delayed scaling of a product's operands: x, W and dy, in this order.

    A product takes its scales from `amax` and writes to `observed_amax`: the amax of x and W in the
    forward pass, that of dy as the cotangent of `observed_amax`, so that uses and microbatches are
    joined by a maximum instead of the sum of gradients.

    Args:
      history: amax of the last steps, newest first, shape (..., 3, steps); dy's are divided by
        the loss scale.
      amax: the maximum of the history, from which the scales come, shape (..., 3); 0 while it is
        unknown, and then the scale comes from the current tensor.
      observed_amax: amax of this step so far, shape (..., 3).
    """

    history: Float[Array, "*layers 3 steps"]
    amax: Float[Array, "*layers 3"]
    observed_amax: Float[Array, "*layers 3"]

    @classmethod
    def empty(cls, steps: int, layers: tuple[int, ...] = ()) -> AmaxHistory:
        """Returns the state before the first step.

        Args:
          steps: whose largest numbers are remembered.
          layers: leading axes.

        Raises:
          ConfigError: `steps` is no number of steps.

        Example:
          >>> AmaxHistory.empty(16).history.shape
          (3, 16)
        """
        if not is_whole(steps, 1):
            raise ConfigError(f"amax history: {brief(steps)} is no number of steps; give 1024")
        zeros = jnp.zeros((*layers, 3), jnp.float32)
        return cls(jnp.zeros((*layers, 3, steps), jnp.float32), zeros, zeros + 0)

    def past(self, margin: int) -> Array:
        """Returns the amax of past steps times 2^margin, from which the scales come."""
        return self.amax * jnp.float32(2.0**margin)

    def begin(self, loss_scale: ArrayLike) -> AmaxHistory:
        """Returns the state for a step whose gradients are multiplied by the loss scale."""
        amax = self.amax.at[..., 2].multiply(loss_scale)
        return self._replace(amax=amax, observed_amax=jnp.zeros_like(self.observed_amax))

    def end(self, before: AmaxHistory, gradient_amax: Array, loss_scale: ArrayLike) -> AmaxHistory:
        """Returns the state after a step.

        A magnitude that is zero or not finite is ignored: the scale stays.

        Args:
          before: the state before `begin`.
          gradient_amax: the cotangent of `observed_amax`, in units of the loss scale.
          loss_scale: that of the step.
        """
        dy = gradient_amax[..., 2:] / loss_scale
        now = jnp.concatenate([self.observed_amax[..., :2], dy], axis=-1)
        now = jnp.where(jnp.isfinite(now), now, jnp.float32(0))
        history = jnp.concatenate([now[..., None], before.history[..., :-1]], axis=-1)
        largest = jnp.max(history, axis=-1)
        amax = jnp.where(largest > 0, largest, before.amax)
        return AmaxHistory(history, amax, jnp.zeros_like(self.observed_amax))


def _is_history(x: object) -> TypeGuard[AmaxHistory]:
    return isinstance(x, AmaxHistory)


def map_histories(
    function: Callable[..., object], tree: ModelState, *rest: ModelState
) -> ModelState:
    """Applies a function to each AmaxHistory of a tree; other leaves stay as they are."""
    return jax.tree.map(
        lambda x, *others: function(x, *others) if _is_history(x) else x,
        tree,
        *rest,
        is_leaf=_is_history,
    )


def observed_of(tree: ModelState) -> list[Array]:
    """Returns `observed_amax` of each AmaxHistory of a tree, in order; empty without one.

    Of the cotangents of a state it is the amax of gradients, for `end_step`.

    Args:
      tree: a state, or its cotangents.

    Example:
      >>> [x.tolist() for x in observed_of({"a": AmaxHistory.empty(4), "b": None})]
      [[0.0, 0.0, 0.0]]
    """
    return [x.observed_amax for x in jax.tree.leaves(tree, is_leaf=_is_history) if _is_history(x)]


def with_observed(tree: Tree, observed_amax: Sequence[Array]) -> Tree:
    """Returns the tree with other arrays for those of `observed_of`."""
    rest = iter(observed_amax)
    return map_histories(lambda x: x._replace(observed_amax=next(rest)), tree)


def begin_step(tree: Tree, loss_scale: ArrayLike) -> Tree:
    """Returns a model's state for one step; see `AmaxHistory.begin`.

    Args:
      tree: the state; what is no AmaxHistory stays.
      loss_scale: that of the step; 1.0 without.

    Example:
      >>> known = AmaxHistory.empty(4)._replace(amax=jnp.ones(3))
      >>> begin_step(known, 8.0).amax.tolist()
      [1.0, 1.0, 8.0]
    """
    return map_histories(lambda x: x.begin(loss_scale), tree)


def end_step(
    tree: Tree, before: ModelState, gradient_amax: Sequence[Array], loss_scale: ArrayLike
) -> Tree:
    """Returns a model's state after one step; see `AmaxHistory.end`.

    Args:
      tree: the state that the forward pass returned.
      before: that before `begin_step`.
      gradient_amax: of each AmaxHistory the cotangent of `observed_amax`, as `observed_of` gives.
      loss_scale: that of the step; 1.0 without.

    Example:
      >>> before = AmaxHistory.empty(2)
      >>> after = before._replace(observed_amax=jnp.array([3.0, 2.0, 0.0]))
      >>> end_step(after, before, [jnp.array([0.0, 0.0, 8.0])], 16.0).amax.tolist()
      [3.0, 2.0, 0.5]
    """
    rest = iter(gradient_amax)
    return map_histories(lambda x, old: x.end(old, next(rest), loss_scale), tree, before)
