"""Adam whose second moment is frozen after a warm-up, for gradients that are sent as signs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.typing import Grads, Params, PyTree


class FrozenAdamState(NamedTuple):
    """State of `scale_by_frozen_adam`.

    Args:
      steps: updates so far.
      mu: running mean of gradients.
      nu: running mean of their squares, of the warm-up.
    """

    steps: Int[Array, ""]
    mu: PyTree
    nu: PyTree


def scale_by_frozen_adam(
    warmup: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""Adam's scaling, with a second moment that changes in the first steps alone.

    $$m_t = b_1 m_{t-1} + (1 - b_1) g_t,\quad v_t = b_2 v_{t-1} + (1 - b_2) g_t^2 \;(t \le T),\quad
    v_t = v_T \;(t > T)$$ and $u_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)$, without bias. The
    square of an error of compression adds up where the error itself cancels out.

    Args:
      warmup: T, steps in which the second moment changes.
      b1: decay of the first moment.
      b2: decay of the second one.
      eps: added to the root.

    Raises:
      ConfigError: no step of warm-up.

    Example:
      >>> import optax
      >>> rule = scale_by_frozen_adam(1)
      >>> state = rule.init(jnp.zeros(()))
      >>> for gradient in (1.0, 3.0):
      ...     update, state = rule.update(jnp.float32(gradient), state)
      >>> round(float(state.nu), 6)
      0.001

    References:
      Tang et al. 2021, 1-bit Adam: Communication Efficient Large-Scale Training with Adam's
      Convergence Speed, algorithm 1.
    """
    if not is_whole(warmup, 1):
        raise ConfigError(
            f"warmup: {brief(warmup)} is no number of steps; the second moment needs at least 1"
        )

    def init(params: Params) -> FrozenAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return FrozenAdamState(jnp.int32(0), zeros, jax.tree.map(jnp.copy, zeros))

    def update(
        grads: Grads, state: FrozenAdamState, params: Params = None
    ) -> tuple[Grads, FrozenAdamState]:
        del params
        steps = state.steps + 1
        warm = steps <= warmup

        def square(g: Array, v: Array) -> Array:
            return jnp.where(warm, b2 * v + (1 - b2) * g * g, v)

        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(square, grads, state.nu)
        t = steps.astype(jnp.float32)
        first = 1 - jnp.float32(b1) ** t
        second = 1 - jnp.float32(b2) ** jnp.minimum(t, jnp.float32(warmup))
        updates = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        return updates, FrozenAdamState(steps, mu, nu)

    return optax.GradientTransformation(init, update)


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    warmup: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns the optimizer of `compression="sign,momentum=B1,warmup=WARMUP"`.

    What the replicas exchange after the warm-up is the running mean of the gradient, as signs, and
    this optimizer's first moment is that mean, if b1 is the momentum of the compression.

    Args:
      learning_rate: a number or a schedule.
      warmup: steps of the compression's warm-up.
      b1: decay of the first moment, the compression's momentum.
      b2: decay of the second one.
      eps: added to its root.
      weight_decay: decoupled.

    Raises:
      ConfigError: no step of warm-up.

    Example:
      >>> rule = one_bit_adam(1e-3, warmup=100, weight_decay=0.1)
      >>> state = rule.init({"w": jnp.ones(2)})
    """
    return optax.chain(
        scale_by_frozen_adam(warmup, b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
