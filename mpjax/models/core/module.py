"""The base of all modules, and its context: Precision, path and sharding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import jmp
from flax import linen as nn

from mpjax import ops
from mpjax.formats import Quantized, quantize
from mpjax.formats.delayed import AmaxHistory
from mpjax.paths import path_name
from mpjax.precision import Precision, Recipe, dtype_name, is_fp8
from mpjax.typing import Array, Axes, DTypeLike, Key, Params, PyTree, Shape, Shard

# The arguments of `ops.linear` -> y, or (y, histories) with delayed scaling.
Product: TypeAlias = Callable[..., Array | tuple[Array, AmaxHistory]]


def unsharded(x: Array, axes: Axes) -> Array:
    """Returns x: the sharding constraint of a single device."""
    del axes
    return x


def parts_of(shard: Shard, axis: str | None, size: int) -> int:
    """Returns into how many parts a constraint cuts a dimension of a logical axis.

    Of a constraint of one's own nothing is known: 1.
    """
    parts = getattr(shard, "parts", None)
    return 1 if parts is None else parts(axis, size)


@dataclasses.dataclass(frozen=True)
class Context:
    """The Precision and the path of one part of a model.

    Args:
      precision: the model's Precision.
      prefix: path of the part inside the model, such as ("decoder", "layers", "3").
      shard: constrains an activation to logical axes.
      sites: path -> `module`, `weight` or `product`, of each path that is asked for; None
        records nothing.
    """

    precision: Precision
    prefix: tuple[str, ...]
    shard: Shard = unsharded
    sites: dict[str, str] | None = dataclasses.field(default=None, compare=False)

    def full(self, path: tuple[str, ...] = ()) -> str:
        """Returns the path of something below this part, from the root of the model."""
        return "/".join((*self.prefix, *path))

    def policy(self, path: tuple[str, ...] = (), weight: bool = False) -> jmp.Policy:
        """Returns the policy of a module, operation or weight below this part."""
        full = self.full(path)
        if self.sites is not None:
            self.sites.setdefault(full, "weight" if weight else "module")
        return self.precision.policy(full)

    def recipe(self, path: tuple[str, ...] = ()) -> Recipe | None:
        """Returns the recipe of a matrix product below this part."""
        full = self.full(path)
        if self.sites is not None:
            self.sites[full] = "product"
        return self.precision.recipe(full)


At = Callable[..., Context]  # path prefix below the root -> context


def part_key(key: Key, name: str) -> Key:
    """Returns a key for a named part; it does not depend on which other parts exist."""
    return jax.random.fold_in(key, int.from_bytes(name.encode()[:4], "little") % 2**31)


def init_layers(init: Callable[[Key], Params], key: Key, layers: int) -> Params:
    """Returns the parameters of equal layers along a leading axis.

    Args:
      init: key -> the parameters of one layer.
      key: of the model; that of a layer does not depend on how many there are.
      layers: how many.
    """
    first = part_key(key, "layers")
    keys = jnp.stack([jax.random.fold_in(first, layer) for layer in range(layers)])
    return jax.vmap(init)(keys)


def stored(params: Params, precision: Precision) -> Params:
    """Returns drawn weights as stored: those of an fp8 rule as Quantized, a scale for each row."""

    def leaf(path: jax.tree_util.KeyPath, w: Array) -> Array | Quantized:
        parts = path_name(path).split("/")
        if parts[1] == "layers":
            parts.insert(2, "0")  # all layers are stored alike
        dtype = precision.policy("/".join(parts)).param_dtype
        return quantize(w, dtype_name(dtype), "row", scale_rounding="up") if is_fp8(dtype) else w

    return jax.tree_util.tree_map_with_path(leaf, params)


def run_module(
    module: nn.Module, p: Params, *args: object, history: PyTree = None,
    rngs: dict[str, Key] | None = None,
) -> tuple[PyTree, PyTree]:  # fmt: skip
    """Returns a module's output and its new amax histories; {} if it has none."""
    out, updated = _applied(module, p, args, history, rngs, ["amax"])
    return out, updated.get("amax", {})


def run_collecting(
    module: nn.Module, p: Params, *args: object, history: PyTree = None,
    rngs: dict[str, Key] | None = None,
) -> tuple[PyTree, PyTree, PyTree]:  # fmt: skip
    """Returns what `run_module` does, and what the module and its parts keep by `Layer.keep`."""
    out, updated = _applied(module, p, args, history, rngs, ["amax", "intermediates"])
    return out, updated.get("amax", {}), updated.get("intermediates", {})


