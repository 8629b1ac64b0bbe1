"""One dynamic loss scale a group of weights, and a function that rescales cotangents.

Two ways to give a group's gradients their own scale, for any function:

1. `LeafLossScale.grad` runs one backward pass a group, each at the group's own scale. The model
   does not change. All cotangents between the loss and the group's weights have that scale, so
   none of them underflows either, and only those of one group must fit in the format at one scale.
   XLA drops what a pass does not need: the layers before the group's first.
2. `scale_gradient` around a segment of the model: one backward pass. A cotangent that has
   underflowed before it reaches the segment stays zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mpjax.errors import ConfigError, explains_calls
from mpjax.formats import is_quantized
from mpjax.formats.checks import as_array
from mpjax.optim.loss_scale.loss_checks import (
    as_loss,
    check_differentiable,
    check_function,
    with_aux,
)
from mpjax.optim.loss_scale.scaled import bare
from mpjax.optim.loss_scale.scalers import (
    LossScale,
    as_flag,
    as_pytree,
    rebuild,
    step_dynamic,
)
from mpjax.paths import leaves_with_names
from mpjax.precision import LossScaleSettings, matches
from mpjax.typing import ArrayLike, Grads, Metrics, Params, PyTree, Tree

Aux = TypeVar("Aux")


@jax.custom_vjp
def _mark(x: Array, scale: Array) -> Array:
    """x, whose cotangent is multiplied by the scale."""
    del scale
    return x


def _mark_bwd(scale: Array, ct: Array) -> tuple[Array, Array]:
    # The product is float32: the factor may lie outside the cotangent's format, its result not.
    scaled = (ct.astype(jnp.float32) * scale).astype(ct.dtype)
    return scaled, jnp.zeros_like(scale)


_mark.defvjp(lambda x, scale: (x, scale), _mark_bwd)


def scale_gradient(x: Tree, scale: ArrayLike) -> Tree:
    r"""Returns x; its cotangent is multiplied by the scale.

    Around a segment $y = f(x, W)$, `scale_gradient(f(scale_gradient(x, 1 / s), W), s)` leaves
    $\partial L / \partial x$ as it is, while all cotangents inside, and $\partial L / \partial W$,
    are $s$ times as large. Between two segments write one marker with the quotient of their
    scales: two in a row would round twice.

    Args:
      x: a tree of floating-point arrays.
      scale: a number or float32 scalar, which gets no gradient of its own.

    Returns:
      x.

    Example:
      >>> jax.grad(lambda w: jnp.sum(scale_gradient(w, 8.0)))(jnp.ones(2)).tolist()
      [8.0, 8.0]

    References:
      Zhao et al. 2019, Adaptive Loss Scaling for Mixed Precision Training (a scale for each
      layer, multiplied in between the layers).
    """
    factor = as_array(scale, "scale_gradient: scale").astype(jnp.float32)
    return jax.tree.map(lambda leaf: _mark(leaf, factor), x)


def leaf_paths(tree: PyTree) -> list[str]:
    """Returns the path of each leaf, joined by `/`; a Quantized weight is one."""
    # A tree that is one array has an empty path, which is no pattern.
    return [path or "params" for path, _ in leaves_with_names(tree, is_quantized)]


@as_pytree
class LeafLossScale(LossScale):
    r"""A dynamic scale $s_k$ for each group $k$ of weights.

    $$g_k = \frac{1}{s_k} \left(\nabla_{W_k} (s_k L)\right)$$ Each $s_k$ grows and backs off as
    `DynamicLossScale` does, by the finiteness of its own group; the step is skipped if any group
    is not finite. A step that is not finite for another reason backs off all of them.

    Args:
      groups: patterns of weight paths, as in rules; a leaf belongs to the first that matches.
      init: first scale of every group.
      growth_factor: as in `DynamicLossScale`, and so are the following.
      backoff_factor: at a non-finite step of the group.
      growth_interval: finite steps of the group between growths.
      hysteresis: non-finite steps until the first backoff.
      min_scale: lower bound.
      max_scale: upper bound.

    Raises:
      ConfigError: no group, a value outside its range, a leaf without a group or a group without
        a leaf (at the first use).

    Example:
      >>> scale = LeafLossScale(["a", "**"], init=8.0)
      >>> fn = lambda p: (jnp.sum(p["a"]) + jnp.sum(p["b"]), None)
      >>> grads, _ = scale.grad(fn)({"a": jnp.ones(1), "b": jnp.ones(1)})
      >>> grads["a"].item(), scale.unscale(grads)["a"].item()
      (8.0, 1.0)

    References:
      Zhao et al. 2019, Adaptive Loss Scaling for Mixed Precision Training.
    """

    names = ("scale", "good_steps", "hysteresis_left")

    @explains_calls
    def __init__(
        self,
        groups: Sequence[str],
        init: int | float = 2.0**16,
        growth_factor: int | float = 2.0,
        backoff_factor: int | float = 0.5,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        min_scale: int | float = 1.0,
        max_scale: int | float = 2.0**24,
    ) -> None:
        factors = growth_factor, backoff_factor, growth_interval, hysteresis
        self._begin("leaf", init, *factors, min_scale, max_scale, groups=groups)

    @staticmethod
    def first_state(settings: LossScaleSettings) -> tuple[Array, ...]:
        count = len(settings.groups)
        if not count:
            raise ConfigError(
                "loss scale: leaf has no groups; give patterns such as ['**/embed', '**'], or"
                " make_loss_scale(settings, params) for one a leaf"
            )
        return (
            jnp.full(count, settings.init, jnp.float32),
            jnp.zeros(count, jnp.int32),
            jnp.full(count, settings.hysteresis, jnp.int32),
        )

    @property
    def value(self) -> Float[Array, ""]:
        """The smallest of the scales, float32."""
        return jnp.min(self.state[0])

    def at(self, group: str) -> Float[Array, ""]:
        """Returns the scale of one group, by its pattern.

        Raises:
          ConfigError: there is no such group.
        """
        groups = self.settings.groups
        if group not in groups:
            raise ConfigError(f"loss scale: no group {group!r}; there are {' '.join(groups)}")
        return self.state[0][groups.index(group)]

    def group_of(self, tree: PyTree) -> list[int]:
        """Returns the index of the group of each leaf.

        Raises:
          ConfigError: a leaf without a group, or a group without a leaf.
        """
        groups, found = self.settings.groups, []
        for path in leaf_paths(tree):
            matching = [i for i, group in enumerate(groups) if matches(group, path)]
            if not matching:
                raise ConfigError(
                    f"{path}: no group of the loss scale covers this weight; there are"
                    f" {' '.join(groups)}; add '**' as the last"
                )
            found.append(matching[0])
        for i, group in enumerate(groups):
            if i not in found:
                raise ConfigError(
                    f"loss scale: the group {group!r} has no weight (the first pattern that matches"
                    f" takes it); weights are {' '.join(leaf_paths(tree)[:8])} ...; drop or move it"
                )
        return found

    def grad(self, fn: Callable[..., tuple[Array, Aux]]) -> Callable[..., tuple[Grads, Aux]]:
        """Returns the function that gives the scaled gradients: one backward pass a group.

        Args:
          fn: `fn(params, *args) -> (loss, aux)`.

        Returns:
          `grad(params, *args) -> (scaled gradients, aux)`, to be unscaled by `unscale`.

        Raises:
          ConfigError: no function; at the call, one that returns no `(loss, aux)` with a scalar
            loss, or params without floating-point arrays.
        """

        check_function(fn)

        def grad(params: Params, *args: object) -> tuple[Grads, Aux]:
            check_differentiable(params)

            def in_float32(params: Params) -> tuple[Array, Aux]:
                loss, aux = with_aux(fn(params, *args))
                return as_loss(loss).astype(jnp.float32), aux

            _, pull, aux = jax.vjp(in_float32, params, has_aux=True)
            scales = self.state[0]
            count = len(self.settings.groups)
            pulled = [jax.tree.leaves(pull(scales[i])[0]) for i in range(count)]
            own = [pulled[group][leaf] for leaf, group in enumerate(self.group_of(params))]
            return jax.tree.unflatten(jax.tree.structure(params), own), aux

        return grad

    def scale(self, tree: Tree) -> Tree:
        """Raises ConfigError: one scaled loss cannot hold the scales of several groups."""
        raise ConfigError(
            "loss scale: leaf scales each group's gradients, not the loss; take"
            " scaled_value_and_grad(loss_fn), or scale.grad(fn) in place of jax.grad"
        )

    def unscale(self, tree: Tree) -> Tree:
        """Returns each leaf / its group's scale in float32."""
        tree, scales = bare(tree), self.state[0]
        groups = jax.tree.unflatten(jax.tree.structure(tree), self.group_of(tree))
        return jax.tree.map(lambda x, group: x.astype(jnp.float32) / scales[group], tree, groups)

    def finite_groups(self, grads: Grads) -> Bool[Array, " K"]:
        """Returns for each group whether all its gradients are finite."""
        finite: list[list[Array]] = [[] for _ in self.settings.groups]
        leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]
        for leaf, group in zip(leaves, self.group_of(grads), strict=True):
            finite[group].append(leaf)
        return jnp.stack([jnp.all(jnp.stack(group)) for group in finite])

    def adjust(self, finite: Bool[Array, ""] | bool, grads: Grads = None) -> LeafLossScale:
        finite = as_flag(finite)
        if grads is None:
            raise ConfigError(
                "loss scale: leaf reads the gradients; write scale.adjust(finite, grads) with the"
                " unscaled ones"
            )
        own = self.finite_groups(grads)
        own = jnp.where(jnp.all(own), finite, own)  # not finite for another reason: all back off
        state = step_dynamic(self.settings, self.state, own)
        return rebuild(type(self), self.settings, state, self.owned)

    def at_minimum(self, grads: Grads = None) -> Bool[Array, ""]:
        low = self.state[0] <= self.settings.min_scale
        if grads is None:
            return jnp.all(low)
        own = self.finite_groups(grads)
        return jnp.where(jnp.all(own), jnp.all(low), jnp.any(low & ~own))

    def metrics(self) -> Metrics:
        each = zip(self.settings.groups, self.state[0], strict=True)
        return {"loss_scale": self.value} | {f"loss_scale/{name}": s for name, s in each}
