"""A training step without anything of mpjax, which ours is compared with."""

from __future__ import annotations

from typing import Any

import jax
import optax


def make_step(loss: Any, optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
    """Returns the compiled step (state, batch) -> (state, loss), and params -> state.

    Args:
      loss: (params, batch) -> number.
      optimizer: of optax.
    """

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return jax.jit(step, donate_argnums=0), lambda params: (params, optimizer.init(params))
