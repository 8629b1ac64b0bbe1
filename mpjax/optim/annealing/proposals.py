"""Proposals of simulated annealing: how new weights are drawn from the present ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax.errors import ConfigError, brief
from mpjax.optim.checks import as_transformation, check_positive, update
from mpjax.optim.per_layer.layer_view import each_layer
from mpjax.paths import key_at
from mpjax.typing import Array, Grads, Key, Params, PyTree

# (from, to, gradient at from, temperature) -> log q(to | from), up to a constant
LogDensity = Callable[[Params, Params, Grads, Array], Array]


class Proposal(NamedTuple):
    """How new weights are drawn.

    Args:
      init: params -> state.
      draw: `draw(grads, state, params, key, temperature, extra) -> updates, state`; grads are
        unscaled and float32, params the float32 view of the weights.
      gradient: whether `draw` reads the gradients.
      log_density: $\\log q(\\theta' | \\theta)$, or None where it is the same in both directions.
    """

    init: Callable[[Params], PyTree]
    draw: Callable[[Grads, PyTree, Params, Key, Array, dict[str, object]], tuple[Grads, PyTree]]
    gradient: bool
    log_density: LogDensity | None = None


def _noise(key: Key, like: PyTree) -> PyTree:
    """Standard normal numbers, each leaf's by its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.random.normal(key_at(key, path), x.shape), like
    )


def gaussian(scale: float, *, share: float = 1.0, least: float = 0.01) -> Proposal:
    r"""Returns the proposal $\theta'_i = \theta_i + \alpha\,\sigma_i\,\xi$, without gradients.

    $\sigma_i$ is the root mean square of leaf $i$ of the first weights, so that the proposal is
    the same in both directions.

    Args:
      scale: $\alpha$, relative to a leaf's size.
      share: of the numbers that move, each drawn by itself; the others stay. Few large moves pass
        barriers that a move of all numbers does not.
      least: $\sigma_i$ of leaves that begin smaller, such as biases of 0.

    Raises:
      ConfigError: sizes that are not positive.

    Example:
      >>> proposal = gaussian(0.1)
      >>> weights = {"w": jnp.full(4, 2.0)}
      >>> proposal.init(weights)["w"].item()
      2.0
    """
    for name, value in (("scale", scale), ("least", least), ("share", share)):
        check_positive("proposal", name, value)
    if share > 1:
        raise ConfigError(f"proposal: share={share:g} is above 1; 1 moves all numbers")

    def init(params: Params) -> PyTree:
        def size(w: Array) -> Array:
            return jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(w))), jnp.float32(least))

        return jax.tree.map(size, params)

    def draw(
        grads: Grads, state: PyTree, params: Params, key: Key, temperature: Array,
        extra: dict[str, object],
    ) -> tuple[Grads, PyTree]:  # fmt: skip
        del grads, temperature, extra
        drawn, chosen = jax.random.split(key)
        noise = _noise(drawn, params)
        if share < 1:
            noise = jax.tree_util.tree_map_with_path(
                lambda path, n: jnp.where(
                    jax.random.bernoulli(key_at(chosen, path), share, n.shape), n, 0.0
                ),
                noise,
            )
        return jax.tree.map(lambda s, n: jnp.float32(scale) * s * n, state, noise), state

    return Proposal(init, draw, gradient=False)


def langevin(learning_rate: float) -> Proposal:
    r"""Returns the proposal $\theta' = \theta - h \nabla L + \sqrt{2 h T}\,\xi$.

    Its density differs between the two directions,
    $$\log q(\theta' | \theta) = -\frac{\|\theta' - \theta + h \nabla L(\theta)\|^2}{4 h T},$$ for
    which the acceptance makes up with the gradient at $\theta'$ (MALA): then the weights follow
    $e^{-L / T}$ exactly. Without acceptance it is stochastic gradient Langevin dynamics (SGLD).

    Args:
      learning_rate: $h$.

    Raises:
      ConfigError: a rate that is not positive.

    Example:
      >>> langevin(1e-3).gradient
      True

    References:
      Roberts and Tweedie 1996, Exponential Convergence of Langevin Distributions; Welling and Teh
      2011, Bayesian Learning via Stochastic Gradient Langevin Dynamics.
    """
    check_positive("proposal", "learning_rate", learning_rate)

    def draw(
        grads: Grads, state: PyTree, params: Params, key: Key, temperature: Array,
        extra: dict[str, object],
    ) -> tuple[Grads, PyTree]:  # fmt: skip
        del extra
        spread = jnp.sqrt(jnp.float32(2 * learning_rate) * temperature)
        noise = _noise(key, params)
        step = jnp.float32(learning_rate)
        return jax.tree.map(lambda g, n: spread * n - step * g, grads, noise), state

    def log_density(here: Params, there: Params, grads: Grads, temperature: Array) -> Array:
        def squares(a: Array, b: Array, g: Array) -> Array:
            return jnp.sum(jnp.square(b - a + jnp.float32(learning_rate) * g))

        total = sum(jax.tree.leaves(jax.tree.map(squares, here, there, grads)), jnp.float32(0))
        # At temperature 0 both densities are a point; their ratio is left at 1.
        return -total / jnp.maximum(jnp.float32(4 * learning_rate) * temperature, 1e-30)

    return Proposal(lambda params: (), draw, gradient=True, log_density=log_density)


def random_rate(rates: Sequence[float]) -> Proposal:
    r"""Returns the proposal $\theta' = \theta - h_k \nabla L$ with a rate $h_k$ drawn from a list.

    Args:
      rates: the learning rates.

    Raises:
      ConfigError: no rates, or one that is not positive.

    Example:
      >>> random_rate([0.1, 0.01]).gradient
      True

    References:
      Fischetti and Stringher 2019, Embedded hyper-parameter tuning by Simulated Annealing.
    """
    if isinstance(rates, str) or not isinstance(rates, Sequence) or not rates:
        raise ConfigError(f"proposal: rates={brief(rates)} is no list of learning rates; give some")
    for rate in rates:
        check_positive("proposal", "rates", rate)
    listed = jnp.asarray(rates, jnp.float32)

    def draw(
        grads: Grads, state: PyTree, params: Params, key: Key, temperature: Array,
        extra: dict[str, object],
    ) -> tuple[Grads, PyTree]:  # fmt: skip
        del params, temperature, extra
        rate = jax.random.choice(key, listed)
        return jax.tree.map(lambda g: -rate * g, grads), state

    return Proposal(lambda params: (), draw, gradient=True)


def updates_of(optimizer: optax.GradientTransformation) -> Proposal:
    """Returns the updates of an optax optimizer as proposals.

    Args:
      optimizer: a raw optax optimizer.

    Raises:
      ConfigError: it is no optax optimizer.

    Example:
      >>> updates_of(optax.adam(1e-3)).gradient
      True
    """
    inner = each_layer(as_transformation(optimizer))

    def draw(
        grads: Grads, state: PyTree, params: Params, key: Key, temperature: Array,
        extra: dict[str, object],
    ) -> tuple[Grads, PyTree]:  # fmt: skip
        del key, temperature
        return update(inner, grads, state, params, extra)

    return Proposal(inner.init, draw, gradient=True)
