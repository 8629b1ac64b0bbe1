"""What a module is told about where it stands: its Precision, path and sharding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jmp
from flax import linen as nn

from mpjax import ops
from mpjax.formats import quantize
from mpjax.formats.delayed import AmaxHistory
from mpjax.precision import Precision, Recipe, dtype_name, is_fp8


def unsharded(x: Any, axes: tuple[str | None, ...]) -> Any:
    """Returns x; stands in for a sharding constraint on one device."""
    del axes
    return x


@dataclasses.dataclass(frozen=True)
class Context:
    """The Precision as one part of a model sees it.

    Args:
      precision: the model's Precision.
      prefix: path of the part inside the model, such as ("decoder", "layers", "3").
      shard: constrains an activation to logical axes.
      sites: collects every path that is asked for and what it is, `module`, `weight` or
        `product`; None does not.
    """

    precision: Precision
    prefix: tuple[str, ...]
    shard: Callable[[Any, tuple[str | None, ...]], Any] = unsharded
    sites: dict[str, str] | None = dataclasses.field(default=None, compare=False)

    def policy(self, path: tuple[str, ...], weight: bool = False) -> jmp.Policy:
        """Returns the policy of a module, operation or weight below this part."""
        full = "/".join((*self.prefix, *path))
        if self.sites is not None:
            self.sites.setdefault(full, "weight" if weight else "module")
        return self.precision.policy(full)

    def recipe(self, path: tuple[str, ...]) -> Recipe | None:
        """Returns the recipe of a matrix product below this part."""
        full = "/".join((*self.prefix, *path))
        if self.sites is not None:
            self.sites[full] = "product"
        return self.precision.recipe(full)


At = Callable[..., Context]  # path prefix below the root -> context


def part_key(key: Any, name: str) -> Any:
    """Returns a key for a named part; it does not depend on which other parts exist."""
    return jax.random.fold_in(key, int.from_bytes(name.encode()[:4], "little") % 2**31)


def init_layers(init: Callable[[Any], Any], key: Any, layers: int) -> Any:
    """Returns the parameters of equal layers along a leading axis.

    Args:
      init: key -> the parameters of one layer.
      key: of the model; that of a layer does not depend on how many there are.
      layers: how many.
    """
    first = part_key(key, "layers")
    keys = jnp.stack([jax.random.fold_in(first, layer) for layer in range(layers)])
    return jax.vmap(init)(keys)


def stored(params: Any, precision: Precision) -> Any:
    """Returns drawn weights as stored: those of an fp8 rule as Quantized, a scale for each row."""

    def leaf(path: Any, w: Any) -> Any:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if parts[1] == "layers":
            parts.insert(2, "0")  # all layers are stored alike
        dtype = precision.policy("/".join(parts)).param_dtype
        return quantize(w, dtype_name(dtype), "row", scale_rounding="up") if is_fp8(dtype) else w

    return jax.tree_util.tree_map_with_path(leaf, params)


class Layer(nn.Module):
    """A Linen module that takes its policy by its own path."""

    context: Context

    def policy(self, *operation: str) -> jmp.Policy:
        """Returns the policy of this module, or of an operation inside it."""
        return self.context.policy((*self.path, *operation))

    def weight(self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]):
        """Declares a weight: drawn in float32, so that Precisions pair, then stored by its rule.

        One stored in fp8 stays float32 here, where it is the view of what `Model.init` stores.
        """
        dtype = self.context.policy((*self.path, name), weight=True).param_dtype

        def draw(key: Any) -> Any:
            return init(key, shape, jnp.float32).astype(jnp.float32 if is_fp8(dtype) else dtype)

        return self.param(name, nn.with_partitioning(draw, axes))

    def multiply(self, x: Any, kernel: Any, product: Any = ops.linear) -> Any:
        """Returns x W under this module's policy and recipe; delayed scaling threads its state.

        Args:
          product: `ops.linear`, or what takes its arguments, such as `ops.convolution`.
        """
        recipe = self.context.recipe(self.path)
        if recipe is None or self.is_initializing():
            return product(x, kernel, self.policy(), gradient_dtype=self.gradient_dtype)
        key = self.make_rng("rounding") if self.has_rng("rounding") else None
        amax = None
        if recipe.history and self.has_variable("amax", "kernel"):
            amax = AmaxHistory(*self.get_variable("amax", "kernel"))
        where = "/".join((*self.context.prefix, *self.path))
        out = product(x, kernel, self.policy(), recipe=recipe, key=key, amax=amax, where=where)
        if amax is None:
            return out
        y, amax = out
        self.put_variable("amax", "kernel", amax)
        return y

    @property
    def gradient_dtype(self) -> Any:
        """In which dtype weight gradients are summed."""
        return self.context.precision.gradient_dtype
