"""Update rules: how a weight that is stored low takes its float32 update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.precision import dtype_name


def is_low(leaf: Any) -> bool:
    """Returns whether a leaf is a floating-point array of less than 32 bits."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating)) and leaf.dtype.itemsize < 4


def init_weights(params: Any, update: str) -> dict[str, Any]:
    """Returns the state of an update rule: `{"master": ...}` holds float32 copies of low leaves.

    Args:
      params: the weights as stored.
      update: `none`, `master` or `nearest`.

    Raises:
      ConfigError: low weights without an update rule, or `nearest` with float32 weights only.
    """
    low = [leaf for leaf in jax.tree.leaves(params) if is_low(leaf)]
    if low and update == "none":
        raise ConfigError(
            f"update: weights are stored in {dtype_name(low[0].dtype)}, which needs an update"
            " rule; set update=master (float32 copy) or update=nearest"
        )
    if update == "nearest" and not low:
        raise ConfigError(
            "update: 'nearest' needs weights stored low, all are float32 and are their own master;"
            " store them in p=bf16 or set update=none"
        )
    if update != "master":
        return {}
    copy = jax.tree.map(lambda p: p.astype(jnp.float32) if is_low(p) else None, params)
    return {"master": copy}


def view(params: Any, weights: dict[str, Any]) -> Any:
    """Returns the float32 weights that the optimizer sees: the master copy where there is one."""
    full = jax.tree.map(lambda p: p.astype(jnp.float32) if is_low(p) else p, params)
    if "master" not in weights:
        return full
    return jax.tree.map(
        lambda copy, p: p if copy is None else copy,
        weights["master"],
        full,
        is_leaf=lambda x: x is None,
    )


def store(full: Any, params: Any, weights: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the weights as stored (rounded to nearest even) and the update rule's state."""
    stored = jax.tree.map(lambda f, p: f.astype(p.dtype), full, params)
    if "master" not in weights:
        return stored, weights
    return stored, {"master": jax.tree.map(lambda f, p: f if is_low(p) else None, full, params)}
