"""What a caller gives to a model: its parameters and token ids."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError
from mpjax.formats import is_quantized, weight_view
from mpjax.formats.given import as_array


def listed(names: Iterable[str], count: int = 8) -> str:
    """Returns names in one line: all up to a count, else the first ones and how many more."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def below(params: Any, root: str) -> Any:
    """Returns the parameters below a model's root.

    Raises:
      ConfigError: they are another model's, or none.

    Example:
      >>> below({"decoder": {"embed": 1}}, "decoder")
      {'embed': 1}
    """
    if isinstance(params, Mapping) and root in params:
        return params[root]
    held = f"hold {' '.join(map(str, params))}" if isinstance(params, Mapping) else "are no dict"
    raise ConfigError(
        f"{root}: params {held}; pass what init of this model returned, of a training state"
        " state.params"
    )


def as_ids(ids: Any, where: str) -> jax.Array:
    """Returns token ids as an array.

    Args:
      ids: integers of shape (B, T).
      where: what takes them.

    Raises:
      ConfigError: they are something else.

    Example:
      >>> as_ids([[5, 6]], "decoder").shape
      (1, 2)
    """
    found = as_array(ids, f"{where}: ids")
    if found.ndim != 2 or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ConfigError(
            f"{where}: ids are {found.dtype.name} of shape {found.shape}; give integers of shape"
            " (B, T), such as jnp.array([[5, 6]])"
        )
    return found


@functools.lru_cache(maxsize=64)
def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a model's weights."""
    tree = jax.eval_shape(lambda: weight_view(model.init(jax.random.key(0))))
    return {name: leaf.shape for name, leaf in _named(tree).items()}


def _named(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in found}


def check_params(model: Any, params: Any, where: str) -> None:
    """Checks that parameters are a model's; says all that is wrong in one line.

    Args:
      model: the model.
      params: dense or quantised.
      where: what needs them.

    Raises:
      ConfigError: weights that are missing, unexpected or of another shape.
    """
    try:
        wanted = _shapes(model)
    except TypeError:  # a model with an unhashable shard
        wanted = _shapes.__wrapped__(model)
    given = _named(params)
    misshaped = [
        f"{name} is {np.shape(x)}, not {wanted[name]}"
        for name, x in given.items()
        if name in wanted and np.shape(x) != wanted[name]
    ]
    said = [f"{what} {listed(names, 3)}" for what, names in
            (("missing", [name for name in wanted if name not in given]),
             ("unexpected", [name for name in given if name not in wanted]),
             ("misshaped", misshaped)) if names]  # fmt: skip
    if said:
        raise ConfigError(
            f"{where}: params: {'; '.join(said)}; pass the parameters of this model, of a training"
            " state state.params"
        )