def _applied(
    module: nn.Module, p: Params, args: tuple[object, ...], history: PyTree,
    rngs: dict[str, Key] | None, mutable: list[str],
) -> tuple[PyTree, PyTree]:  # fmt: skip
    variables = {"params": p} | ({"amax": history} if history else {})
    return module.apply(variables, *args, rngs=rngs, mutable=mutable)


class Layer(nn.Module):
    """A Linen module that takes its policy by its own path."""

    context: Context

    def policy(self, *operation: str) -> jmp.Policy:
        """Returns the policy of this module, or of an operation inside it."""
        return self.context.policy((*self.path, *operation))

    def weight(
        self, name: str, init: jax.nn.initializers.Initializer, shape: Shape, axes: Axes
    ) -> Array:
        """Declares a weight: drawn in float32, alike under all Precisions, then cast by its rule.

        A weight of an fp8 rule stays float32 here; `stored` quantises it.
        """
        dtype = self.context.policy((*self.path, name), weight=True).param_dtype

        def draw(key: Key) -> Array:
            return init(key, shape, jnp.float32).astype(jnp.float32 if is_fp8(dtype) else dtype)

        return cast(Array, self.param(name, nn.with_partitioning(draw, axes)))  # it is unboxed

    def multiply(
        self, x: Array | ops.Saved, kernel: Array, product: Product = ops.linear, **more: Any
    ) -> Array:
        """Returns x W under this module's policy and recipe; delayed scaling threads its state.

        Args:
          x: what is multiplied, and what is kept of it for the backward pass.
          kernel: the weight W.
          product: `ops.linear`, or what takes its arguments, such as `ops.convolution`.
          more: further arguments of it.
        """
        recipe, key, amax = quantization(self)
        policy, saved = self.policy(), x if isinstance(x, ops.Saved) else ops.Saved(x)
        scales = ops.known_scales(saved, kernel, recipe, policy.compute_dtype, amax)

        def multiplied(
            x: Array, kernel: Array, key: Key | None, amax: AmaxHistory | None, scales: PyTree
        ) -> Any:
            return product(
                x, kernel, policy, gradient_dtype=self.gradient_dtype, recipe=recipe, key=key,
                amax=amax, where=self.context.full(self.path), scales=scales, **more,
            )  # fmt: skip

        out = ops.from_saved(multiplied, (saved,), kernel, key, amax, scales)
        if isinstance(out, tuple):
            out, amax = out
            self.put_variable("amax", "kernel", amax)
        return out

    def keep(self, name: str, x: Array) -> None:
        """Keeps an intermediate where `run_collecting` runs the module; else it does nothing."""
        self.sow("intermediates", name, x, reduce_fn=lambda _, x: x, init_fn=lambda: None)

    @property
    def gradient_dtype(self) -> DTypeLike:
        """In which dtype weight gradients are summed."""
        return self.context.precision.gradient_dtype


# Functions: a method of a Linen module would add its name to the names of operations.
def save_input(layer: Layer, x: Array, product: str = "", axis: str | None = None) -> ops.Saved:
    """Returns x with what the Precision's `residuals` keep of it for the backward pass.

    Args:
      layer: that reads x.
      x: an array.
      product: name of the part of the layer that multiplies it, if one does.
      axis: logical axis of its last dimension, where a mesh may cut that.
    """
    recipe = layer.context.recipe((*layer.path, product)) if product else None
    operand = None if recipe is None else recipe.fprop[0]
    parts = parts_of(layer.context.shard, axis, x.shape[-1]) if axis else 1
    return ops.save_for_backward(x, layer.context.precision.residuals, operand, parts)


def quantization(layer: Layer) -> tuple[Recipe | None, Key | None, AmaxHistory | None]:
    """Returns the recipe, the random key and the amax histories of a layer's product."""
    recipe = layer.context.recipe(layer.path)
    if recipe is None or layer.is_initializing():
        return None, None, None
    key = layer.make_rng("rounding") if layer.has_rng("rounding") else None
    amax = None
    if recipe.history and layer.has_variable("amax", "kernel"):
        amax = AmaxHistory(*layer.get_variable("amax", "kernel"))
    return recipe, key, amax
