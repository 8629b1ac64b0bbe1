"""Rotary and sinusoidal positions."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import jmp
from jaxtyping import Array, Float, Int

ROPE_SCALINGS = ("none", "linear", "llama3")


class RopeScaling(NamedTuple):
    r"""How rotary frequencies are stretched for a context longer than the trained one.

    `linear` divides all frequencies by the factor. `llama3` divides those whose wave is longer
    than context / low, leaves those whose wave is shorter than context / high, and goes from one
    to the other in between.

    Args:
      kind: `none`, `linear` or `llama3`.
      factor: of the stretching.
      low: see above.
      high: see above.
      context: tokens of the trained context.

    References:
      Chen et al. 2023, Position Interpolation; Llama Team 2024, section 3.4.2 and its code.
    """

    kind: str = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192


_NONE = RopeScaling()


def _stretched(frequency_J: Array, scaling: RopeScaling) -> Array:
    if scaling.kind == "none":
        return frequency_J
    slow_J = frequency_J / scaling.factor
    if scaling.kind == "linear":
        return slow_J
    waves_J = scaling.context * frequency_J / (2 * math.pi)  # how many fit into the context
    share_J = jnp.clip((waves_J - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (1 - share_J) * slow_J + share_J * frequency_J


def rotary(
    x_BTHK: Float[Array, "B T H K"],
    positions: Int[Array, " T"] | Int[Array, "B T"],
    policy: jmp.Policy,
    *,
    theta: float = 10000.0,
    scaling: RopeScaling = _NONE,
) -> Float[Array, "B T H K"]:
    r"""Rotates the pairs $(x_j, x_{j + K/2})$ by the angle $t\,\theta^{-2j/K}$.

    Args:
      x_BTHK: queries or keys; K is even.
      positions: position $t$ of each token, the same in all rows or of each row.
      policy: angles are float32 (bfloat16 cannot count past 256); the rotation runs in the
        compute dtype and the result has the output dtype.
      theta: base of the frequencies.
      scaling: how they are stretched.

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
    frequency_J = _stretched(frequency_J, scaling)
    angle = positions.astype(jnp.float32)[..., None] * frequency_J[(None,) * positions.ndim]
    dtype, rows = policy.compute_dtype, (None,) * (2 - positions.ndim)
    cos, sin = (wave(angle)[*rows, ..., None, :].astype(dtype) for wave in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BTHK.astype(dtype), 2, axis=-1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(policy.output_dtype)


def sinusoid(positions: Int[Array, "*N"], width: int) -> Float[Array, "*N D"]:
    r"""Returns $\sin(t\,10000^{-2j/D})$ and $\cos$ of the same in turn, in float32.

    Args:
      positions: position $t$ of each token.
      width: D, even.

    Example:
      >>> sinusoid(jnp.array([0]), 4).tolist()
      [[0.0, 1.0, 0.0, 1.0]]

    References:
      Vaswani et al. 2017, section 3.5.
    """
    half = width // 2
    frequency_J = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    # bfloat16 cannot count past 256
    angle = positions.astype(jnp.float32)[..., None] * frequency_J.reshape(
        (1,) * positions.ndim + (-1,)
    )
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, width)
