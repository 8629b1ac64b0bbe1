r"""Gradients of several tasks: what they share, how they agree, and how they become one.

A weight is shared where more than one task reaches it: where the gradients of more than one are
not all zero. Heads are reached by one task, and have its gradient whatever the others want. On
what is shared, all that is needed of $n$ gradients are their $n^2$ products $G_{ij} = g_i \cdot
g_j$, float32, and every way to combine them is a sum $\sum_i c_i g_i$.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.typing import Array, Batch, Grads, Key, Metrics, Params


class Products(NamedTuple):
    """What several gradients are to each other.

    Args:
      shared: of each leaf, whether more than one task reaches it, bool.
      gram: products of the gradients over all leaves that are shared, float32 (tasks, tasks).
    """

    shared: list[Array]
    gram: Array


def products(grads: Sequence[Grads]) -> Products:
    """Returns the products of gradients over the weights that tasks share."""
    leaves = [[g.astype(jnp.float32) for g in jax.tree.leaves(one)] for one in grads]
    count, shared = len(grads), []
    gram = jnp.zeros((count, count), jnp.float32)
    for leaf in zip(*leaves, strict=True):
        reached = jnp.stack([jnp.any(g != 0) for g in leaf])  # NaN is not 0 either
        shared.append(jnp.sum(reached) >= min(2, count))
        # Not vdot, which reshapes: arrays that are cut over devices would be gathered.
        rows = [jnp.stack([jnp.sum(a * b) for b in leaf]) for a in leaf]
        own = jnp.stack(rows)
        gram += jnp.where(shared[-1], own, jnp.zeros_like(own))
    return Products(shared, gram)


def shares_and_cosines(gram: Array) -> tuple[Array, Array]:
    """Returns the share of each gradient in the sum of their norms, and the cosines of all pairs.

    Example:
      >>> share, cosine = shares_and_cosines(jnp.array([[9.0, -3.0], [-3.0, 1.0]]))
      >>> share.tolist(), cosine[0, 1].item()
      ([0.75, 0.25], -1.0)
    """
    norms = jnp.sqrt(jnp.diagonal(gram))
    total, both = jnp.sum(norms), norms[:, None] * norms[None, :]
    share = norms / jnp.where(total > 0, total, 1.0)
    return share, gram / jnp.where(both > 0, both, 1.0)


def gradient_shares(
    losses: Callable[[Params, Batch], Mapping[str, Array]],
) -> Callable[[Params, Batch], dict[str, float]]:
    r"""Returns a function (params, batch) -> what each of several losses adds to the gradient.

    The share of loss $i$ is $\|g_i\| / \sum_j \|g_j\|$ over the weights that more than one of them
    reaches. Of two losses `cosine` is that between their gradients, -1 where they pull against
    each other; of more it is there for each pair, as `cosine a b`.

    Args:
      losses: (params, batch) -> name -> loss, with its weight.
    """

    @jax.jit
    def measure(params: Params, batch: Batch) -> dict[str, Array]:
        names: list[str] = []

        def each(params: Params) -> Array:
            found = losses(params, batch)
            names[:] = found
            return jnp.stack([loss.astype(jnp.float32) for loss in found.values()])

        _, pull = jax.vjp(each, params)
        grads = [pull(row)[0] for row in jnp.eye(len(names))]
        share, cosine = shares_and_cosines(products(grads).gram)
        found = dict(zip(names, share, strict=True))
        for i, j in itertools.combinations(range(len(names)), 2):
            pair = "" if len(names) == 2 else f" {names[i]} {names[j]}"
            found[f"cosine{pair}"] = cosine[i, j]
        return found

    def shares(params: Params, batch: Batch) -> dict[str, float]:
        return {name: float(x) for name, x in jax.device_get(measure(params, batch)).items()}

    return shares


def pcgrad(gram: Array, key: Key) -> Array:
    r"""Returns the coefficients of the sum of gradients without what they undo in each other.

    Each gradient $g_i$ is projected, in a random order of the others, on the plane of each $g_j$
    that it goes against, $g_i \leftarrow g_i - \frac{g_i \cdot g_j}{\|g_j\|^2} g_j$ where
    $g_i \cdot g_j < 0$. What is left stays a combination of the first gradients, so that the
    products of these are all that is read.

    Args:
      gram: products of the gradients, float32 (tasks, tasks).
      key: of the orders.

    Returns:
      $c$, (tasks,), of $\sum_i c_i g_i$.

    Example:
      >>> pcgrad(jnp.array([[1.0, -1.0], [-1.0, 2.0]]), jax.random.key(0)).tolist()
      [2.0, 1.5]

    References:
      Yu et al. 2020, Gradient Surgery for Multi-Task Learning, algorithm 1.
    """
    count = gram.shape[0]

    def projected(i: Array, key: Key) -> Array:
        def against(c: Array, j: Array) -> tuple[Array, None]:
            product = jnp.vdot(c, gram[:, j])
            opposed = (product < 0) & (j != i)
            step = product / jnp.where(opposed, gram[j, j], 1.0)
            return c.at[j].add(jnp.where(opposed, -step, 0.0)), None

        first = jnp.zeros(count, jnp.float32).at[i].set(1.0)
        return jax.lax.scan(against, first, jax.random.permutation(key, count))[0]

    return jnp.sum(jax.vmap(projected)(jnp.arange(count), jax.random.split(key, count)), 0)


class GradNormState(NamedTuple):
    """What GradNorm keeps.

    Args:
      weights: of the losses, float32 (tasks,); their sum is the number of tasks.
      first: loss of each task at the first step that had it, 0 before.
    """

    weights: Array
    first: Array


@dataclasses.dataclass(frozen=True)
class GradNorm:
    r"""Weights of losses that learn to give each task a gradient norm that fits its progress.

    $$\bar G = \frac{1}{n} \sum_i w_i \|g_i\|,\quad r_i = \frac{L_i / L_i(0)}{\frac{1}{n} \sum_j
    L_j / L_j(0)},\quad w_i \leftarrow w_i - \eta\,\nabla_{w_i} \sum_j \big| w_j \|g_j\| -
    \bar G r_j^\alpha \big| \Big/ \bar G$$ with $\bar G$ and $r_j$ held constant; then all $w$, none
    below `least`, are scaled to the sum $n$. The division by $\bar G$ is ours: the paper's $\eta$
    fits one size of gradients. A task that is not in a batch keeps its weight.

    Args:
      alpha: $\alpha$; at 0 all norms are to be alike, above it slow tasks pull more.
      rate: $\eta$.
      least: smallest weight.

    Raises:
      ConfigError: a setting out of range.

    References:
      Chen et al. 2018, GradNorm, section 3.2 and algorithm 1.
    """

    alpha: float = 1.5
    rate: float = 0.025
    least: float = 1e-3

    def __post_init__(self) -> None:
        for name, wanted in (("alpha", "0 or above"), ("rate", "positive"), ("least", "positive")):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            least = 0 <= value if name == "alpha" and number else number and 0 < value
            if not (least and value < math.inf):
                raise ConfigError(f"gradnorm: {name}={brief(value)} is not a number {wanted}")

    def init(self, tasks: int) -> GradNormState:
        """Returns the state before the first step."""
        return GradNormState(jnp.ones(tasks, jnp.float32), jnp.zeros(tasks, jnp.float32))

    def advance(self, state: GradNormState, losses: Array, norms: Array) -> GradNormState:
        """Returns the state after a step.

        Args:
          state: of the step.
          losses: $L_i$; that of a task which is not in the batch is 0.
          norms: $\\|g_i\\|$, without the weights.
        """
        w, here = state.weights, norms > 0
        count = jnp.maximum(jnp.sum(here), 1).astype(jnp.float32)
        first = jnp.where((state.first == 0) & here, losses, state.first)
        progress = jnp.where(here, losses / jnp.where(here, first, 1.0), 0.0)
        relative = progress * count / jnp.maximum(jnp.sum(progress), 1e-30)
        mean = jnp.sum(w * norms) / count
        # a loss that has fallen to 0 or below has no power of its own
        target = mean * jnp.maximum(relative, 0.0) ** self.alpha
        slope = jnp.sign(w * norms - target) * norms / jnp.where(mean > 0, mean, 1.0)
        moved = jnp.where(here, jnp.maximum(w - self.rate * slope, self.least), 0.0)
        scaled = moved * (jnp.sum(jnp.where(here, w, 0.0)) / jnp.maximum(jnp.sum(moved), 1e-30))
        return GradNormState(jnp.where(here, scaled, w), first)


@dataclasses.dataclass(frozen=True)
class Combination:
    """How the gradients of several tasks become one; see `mpjax.ops.Combine`.

    Args:
      names: of the losses.
      gradnorm: weights of the gradients, or None for 1 each.
      pcgrad: whether opposed gradients are projected.
      own_scales: whether each loss has a loss scale of its own.
    """

    names: tuple[str, ...]
    gradnorm: GradNorm | None = None
    pcgrad: bool = False
    own_scales: bool = False

    def init(self) -> GradNormState | None:
        """Returns the state before the first step."""
        return None if self.gradnorm is None else self.gradnorm.init(len(self.names))

    def __call__(
        self, grads: Sequence[Grads], losses: Array, key: Key, state: GradNormState | None
    ) -> tuple[Grads, GradNormState | None, Metrics]:
        """Returns the gradients of the step, the next state, and the weight of each loss."""
        if not (self.gradnorm or self.pcgrad):
            return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), grads), None, {}
        shared, gram = products(grads)
        own = jnp.ones(len(self.names), jnp.float32)
        metrics: Metrics = {}
        if self.gradnorm is not None:
            assert state is not None  # of `init`
            own = state.weights
            metrics = {f"weight/{n}": w for n, w in zip(self.names, own, strict=True)}
            state = self.gradnorm.advance(state, losses, jnp.sqrt(jnp.diagonal(gram)))
        joint = own * pcgrad(gram * own[:, None] * own[None, :], key) if self.pcgrad else own
        leaves = [jax.tree.leaves(one) for one in grads]
        total = [
            sum(jnp.where(both, joint[i], own[i]) * g for i, g in enumerate(leaf))
            for both, *leaf in zip(shared, *leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(grads[0]), total), state, metrics
