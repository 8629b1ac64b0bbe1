"""Trees with stacked layers: where the stacks are, their layers apart, and stacked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, KeyPath, PyTreeDef

from mpjax.errors import ConfigError
from mpjax.precision import matches
from mpjax.typing import PyTree

Path: TypeAlias = tuple[str, ...]
# Path in a view -> path of the weight, and its layer.
LayerPaths: TypeAlias = dict[Path, tuple[Path, int | None]]
Abstract: TypeAlias = jax.Array | jax.ShapeDtypeStruct
LAYERS = ("**/layers",)


@jax.tree_util.register_pytree_with_keys_class
class Layers:
    """The layers of a stack, each a tree of its own."""

    def __init__(self, layers: Sequence[PyTree]) -> None:
        self.layers = tuple(layers)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[DictKey, PyTree], ...], None]:
        """Keys are those of a dict, which a user's path functions know."""
        named = ((DictKey(str(i)), x) for i, x in enumerate(self.layers))
        return tuple(named), None

    @classmethod
    def tree_unflatten(cls, aux: None, layers: Sequence[PyTree]) -> Layers:
        """See `jax.tree_util`."""
        return cls(layers)


def _is_layers(x: object) -> bool:
    return isinstance(x, Layers)


def parts_of(path: KeyPath) -> Path:
    """Returns a key path as its texts."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def stacks(params: PyTree, stacked: str | Sequence[str] = LAYERS) -> dict[Path, int]:
    """Returns where layers are stacked, and how many they are.

    Args:
      params: weights, or any tree of their structure.
      stacked: path patterns of subtrees. One counts if its children are not numbered and all its
        leaves have a first axis of one size.

    Example:
      >>> stacks({"decoder": {"layers": {"up": jnp.ones((3, 4, 4)), "norm": jnp.ones((3, 4))}}})
      {('decoder', 'layers'): 3}
    """
    patterns = (stacked,) if isinstance(stacked, str) else stacked
    below: dict[Path, list[tuple[str, jax.Array]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parts = parts_of(path)
        for end in range(1, len(parts)):
            # A pattern must match the whole prefix and none of its ancestors.
            if any(_names(pattern, parts[:end]) for pattern in patterns):
                below.setdefault(parts[:end], []).append((parts[end], leaf))
                break
    found = {}
    for prefix, leaves in below.items():
        sizes = {leaf.shape[0] if getattr(leaf, "ndim", 0) else 0 for _, leaf in leaves}
        if len(sizes) == 1 and 0 not in sizes and not any(n.isdigit() for n, _ in leaves):
            found[prefix] = sizes.pop()
    return found


def _names(pattern: str, parts: Path) -> bool:
    if not matches(pattern, "/".join(parts)):
        return False
    return len(parts) == 1 or not matches(pattern, "/".join(parts[:-1]))


def split(
    tree: PyTree, where: Mapping[Path, int], deep: bool, at_most: int | None = None
) -> PyTree:
    """Returns a tree in which each layer has leaves of its own.

    Args:
      tree: of the structure of the weights.
      where: from `stacks`.
      deep: whether the layers stand below each weight's path, not below the stack's.
      at_most: how many layers of a stack to show; all by default.
    """

    def apart(path: KeyPath, x: PyTree) -> PyTree:
        stack = stack_of(parts_of(path), where)
        if stack is None:
            return x
        count = where[stack] if at_most is None else min(where[stack], at_most)
        return _layers(x, count)

    leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree,
        is_leaf=lambda path, _: not deep and parts_of(path) in where,
        is_leaf_takes_path=True,
    )
    return jax.tree.unflatten(structure, [apart(path, x) for path, x in leaves])


def _layers(stack: PyTree, count: int) -> Layers:
    """The first layers of a stack."""

    def layer(a: Abstract, index: int) -> Abstract:
        if isinstance(a, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
        return a[index]

    return Layers([jax.tree.map(lambda a, i=i: layer(a, i), stack) for i in range(count)])


def joined(tree: PyTree) -> PyTree:
    """Returns a tree with its layers stacked again."""

    def stack(x: PyTree) -> PyTree:
        if not _is_layers(x):
            return x
        structures = {jax.tree.structure(layer) for layer in x.layers}
        if len(structures) > 1:
            raise ConfigError(
                "optimizer: it keeps other states for some layers than for others, and layers are"
                " stacked in one array; give all layers of a stack the same mask or label"
            )
        return jax.tree.map(lambda *layers: jnp.stack(layers), *x.layers)

    return jax.tree.map(stack, tree, is_leaf=_is_layers)


def split_like(tree: PyTree, like: PyTree) -> PyTree:
    """Returns a stacked state with its layers apart, as in `like`."""

    def split(shown: PyTree, x: PyTree) -> PyTree:
        return _layers(x, len(shown.layers)) if _is_layers(shown) else x

    return jax.tree.map(split, like, tree, is_leaf=_is_layers)


def structure_of(tree: PyTree) -> PyTreeDef:
    """Returns the structure of a tree."""
    return jax.tree.structure(tree)


def stack_of(path: Path, where: Mapping[Path, int]) -> Path | None:
    """Returns the stack that a weight's path lies in."""
    return next((p for p in where if path[: len(p)] == p), None)


def one_layer(tree: PyTree, where: Mapping[Path, int]) -> PyTree:
    """Returns the shapes and dtypes of a tree, those of one layer in the place of a stack."""

    def leaf(path: KeyPath, x: Abstract) -> jax.ShapeDtypeStruct:
        inside = stack_of(parts_of(path), where) is not None
        return jax.ShapeDtypeStruct(x.shape[1:] if inside else x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def own_paths(params: PyTree) -> LayerPaths:
    """Returns path -> the same path and no layer, for weights as they are."""
    paths = (parts_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    return {path: (path, None) for path in paths}


def layer_paths(shapes: PyTree, where: Mapping[Path, int], deep: bool) -> LayerPaths:
    """Returns path in a view -> path of the weight, and its layer."""
    found: LayerPaths = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(split(shapes, where, deep, at_most=2)):
        parts = parts_of(path)
        prefix = stack_of(parts, where)
        at = -1 if deep else len(prefix or ())
        if prefix is None:
            found[parts] = (parts, None)
        else:
            bare = parts[:-1] if deep else (*parts[:at], *parts[at + 1 :])
            found[parts] = (bare, int(parts[at]))
    return found
