"""Rotary position embedding."""

from __future__ import annotations

import jax.numpy as jnp
import jmp
from jaxtyping import Array, Float, Int


def rotary(
    x_BTHK: Float[Array, "B T H K"],
    positions_T: Int[Array, " T"],
    policy: jmp.Policy,
    *,
    theta: float = 10000.0,
) -> Float[Array, "B T H K"]:
    r"""Rotates the pairs $(x_j, x_{j + K/2})$ by the angle $t\,\theta^{-2j/K}$.

    Args:
      x_BTHK: queries or keys; K is even.
      positions_T: position $t$ of each token.
      policy: angles are float32 (bfloat16 cannot count past 256); the rotation runs in the
        compute dtype and the result has the output dtype.
      theta: base of the frequencies.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> x = jnp.ones((1, 1, 1, 2))
      >>> rotary(x, jnp.array([0]), parse_policy("f32")).ravel().tolist()
      [1.0, 1.0]

    References:
      Su et al. 2021, RoFormer, section 3.2.2 (halves, not interleaved pairs).
    """
    half = x_BTHK.shape[-1] // 2
    frequency_J = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_TJ = positions_T.astype(jnp.float32)[:, None] * frequency_J[None, :]
    cos = jnp.cos(angle_TJ)[None, :, None, :].astype(policy.compute_dtype)
    sin = jnp.sin(angle_TJ)[None, :, None, :].astype(policy.compute_dtype)
    a, b = jnp.split(x_BTHK.astype(policy.compute_dtype), 2, axis=-1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(policy.output_dtype)
