"""The global norm of gradients, right where their squares overflow float32 or vanish."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mpjax.optim.gate import bits
from mpjax.optim.loss_scale.scaled import check_plain
from mpjax.typing import PyTree


def _scaled_norm(leaves: Sequence[Array]) -> Float[Array, ""]:
    """The norm by way of a power of two, which scales extreme numbers to about 1; else it is 1."""
    wide = [x.astype(jnp.float32) for x in leaves]
    sizes = [jnp.max(jnp.abs(x)) for x in wide if x.size]
    amax = jnp.max(jnp.stack(sizes)) if sizes else jnp.float32(1)
    field = bits(amax).astype(jnp.int32) >> 23  # of 2^e: e + 127; 255 is inf or NaN
    ordinary = (abs(field - 127) <= 40) | (field == 0) | (field == 255)
    inverse = jnp.clip(254 - field, 1, 253)  # of 2^-e, and 2^126 at most
    power = jnp.where(ordinary, 127, inverse) << 23
    unit = jax.lax.bitcast_convert_type(power, jnp.float32)
    return _plain_norm([x * unit for x in wide]) / unit


def _plain_norm(leaves: Sequence[Array]) -> Float[Array, ""]:
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def global_norm(tree: PyTree) -> Float[Array, ""]:
    r"""Returns $\sqrt{\sum x^2}$ over all leaves, in float32; no square overflows.

    Example:
      >>> float(global_norm({"w": jnp.array([3e30, 4e30])}) / 5e30)
      1.0

    Raises:
      ConfigError: gradients that are still scaled.
    """
    check_plain("global_norm", tree)
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    norm = _plain_norm(leaves)
    # A branch: what is computed in the ordinary case, and its bits, stay as they are.
    odd = jnp.isinf(norm) | (norm < 2.0**-50)
    return jax.lax.cond(odd, _scaled_norm, lambda _: norm, leaves)
