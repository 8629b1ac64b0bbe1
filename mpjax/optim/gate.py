"""The finite gate: a step whose gradients are not all finite changes nothing."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

from mpjax.paths import leaves_with_names
from mpjax.typing import PyTree, Tree


class GateState(NamedTuple):
    """Counters of the finite gate.

    Args:
      skipped: steps skipped so far.
      stuck: skips in a row while the loss scale could not fall.
      bad_leaf: index of the first non-finite gradient leaf at the last skip, -1 before any.
    """

    skipped: Int[Array, ""]
    stuck: Int[Array, ""]
    bad_leaf: Int[Array, ""]

    @classmethod
    def zero(cls) -> GateState:
        """Returns the state before the first step."""
        return cls(jnp.int32(0), jnp.int32(0), jnp.int32(-1))


def finite_by_leaf(tree: PyTree) -> Bool[Array, " leaves"]:
    """Returns for each leaf whether all its numbers are finite; integers always are."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves) if leaves else jnp.ones(1, jnp.bool_)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Returns whether every number of a tree is finite, over all shards of sharded arrays.

    Example:
      >>> all_finite({"w": jnp.array([1.0, jnp.inf])}).item()
      False
    """
    return jnp.all(finite_by_leaf(tree))


def bits(x: Array) -> UInt[Array, "..."]:
    """Returns a floating-point array's bit patterns as unsigned integers."""
    return jax.lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")


def choose(take: Bool[Array, "..."], a: Array, b: Array) -> Array:
    """Returns `a` where `take`, else `b`, both bit for bit."""
    if not jnp.issubdtype(a.dtype, jnp.floating) or jnp.finfo(a.dtype).bits >= 32:
        return jnp.where(take, a, b)
    # XLA's CPU backend selects low floats through float32, which rewrites NaN payloads.
    return jax.lax.bitcast_convert_type(jnp.where(take, bits(a), bits(b)), a.dtype)


def select(finite: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    """Returns `new` where finite, else `old` bit for bit (leaves are chosen, not computed)."""
    return jax.tree.map(functools.partial(choose, finite), new, old)


def no_update(updates: Tree) -> Tree:
    """Returns the update that leaves every weight's bits alone, -0.0 included: -0.0."""
    return jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)


def record(
    state: GateState, finite_leaves: Bool[Array, " leaves"], at_minimum: Bool[Array, ""]
) -> GateState:
    """Returns the gate's state after a step with these leaves finite."""
    finite = jnp.all(finite_leaves)
    return GateState(
        jnp.where(finite, state.skipped, state.skipped + 1),
        jnp.where(finite | ~at_minimum, 0, state.stuck + 1),
        jnp.where(finite, state.bad_leaf, jnp.argmin(finite_leaves).astype(jnp.int32)),
    )


def leaf_path(tree: PyTree, index: int) -> str:
    """Returns the path of a tree's leaf by its index, joined by `/`.

    Example:
      >>> leaf_path({"a": {"w": 1, "v": 2}}, 1)
      'a/w'
    """
    return leaves_with_names(tree)[index][0]
