"""A training step without anything of mpjax, which ours is compared with."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from mpjax.typing import Array, Batch, Params

State = tuple[Params, optax.OptState]


def make_step(
    loss: Callable[[Params, Batch], Array], optimizer: optax.GradientTransformation
) -> tuple[jax.stages.Wrapped, Callable[[Params], State]]:
    """Returns the compiled step (state, batch) -> (state, loss), and params -> state.

    Args:
      loss: (params, batch) -> number.
      optimizer: of optax.
    """

    def step(state: State, batch: Batch) -> tuple[State, Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return jax.jit(step, donate_argnums=0), lambda params: (params, optimizer.init(params))
