"""Paths of a pytree's leaves as text, such as `decoder/layers/up`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import KeyPath

from mpjax.typing import Key, PyTree


def path_name(path: KeyPath) -> str:
    """Returns a key path as text, its parts joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_names(
    tree: PyTree, is_leaf: Callable[[object], bool] | None = None
) -> list[tuple[str, Any]]:
    """Returns the path and the value of each leaf; the path of a lone array is empty.

    Example:
      >>> leaves_with_names({"a": {"w": 1, "v": 2}})
      [('a/v', 2), ('a/w', 1)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path_name(path), leaf) for path, leaf in leaves]


def child_at(node: PyTree, key: object) -> PyTree:
    """Returns the child of a node that a key of a path names; None where only the node knows."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name, None)
    if isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.DictKey):
        index = key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key
        return None if node is None else node[index]
    return None


def key_at(key: Key, path: KeyPath) -> Key:
    """Returns a random key of a leaf, by its path: a leaf that is added changes no other's bits."""
    return jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
