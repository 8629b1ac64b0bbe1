"""How many weights are zero, and how many are to be."""

from __future__ import annotations

import math

import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.formats import Quantized, is_quantized
from mpjax.optim.checks import is_number
from mpjax.optim.fp8_weights import Weight
from mpjax.optim.tree_paths import leaves_with_names
from mpjax.typing import Array, ArrayLike, Params


def named_weights(params: Params) -> dict[str, Weight]:
    """Returns path -> weight, a Quantized being one.

    Raises:
      ConfigError: a leaf that is no array.
    """
    leaves = leaves_with_names(params, is_quantized)
    for name, leaf in leaves:
        if not is_quantized(leaf) and getattr(leaf, "dtype", None) is None:
            raise ConfigError(f"prune: {name} is {brief(leaf)}, not an array; take jnp.asarray")
    return dict(leaves)


def in_float32(leaf: Weight) -> Array:
    """Returns a weight, dequantised if it is a Quantized, in float32."""
    return leaf.dequantize(jnp.float32) if isinstance(leaf, Quantized) else leaf.astype(jnp.float32)


def cubic_sparsity(
    step: ArrayLike, final: int | float, begin: int, end: int, initial: int | float = 0.0
) -> Array:
    r"""Returns the sparsity at a step, $s_f + (s_i - s_f)\,(1 - (t - t_0) / (t_1 - t_0))^3$.

    Args:
      step: $t$.
      final: $s_f$, from $t_1$ on.
      begin: $t_0$, the first pruning.
      end: $t_1$, the last; equal to $t_0$ prunes once.
      initial: $s_i$, at $t_0$; before it nothing is pruned.

    Raises:
      ConfigError: no numbers, or an end before the beginning.

    Example:
      >>> [round(float(cubic_sparsity(t, 0.8, 100, 200)), 3) for t in (100, 150, 200, 999)]
      [0.0, 0.7, 0.8, 0.8]

    References:
      Zhu & Gupta 2017, To prune, or not to prune, equation 1.
    """
    if not all(map(is_number, (final, begin, end, initial))):
        raise ConfigError(
            f"prune: final={brief(final)}, begin={brief(begin)}, end={brief(end)},"
            f" initial={brief(initial)}; give numbers"
        )
    if not begin <= end:
        raise ConfigError(f"prune: end={end} lies before begin={begin}; give a later step")
    t = jnp.clip(jnp.asarray(step, jnp.float32), begin, end)
    rest = (jnp.float32(end) - t) / jnp.float32(max(end - begin, 1))
    return jnp.float32(final) + jnp.float32(initial - final) * rest**3


def sparsity_by_path(params: Params) -> dict[str, float]:
    """Returns the share of zeros of each weight, and of all of them under `total`.

    Args:
      params: arrays or Quantized leaves.

    Raises:
      ConfigError: no weights, or leaves that are none.

    Example:
      >>> sparsity_by_path({"a": jnp.array([0.0, 1.0]), "b": jnp.zeros(2)})
      {'a': 0.5, 'b': 1.0, 'total': 0.75}
    """
    counts = {
        name: (int(jnp.sum(in_float32(leaf) == 0)), math.prod(leaf.shape))
        for name, leaf in named_weights(params).items()
    }
    if not counts:
        raise ConfigError("prune: params hold no weight; give a tree of arrays")
    zeros, sizes = zip(*counts.values(), strict=True)
    shares = {name: zero / size for name, (zero, size) in counts.items()}
    return shares | {"total": sum(zeros) / sum(sizes)}
