"""Arrays that share no memory, so that each of them can be donated."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mpjax.typing import PyTree, Tree


def _memory(x: object) -> int | tuple[int, ...] | None:
    """The addresses of an array; None for what is never donated, or not computed yet."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or not x.size:
        return None
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) or not x.is_fully_addressable:
        return id(x)
    return tuple(shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards)


def distinct(tree: Tree, besides: PyTree = None) -> Tree:
    """Returns a tree in which no two arrays are one, nor one of `besides`; copies where needed.

    Example:
      >>> w = jnp.ones(2)
      >>> pair = distinct({"a": w, "b": w})
      >>> pair["a"] is w, pair["b"] is w
      (True, False)
    """
    taken = {_memory(x) for x in jax.tree.leaves(besides)}

    def own(x: jax.Array) -> jax.Array:
        memory = _memory(x)
        if memory is None:
            return x
        if memory in taken:
            return jnp.copy(x)
        taken.add(memory)
        return x

    return jax.tree.map(own, tree)


def copied(tree: Tree) -> Tree:
    """Returns a tree whose arrays are copies; tracers are returned as they are."""
    return jax.tree.map(lambda x: x if _memory(x) is None else jnp.copy(x), tree)


def without_repeats(tree: Tree) -> Tree:
    """Returns a tree that holds no array twice; the same tree if it holds none twice."""
    leaves = jax.tree.leaves(tree)
    return tree if len({*map(id, leaves)}) == len(leaves) else distinct(tree)
