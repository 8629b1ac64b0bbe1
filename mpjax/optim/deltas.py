"""Float32 deltas of weights that are stored low, for loops that add updates as optax does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpjax.errors import ConfigError
from mpjax.formats import is_quantized
from mpjax.optim import checks
from mpjax.optim.gate import bits, choose
from mpjax.optim.loss_scale.scaled import check_plain
from mpjax.optim.update_rules import is_low


class Wrapped(optax.GradientTransformationExtraArgs):
    """Marks what `Optimizer.as_optax` returns, so that it is not wrapped twice."""


def delta_transformation(init: Callable[..., Any], advance: Callable[..., Any]) -> Wrapped:
    """Returns what `Optimizer.as_optax` does; see there.

    Args:
      init: of the optimizer.
      advance: its step, which returns new weights, updates, state and metrics.
    """

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ConfigError("update: params are missing; call update(grads, state, params)")
        if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
            raise ConfigError(
                "as_optax: weights stored in fp8 have scales, which no delta can renew; use"
                " Optimizer.step"
            )
        new_params, updates, state, _ = advance(grads, state, params, extra)
        if state.update_state:  # the weight does not follow its own update, rounded to nearest
            updates = jax.tree.map(_delta, new_params, params, updates)
        return updates, state

    return Wrapped(init, update)


def _delta(new: Any, old: Any, update: Any) -> Any:
    """The float32 delta from a low weight to its new value; other weights take their update."""
    if not is_low(old):
        return update
    delta = new.astype(jnp.float32) - old.astype(jnp.float32)
    return jnp.where(bits(new) == bits(old), jnp.float32(-0.0), delta)


def _add(old: Any, update: Any) -> Any:
    if is_low(old):
        new = (old.astype(jnp.float32) + update).astype(old.dtype)
    else:
        new = old + update
    return choose((update == 0) & jnp.signbit(update), old, new)


def apply_updates(params: Any, updates: Any) -> Any:
    """Returns params + float32 deltas, each in the weight's storage dtype.

    A delta of -0.0 leaves every bit of its weight alone.

    Example:
      >>> apply_updates(jnp.ones(1, jnp.bfloat16), jnp.full(1, 0.25)).dtype.name
      'bfloat16'

    Raises:
      ConfigError: updates of another structure or shape, or scaled gradients.
    """
    check_plain("updates", updates)
    checks.check_like("updates", updates, params)
    return jax.tree.map(_add, params, updates)
