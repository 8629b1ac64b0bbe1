"""Checks of arguments: arrays, batches, random keys and names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, brief
from mpjax.paths import path_name
from mpjax.typing import Array, Batch

ROUNDED = (jnp.float32, jnp.bfloat16, jnp.float16)  # what is rounded and quantised
_NUMBERS = (np.ndarray, np.generic, bool, int, float, complex, list, tuple)


def did_you_mean(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """Returns `did you mean X or Y? ` with the known names nearest to another; empty if none is.

    Example:
      >>> did_you_mean("fixd", ["fixed", "late"])
      'did you mean fixed? '
    """
    near = difflib.get_close_matches(name, list(known), count, cutoff)
    return f"did you mean {' or '.join(near)}? " if near else ""


def as_array(x: object, where: str) -> Array:
    """Returns an array: the argument if it is one, else made of its numbers.

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
    if known and not any(isinstance(one, str | bytes) for one in jax.tree.leaves(x)):
        try:
            return jnp.asarray(x)
        except (TypeError, ValueError):
            pass
    if hasattr(x, "dequantize"):
        raise ConfigError(f"{where} is quantised already; give its dequantize()")
    cure = "; of a tree, take jax.tree.map" if isinstance(x, dict) else ""
    raise ConfigError(f"{where} is {brief(x)}; give an array{cure}")


def as_batch(batch: Batch) -> Batch:
    """Returns a batch of another library as JAX takes it; one of NumPy or JAX arrays as it is.

    Args:
      batch: a tree of arrays; a mapping that is no pytree, such as a `BatchEncoding` of
        transformers, becomes a dict, and a tensor that NumPy can read an array.

    Example:
      >>> import collections
      >>> as_batch(collections.UserDict(x=np.zeros(2)))
      {'x': array([0., 0.])}
    """
    if isinstance(batch, Mapping) and jax.tree_util.all_leaves([batch]):
        batch = dict(batch)
    if all(isinstance(x, np.ndarray | jax.Array) for x in jax.tree.leaves(batch)):
        return batch
    return jax.tree.map(_from_tensor, batch)


def _from_tensor(x: object) -> object:
    # NumPy's own scalars and Python's numbers have no rows, which is said where rows are counted.
    foreign = not isinstance(x, np.generic | np.ndarray | jax.Array) and hasattr(x, "ndim")
    return np.asarray(x) if foreign and hasattr(x, "__array__") else x


def batch_rows(batch: Batch, where: str) -> set[int]:
    """Returns how many rows the arrays of a batch have.

    Args:
      batch: a tree of NumPy or JAX arrays whose first axis is that of the examples.
      where: what takes it.

    Raises:
      ConfigError: a leaf is something else, or an array has no rows.

    Example:
      >>> batch_rows({"inputs": np.zeros((2, 3)), "targets": np.zeros(2)}, "step")
      {2}
    """
    rows = set()
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        array = isinstance(x, np.ndarray | jax.Array) and x.ndim
        if not array or (isinstance(x, np.ndarray) and x.dtype.kind in "OSUMm"):
            raise ConfigError(
                f"{where}: {_leaf(path, x)}; give arrays whose first axis is that of the examples"
            )
        rows.add(x.shape[0])
        if not x.shape[0]:
            raise ConfigError(f"{where}: {_leaf(path, x)}, no example; leave an empty batch out")
    return rows


def _leaf(path: jax.tree_util.KeyPath, leaf: object) -> str:
    what = "an array of no axes" if getattr(leaf, "shape", None) == () else brief(leaf)
    name = path_name(path)
    return f"{name} of the batch is {what}" if name else f"the batch is {what}"


def check_key(key: object, where: str) -> None:
    """Checks that an argument is one random key.

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
