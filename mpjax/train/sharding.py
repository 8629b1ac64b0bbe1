"""Which mesh axis cuts which logical axis: one table, and what follows from it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mpjax.errors import ConfigError, brief
from mpjax.formats import Quantized, is_quantized
from mpjax.optim import Blockwise
from mpjax.paths import leaves_with_names, path_name
from mpjax.train.replicas import DATA, exchange_spec
from mpjax.typing import Array, Axes, Params, PyTree, Settings, Shape

if TYPE_CHECKING:
    from mpjax.train.local_state import LocalState
    from mpjax.train.step import TrainState

log = logging.getLogger("mpjax.train")

AXES = ("data", "fsdp", "tensor")
# logical axis -> mesh axes. A mesh axis cuts only one dimension of an array: the first that asks.
TABLE: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replicas": ("data",),  # a batch whose fsdp devices cut another dimension
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "length": (),
    "layers": (),
    None: (),
}


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
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
    if not isinstance(text, str):
        raise ConfigError(
            f"mesh: {brief(text)} is no text; write data=2,fsdp=2, or '' for all on data"
        )
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
    axes: Axes, shape: Shape, mesh: Mesh, path: str = "", without: Sequence[str] = ()
) -> PartitionSpec:
    """Returns how an array with these logical axes is cut.

    A dimension that its mesh axes do not divide stays whole, which is logged with its path.

    Args:
      axes: logical axes, one a dimension.
      shape: of the array.
      mesh: the mesh.
      path: of a weight, for the log; empty logs nothing.
      without: mesh axes that cut nothing.
    """
    used = set(without)
    spec: list[str | tuple[str, ...] | None] = []
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
    """Constrains an activation to its logical axes on a mesh; give it to `Model.sharded`.

    Args:
      mesh: the mesh.
      replicas: whether the model runs in each replica of the axis `data` apart, inside a
        `jax.shard_map` over this axis.
    """

    mesh: Mesh
    replicas: bool = False

    def _partition(self, axes: Axes, shape: Shape) -> PartitionSpec:
        return partition(axes, shape, self.mesh, without=("data",) * self.replicas)

    def __call__(self, x: Array, axes: Axes) -> Array:
        spec = self._partition(axes, x.shape)
        # Inside a shard_map a bare spec is one of the mesh that it runs on.
        cut = spec if self.replicas else NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(x, cut)

    def split(
        self, function: Callable[..., Array], axes: Sequence[Axes], *arrays: Array
    ) -> Array:  # fmt: skip
        """Runs a function on each device's part of arrays; its result is cut as the first is.

        Args:
          function: of parts; it must need no other device's.
          axes: logical axes of each array.
          arrays: what the function takes.
        """
        cut = tuple(self._partition(names, x.shape) for names, x in zip(axes, arrays, strict=True))
        here: Settings = dict(mesh=self.mesh)
        if self.replicas:
            here = dict(axis_names=set(AXES) - {"data"})
        mapped = jax.shard_map(function, in_specs=cut, out_specs=cut[0], check_vma=False, **here)
        return mapped(*arrays)

    def parts(self, axis: str | None, size: int) -> int:
        """Into how many parts a dimension of a logical axis is cut."""
        (cut,) = self._partition((axis,), (size,))
        names = (cut,) if isinstance(cut, str) else cut or ()
        return math.prod(self.mesh.shape[name] for name in names)


def _fitted(spec: PartitionSpec, shape: Shape, mesh: Mesh) -> PartitionSpec:
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


def whole(params: Params) -> PyTree:
    """Returns the logical axes of weights that no device cuts."""
    return jax.tree.map(lambda p: (None,) * len(p.shape), params)


def state_shardings(state: TrainState, axes: PyTree, mesh: Mesh) -> TrainState:
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
      The state with a NamedSharding in place of each leaf.
    """

    if getattr(state, "local", None) is not None:  # a state of one's own may have none
        rest = state_shardings(state._replace(local=None), axes, mesh)
        return rest._replace(local=_local_shardings(state, axes, mesh))

    def is_axes(x: object) -> bool:
        return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)

    specs: dict[str, tuple[PartitionSpec, Shape]] = {}
    if axes is not None:
        weights = jax.tree.leaves(state.params, is_leaf=is_quantized)
        for (path, names), p in zip(leaves_with_names(axes, is_axes), weights, strict=True):
            specs[path] = (partition(names, p.shape, mesh, path), p.shape)

    def is_leaf(x: object) -> bool:
        return isinstance(x, Quantized | Blockwise)

    def like(x: PyTree, shape: Shape) -> bool:
        return len(shape) == x.codes.ndim if isinstance(x, Blockwise) else shape == x.shape

    def sharding(path: jax.tree_util.KeyPath, x: PyTree) -> PyTree:
        parts = path_name(path).split("/")
        if parts[0] == "exchange":
            weight, _ = specs.get("/".join(parts[2:]), (PartitionSpec(), ()))
            return NamedSharding(mesh, exchange_spec("/".join(parts[1:]), weight))
        found = (specs.get("/".join(parts[start:])) for start in range(len(parts)))
        spec, _ = next((f for f in found if f and like(x, f[1])), (None, ()))

        def cut(a: Array) -> NamedSharding:
            if spec is None or (isinstance(x, Quantized) and a is not x.values):
                return NamedSharding(mesh, PartitionSpec())
            fitted = isinstance(x, Blockwise)
            return NamedSharding(mesh, _fitted(spec, a.shape, mesh) if fitted else spec)

        return jax.tree.map(cut, x)

    return jax.tree_util.tree_map_with_path(sharding, state, is_leaf=is_leaf)


def _local_shardings(state: TrainState, axes: PyTree, mesh: Mesh) -> LocalState:
    """Each replica's leaves are cut as one state's are."""

    def one(x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    assert state.local is not None
    single = jax.tree.map(one, state.local)
    found = state_shardings(
        state._replace(local=None, exchange=None, **single._asdict()), axes, mesh
    )
    cut = type(state.local)(found.params, found.opt_state, found.model_state)
    return jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(DATA, *s.spec)), cut)
