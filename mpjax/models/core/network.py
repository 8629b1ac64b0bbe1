"""What a model of parts is: a Precision, the paths that take it, one parameter tree, its state."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
from flax import linen as nn

from mpjax.errors import ConfigError
from mpjax.formats.delayed import AmaxHistory
from mpjax.models.core.metadata import NONE, Metadata
from mpjax.models.core.module import At, Context, stored, unsharded
from mpjax.precision import Precision, Recipe, dtype_name, get_precision


class _Outline(NamedTuple):
    """What takes a policy (path -> kind), and the logical axes of each parameter."""

    sites: dict[str, str]
    axes: Any


_OUTLINES: dict[tuple[type, Any], _Outline] = {}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and its Precision; each kind says what its parts are.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
      metadata: what the checkpoint that it was loaded from says beside shape and weights.
    """

    config: Any
    precision: Precision
    shard: Any = unsharded
    # Of no effect on any program, so models that differ in it alone share one.
    metadata: Metadata = dataclasses.field(default=NONE, compare=False, repr=False)

    root: ClassVar[str]  # first part of every path; empty where parts have several
    stateless_product: ClassVar[str] = ""  # path of a product that cannot thread an amax history

    def init_with_axes(self, at: At, key: Any) -> Any:
        """Returns drawn parameters boxed with their logical axes; equal layers are stacked."""
        raise NotImplementedError

    @property
    def layer_counts(self) -> dict[str, int]:
        """Root -> how many layers are stacked below `ROOT/layers`."""
        return {self.root: 0}

    @property
    def extra_sites(self) -> dict[str, str]:
        """Path -> kind of what takes a policy and is not seen while parameters are drawn."""
        return {f"{self.root}/loss": "module"}

    def __post_init__(self) -> None:
        self.precision.check(self.paths, self._of("weight"), self._of("product"))
        self._check_storage()
        recipe = self.recipes.get(self.stateless_product)
        if recipe is not None and recipe.history:
            raise ConfigError(
                f"{self.stateless_product}: recipe {recipe.name!r} keeps an amax history, which a"
                " loss taken in chunks cannot thread; take a recipe without history for it, such as"
                " fp8"
            )

    def _check_storage(self) -> None:
        for path in self._of("weight"):
            parts = path.split("/")
            if parts[1] == "layers":
                first = "/".join([*parts[:2], "0", *parts[3:]])
                own, other = (self.precision.policy(p).param_dtype for p in (path, first))
                if own != other:
                    raise ConfigError(
                        f"{path}: stored in {dtype_name(own)}, layer 0 in {dtype_name(other)};"
                        " layers are stacked in one array, so give all the same p=, and vary only"
                        " c= and o="
                    )

    def at(self, *prefix: str) -> Context:
        """Returns the context of a part."""
        return Context(self.precision, self._prefix + prefix, self.shard)

    @property
    def _prefix(self) -> tuple[str, ...]:
        return (self.root,) if self.root else ()

    def sharded(self, shard: Any) -> Any:
        """Returns the model with its activations constrained by `shard(x, logical_axes)`."""
        return dataclasses.replace(self, shard=shard)

    @property
    def _outline(self) -> _Outline:
        """Traced once for each configuration: every model of one has it, whatever its Precision."""
        own = (type(self), self.config)
        if own not in _OUTLINES:
            _OUTLINES[own] = self._drawn()
        return _OUTLINES[own]

    def _drawn(self) -> _Outline:
        sites: dict[str, str] = {}
        covers_all = get_precision("fp32")

        def at(*prefix: str) -> Context:
            return Context(covers_all, self._prefix + prefix, sites=sites)

        boxed = jax.eval_shape(lambda: self.init_with_axes(at, jax.random.key(0)))
        sites |= self.extra_sites

        def names(path: Any, box: Any) -> tuple[str | None, ...]:
            stacked = path[1].key == "layers"
            return ("layers", *box.names) if stacked else tuple(box.names)

        is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
        axes = jax.tree_util.tree_map_with_path(names, boxed, is_leaf=is_box)

        def layers(path: str) -> list[str]:
            root, *rest = path.split("/")
            if rest[:2] != ["layers", "0"]:
                return [path]
            return [
                "/".join([root, "layers", str(i), *rest[2:]])
                for i in range(self.layer_counts[root])
            ]

        each_layer = {each: kind for path, kind in sites.items() for each in layers(path)}
        return _Outline(each_layer, axes)

    def _of(self, kind: str) -> list[str]:
        return [path for path, found in self._outline.sites.items() if found == kind]

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """All paths that take a policy: modules, operations and parameters."""
        return tuple(self._outline.sites)

    @functools.cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Path of a product -> its recipe."""
        found = {path: self.precision.recipe(path) for path in self._of("product")}
        return {path: recipe for path, recipe in found.items() if recipe is not None}

    @property
    def rounds(self) -> bool:
        """Whether a recipe draws random numbers."""
        return any(recipe.uses_key for recipe in self.recipes.values())

    @property
    def axes(self) -> Any:
        """Logical axes of each parameter, a tree of tuples."""
        return self._outline.axes

    def init(self, key: Any) -> Any:
        """Returns new parameters; equal keys give equal float32 draws under every Precision."""
        return _draw(dataclasses.replace(self, shard=unsharded), key)

    def init_state(self) -> Any:
        """Returns what training threads through the model: amax histories of delayed scaling.

        None where no recipe keeps a history.
        """
        tree: dict[str, Any] = {}
        for path, recipe in self.recipes.items():
            if recipe.history:
                bare = [part for part in path.split("/") if not part.isdigit()]
                layers = (self.layer_counts[bare[0]],) if bare[1] == "layers" else ()
                at = tree
                for part in bare[len(self._prefix) :]:
                    at = at.setdefault(part, {})
                at["kernel"] = AmaxHistory.empty(recipe.history, layers)
        return {"amax": tree} if tree else None


# One program where it is called by itself, part of the caller's jaxpr where it is traced. The model
# is what a program is kept for, so it comes without `shard`, which nothing is drawn by.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _draw(model: Network, key: Any) -> Any:
    return stored(nn.unbox(model.init_with_axes(model.at, key)), model.precision)
