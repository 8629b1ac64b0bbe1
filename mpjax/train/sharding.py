"""Which mesh axis cuts which logical axis: one table, and what follows from it."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mpjax.errors import ConfigError
from mpjax.formats import Quantized

log = logging.getLogger("mpjax.train")

AXES = ("data", "fsdp", "tensor")
# logical axis -> mesh axes. A mesh axis cuts only one dimension of an array: the first that asks.
TABLE: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "length": (),
    "layers": (),
    None: (),
}

_BLOCKWISE = ("codes", "absmax")  # the arrays of `mpjax.optim.Blockwise`


def parse_mesh(text: str, devices: list[Any] | None = None) -> Mesh:
    """Returns the mesh that `data=2,fsdp=2,tensor=2` describes.

    Args:
      text: sizes of the axes `data` (batch), `fsdp` (batch, and weights cut by width) and
        `tensor` (heads, MLP and vocabulary); left-out axes are 1; empty puts all devices on data.
      devices: the devices to use; all by default.

    Raises:
      ConfigError: unknown axis, a size that is not a positive number, or a product that is not
        the number of devices.

    Example:
      >>> parse_mesh("", jax.devices()[:1]).shape["data"]
      1
    """
    devices = jax.devices() if devices is None else devices
    asked: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES:
            raise ConfigError(f"mesh: unknown axis {axis!r} in {text!r}; known: {' '.join(AXES)}")
        if not size.isdigit() or int(size) < 1:
            raise ConfigError(
                f"mesh: {axis}={size!r} in {text!r} is not a positive whole number; write {axis}=2"
            )
        if axis in asked:
            raise ConfigError(f"mesh: axis {axis!r} stands twice in {text!r}; keep one")
        asked[axis] = int(size)
    sizes = dict.fromkeys(AXES, 1) | asked
    if not text:
        sizes["data"] = len(devices)
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"mesh: {shape} needs {math.prod(sizes.values())} devices, there are {len(devices)};"
            " change the sizes so that their product is the number of devices"
        )
    grid = np.array(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, path: str = ""
) -> PartitionSpec:
    """Returns how an array with these logical axes is cut.

    A dimension that its mesh axes do not divide stays whole, which is logged with its path.
    """
    used: set[str] = set()
    spec: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        free = tuple(a for a in TABLE[name] if mesh.shape[a] > 1 and a not in used)
        parts = math.prod(mesh.shape[a] for a in free)
        if size % parts:
            if path:
                log.warning(
                    "%s: axis %r of size %d is not divided by %s (%d parts); it stays whole",
                    path, name, size, "x".join(free), parts,
                )  # fmt: skip
            free = ()
        used.update(free)
        spec.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*spec)


@dataclasses.dataclass(frozen=True)
class ShardActivations:
    """Constrains an activation to its logical axes on a mesh; give it to `Model.sharded`."""

    mesh: Mesh

    def __call__(self, x: Any, axes: tuple[str | None, ...]) -> Any:
        spec = partition(axes, x.shape, self.mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fitted(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Moves each mesh axis that does not divide its dimension to the largest that it divides."""
    cuts: list[list[str]] = [[] for _ in shape]
    order = sorted(range(len(shape)), key=lambda d: -shape[d])
    for first, entry in enumerate(spec):
        for name in (entry,) if isinstance(entry, str) else entry or ():
            for d in (first, *order):
                if shape[d] % math.prod(mesh.shape[axis] for axis in (*cuts[d], name)) == 0:
                    cuts[d].append(name)
                    break
    return PartitionSpec(*(tuple(c) if len(c) > 1 else c[0] if c else None for c in cuts))


def state_shardings(state: Any, axes: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each leaf of a train state.

    A weight is cut by its logical axes. A leaf of the optimizer state whose path ends in a
    weight's path and that has its shape (a moment, a master copy) is cut like the weight, and so
    are the values of a Quantized and the codes of a Blockwise moment. Its absmax is cut by the same
    mesh axes, along another dimension where a block reaches over the cut. All others, the scales
    of a Quantized too, are whole on every device.

    Args:
      state: a TrainState, abstract or real.
      axes: logical axes of its params, a tree of tuples; None leaves all weights whole.
      mesh: the mesh.

    Returns:
      A NamedSharding for each leaf.
    """

    def is_axes(x: Any) -> bool:
        return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)

    specs: dict[str, tuple[Any, tuple[int, ...]]] = {}
    if axes is not None:
        named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)
        leaves = jax.tree.leaves(state.params, is_leaf=lambda x: isinstance(x, Quantized))
        for (path, names), leaf in zip(named, leaves, strict=True):
            where = _name(path)
            specs[where] = (partition(names, leaf.shape, mesh, where), leaf.shape)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        parts = _name(path).split("/")
        for start in range(len(parts)):
            ending = "/".join(parts[start:])
            found = specs.get(ending) or specs.get(ending.removesuffix("/values"))
            spec, shape = found or (None, None)
            if spec is not None and shape == leaf.shape:
                return NamedSharding(mesh, spec)
            spec, shape = specs.get("/".join(parts[start:-1]), (None, ()))
            if spec is not None and parts[-1] in _BLOCKWISE and len(shape) == leaf.ndim:
                return NamedSharding(mesh, _fitted(spec, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)
