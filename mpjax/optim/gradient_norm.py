"""The global norm of gradients, right where their squares overflow float32 or vanish."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpjax.optim.gate import bits
from mpjax.optim.scaled import check_plain


def _unit(leaves: list[Any]) -> Any:
    """A power of two that takes numbers whose squares overflow or vanish to about 1; else 1."""
    sizes = [jnp.max(jnp.abs(x)) for x in leaves if x.size]
    amax = jnp.max(jnp.stack(sizes)) if sizes else jnp.float32(1)
    field = bits(amax).astype(jnp.int32) >> 23  # of 2^e: e + 127; 255 is inf or NaN
    ordinary = (abs(field - 127) <= 40) | (field == 0) | (field == 255)
    inverse = jnp.clip(254 - field, 1, 253)  # of 2^-e, and 2^126 at most
    return jax.lax.bitcast_convert_type(jnp.where(ordinary, 127, inverse) << 23, jnp.float32)


def scaled_norm(tree: Any) -> tuple[Any, Any]:
    """Returns the norm of u x, and the power of two u by which no square overflows or vanishes."""
    leaves = [jnp.asarray(x).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    unit = _unit(leaves)
    squares = [jnp.sum(jnp.square(x * unit)) for x in leaves]
    return jnp.sqrt(sum(squares, start=jnp.float32(0))), unit


def global_norm(tree: Any) -> Float[Array, ""]:
    r"""Returns $\sqrt{\sum x^2}$ over all leaves, in float32; no square overflows.

    Example:
      >>> float(global_norm({"w": jnp.array([3e30, 4e30])}) / 5e30)
      1.0

    Raises:
      ConfigError: gradients that are still scaled.
    """
    check_plain("global_norm", tree)
    norm, unit = scaled_norm(tree)
    return norm / unit
