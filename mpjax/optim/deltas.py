"""Float32 deltas of weights that are stored low, for loops that add updates as optax does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mpjax.optim import checks
from mpjax.optim.gate import bits, choose
from mpjax.optim.loss_scale.scaled import check_plain
from mpjax.optim.update_rules import is_low
from mpjax.typing import Array, Grads, Tree


class Wrapped(optax.GradientTransformationExtraArgs):
    """Marks what `Optimizer.as_optax` returns, so that it is not wrapped twice."""


def delta(new: Array, old: Array, update: Array) -> Array:
    """Returns the float32 delta from a low weight to its new value; of others, the update."""
    if not is_low(old):
        return update
    difference = new.astype(jnp.float32) - old.astype(jnp.float32)
    return jnp.where(bits(new) == bits(old), jnp.float32(-0.0), difference)


def _add(old: Array, update: Array) -> Array:
    if is_low(old):
        new = (old.astype(jnp.float32) + update).astype(old.dtype)
    else:
        new = old + update
    return choose((update == 0) & jnp.signbit(update), old, new)


def apply_updates(params: Tree, updates: Grads) -> Tree:
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
