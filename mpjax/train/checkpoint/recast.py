"""Optimizer states of a checkpoint whose moments were stored otherwise than they are now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.errors import ConfigError
from mpjax.optim import Blockwise
from mpjax.optim.moments.convert import (
    Stored,
    describe_format,
    is_block,
    parse_format,
    recast_moments,
)
from mpjax.optim.moments.low_moments import MomentState, moment_of, types_of
from mpjax.paths import child_at, leaves_with_names, path_name
from mpjax.train.checkpoint import leaves
from mpjax.typing import Array, Params, PyTree

Shapes: TypeAlias = Mapping[str, jax.ShapeDtypeStruct]

_WRAPPED = "moments"  # what a MomentState is called in a checkpoint


def describe_nodes(state: PyTree) -> dict[str, str]:
    """Returns what the arrays of a state do not say: path -> description of the node there.

    These are low moments: `moments` for the MomentState, and the format of each that is in codes.
    """
    found = {}

    def is_node(x: object) -> bool:
        return isinstance(x, MomentState)

    def visit(tree: PyTree, prefix: jax.tree_util.KeyPath) -> None:
        for path, x in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: is_block(x) or (is_node(x) and x is not tree)
        ):
            where = (*prefix, *path)
            if is_block(x):
                found[path_name(where)] = describe_format(x)
            elif is_node(x):
                found[path_name(where)] = _WRAPPED
                visit(x, where)

    visit((state,), ())  # below a tuple, so that the root is a node too
    return {name.partition("/")[2]: text for name, text in found.items()}


@dataclasses.dataclass(frozen=True)
class Root:
    """An optimizer's state with low moments, now or in a checkpoint, and what of it was saved.

    Args:
      path: of the state.
      node: the state of the new run, a MomentState or the optimizer's own.
      wrapped: whether a MomentState was saved.
      saved: path below the optimizer's own state -> name in the checkpoint and, of codes, their
        format; what the checkpoint lacks is left out.
    """

    path: str
    node: PyTree
    wrapped: bool
    saved: dict[str, tuple[str, str | None]]

    @property
    def own(self) -> PyTree:
        """The optimizer's own state of the new run."""
        return self.node.inner if isinstance(self.node, MomentState) else self.node

    def parts(self) -> dict[str, Stored]:
        """Returns the leaves of the optimizer's own state, codes as one, by path."""
        return dict(leaves_with_names(self.own, is_block))

    def look_up(self, saved: Shapes, nodes: Mapping[str, str]) -> None:
        """Fills `saved` from what `find_roots` takes."""
        for part, leaf in self.parts().items():
            name = _joined(self.path, "inner" if self.wrapped else "", part)
            codes, absmax = saved.get(f"{name}/codes"), saved.get(f"{name}/absmax")
            if name in saved:
                self.saved[part] = (name, None)
            elif codes is not None and absmax is not None:
                text = nodes.get(name)
                if text is None:  # of an earlier version, which did not write it
                    was = [(a.shape, a.dtype) for a in (codes, absmax)]
                    now = [(a.shape, a.dtype) for a in jax.tree.leaves(leaf)]
                    if not isinstance(leaf, Blockwise) or was != now:
                        raise ConfigError(
                            f"{name}: the checkpoint does not tell the format of its codes; restore"
                            " it with the moments that it was saved with, save, and recast that"
                        )
                    text = describe_format(leaf)
                self.saved[part] = (name, text)

    def below(self, fresh: Iterable[str]) -> list[str]:
        """Returns the names of the new state's arrays that are the root's."""
        start = self.path and f"{self.path}/"
        return [name for name in fresh if name.startswith(start)]

    def names(self) -> dict[str, str]:
        """Returns name in the new state -> path below the optimizer's own state."""
        inner = "inner" if isinstance(self.node, MomentState) else ""
        return {_joined(self.path, inner, part): part for part in self.parts()}

    def wanted(self, where: str, saved: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns what to read: name -> shape, dtype and sharding.

        Raises:
          ConfigError: a shape differs, or a leaf is neither saved nor fresh.
        """
        wanted = {}
        for part, leaf in self.parts().items():
            if part not in self.saved:
                if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf)):
                    raise ConfigError(
                        f"{where}: {_joined(self.path, part)} is not in the checkpoint and"
                        " has no fresh value; pass an initialised state"
                    )
                continue
            name, text = self.saved[part]
            near = {x.shape: x for x in jax.tree.leaves(leaf)}
            expected = [leaf] if text is None else jax.tree.leaves(_abstract(text, leaf))
            held = [name] if text is None else [f"{name}/codes", f"{name}/absmax"]
            for one, x in zip(held, expected, strict=True):
                if saved[one].shape != x.shape:
                    raise ConfigError(
                        f"{where}: {one} has shape {saved[one].shape} in the checkpoint, "
                        f"{x.shape} is wanted here; restore the same model"
                    )
                wanted[one] = leaves.target(near.get(x.shape, saved[one]), saved[one].dtype)
                mesh = getattr(next(iter(near.values())), "sharding", None)
                if x.shape not in near and isinstance(mesh, NamedSharding):
                    whole = NamedSharding(mesh.mesh, PartitionSpec())
                    wanted[one] = jax.ShapeDtypeStruct(x.shape, saved[one].dtype, sharding=whole)
        if self.wrapped and (draws := _joined(self.path, "draws")) in saved:
            node = self.node
            like = node.draws if isinstance(node, MomentState) else saved[draws]
            wanted[draws] = leaves.target(like, saved[draws].dtype)
        return wanted

    def recast(
        self, read: Mapping[str, Array], params: Params
    ) -> tuple[dict[str, Array], list[str]]:
        """Returns the new state's arrays by name, and a line for each moment that changed.

        Args:
          read: what was wanted.
          params: the new run's weights, whose containers are no part of an optimizer's state.

        Raises:
          ConfigError: numbers overflow a dtype.
        """
        lines = []

        def leaf(path: jax.tree_util.KeyPath, x: Stored) -> Stored:
            part = path_name(path)
            if part not in self.saved:
                lines.append(f"{_joined(self.path, part)}: left fresh")
                return x
            name, text = self.saved[part]
            if text is None:
                held = read[name]
            else:
                arrays = [read[f"{name}/codes"], read[f"{name}/absmax"]]
                held = jax.tree.unflatten(jax.tree.structure(_abstract(text, x)), arrays)
            if (was := _kind(held)) != (now := _kind(x)):
                lines.append(f"{_joined(self.path, part)}: {was} -> {now}")
            return held

        own = jax.tree_util.tree_map_with_path(leaf, self.own, is_leaf=is_block)
        draws = read.get(_joined(self.path, "draws"), jnp.int32(0))
        state = MomentState(own, draws) if self.wrapped else own
        new = recast_moments(state, self.node, types_of(params))

        def place(x: Array, like: leaves.Leaf) -> Array:
            sharding = getattr(like, "sharding", None)
            return x if sharding in (None, x.sharding) else jax.device_put(x, sharding)

        new = jax.tree.map(place, new, self.node)
        return {_joined(self.path, n): x for n, x in leaves.named_leaves(new).items()}, lines


def find_roots(state: PyTree, saved: Shapes, nodes: Mapping[str, str]) -> list[Root]:
    """Returns the optimizer states with low moments, now or in a checkpoint.

    Args:
      state: of the new run.
      saved: path -> shape and dtype in the checkpoint.
      nodes: what `describe_nodes` said at the save.

    Raises:
      ConfigError: codes of a format that the checkpoint does not tell.
    """
    found: dict[str, Root] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        node = state
        for place, key in enumerate(path):
            where = path_name(path[:place])
            wrapped = nodes.get(where) == _WRAPPED
            if isinstance(node, MomentState) or wrapped:
                found[where] = Root(where, node, wrapped, {})
                break
            node = child_at(node, key)
    for root in found.values():
        root.look_up(saved, nodes)
    return list(found.values())


def _abstract(text: str, x: Stored) -> Blockwise:
    """A moment in the format that `describe_format` wrote, without numbers."""
    wide = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.eval_shape(lambda y: parse_format(text, y), wide)


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _kind(x: Stored) -> str:
    return str(x.format) if isinstance(x, Blockwise) else str(x.dtype)


def history_owners(state: PyTree, params: Params) -> dict[str, str]:
    """Returns for each leaf of an optimizer's state with moments the path of that state.

    Moments and the count of their steps belong together: Adam's count of 1000 with moments of
    zero makes steps 3 times the learning rate.

    Args:
      state: of the new run.
      params: its weights.
    """
    own, owners, with_moments = types_of(params), {}, set()
    for path, _ in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_block):
        node, owner = state, None
        for place, key in enumerate(path):
            if type(node) in own or is_block(node):
                break
            if isinstance(key, jax.tree_util.GetAttrKey) and not isinstance(node, MomentState):
                owner = path_name(path[:place])
            node = child_at(node, key)
        if owner is None:
            continue
        owners[path_name(path)] = owner
        if moment_of(state, path, own).kind:
            with_moments.add(owner)
    return {name: owner for name, owner in owners.items() if owner in with_moments}
