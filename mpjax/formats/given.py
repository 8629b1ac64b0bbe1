"""What a caller gives: numbers and random keys, checked where they come in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, brief

ROUNDED = (jnp.float32, jnp.bfloat16, jnp.float16)  # what is rounded and quantised
_NUMBERS = (np.ndarray, np.generic, bool, int, float, complex, list, tuple)


def as_array(x: Any, where: str) -> jax.Array:
    """Returns an array of what was given, which is one already or a list of numbers.

    Args:
      x: an array, a number or a nested list of these.
      where: what to call it in an error.

    Raises:
      ConfigError: it is none of these.

    Example:
      >>> as_array([1.0, 2.0], "x").shape
      (2,)
    """
    if isinstance(x, jax.Array):
        return x
    known = isinstance(x, _NUMBERS) or hasattr(x, "__jax_array__")
    flat = jax.tree.leaves(x) if isinstance(x, list | tuple) else []
    if known and not any(isinstance(one, str | bytes) for one in flat):
        try:
            return jnp.asarray(x)
        except (TypeError, ValueError):
            pass
    if hasattr(x, "dequantize"):
        raise ConfigError(f"{where} is quantised already; give its dequantize()")
    cure = "; of a tree, take jax.tree.map" if isinstance(x, dict) else ""
    raise ConfigError(f"{where} is {brief(x)}; give an array{cure}")


def check_key(key: Any, where: str) -> None:
    """Checks that a random key is one.

    Args:
      key: of `jax.random.key` or `jax.random.PRNGKey`.
      where: what needs it.

    Raises:
      ConfigError: it is something else, or holds several keys.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return
        found = f"holds keys of shape {shape}; take one of them, or jax.vmap over them"
    elif dtype == jnp.uint32 and shape == jax.eval_shape(jax.random.PRNGKey, 0).shape:
        return
    else:
        found = f"is {brief(key)}; write jax.random.key(0)"
    raise ConfigError(f"{where}: the random key {found}")
