"""What a product is: an operation linear in both operands, and how it is quantised."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import ROUNDED, check_key
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops.checks import Axes, Dims
from mpjax.ops.quantized import QuantizedOperand, backward_dims, combine
from mpjax.precision import Recipe

PRNG = "threefry2x32"


class Bilinear(Protocol):
    """An operation linear in x and in W; hashable. Axes are those that a product sums over."""

    def axes(self, x: Any, w: Any) -> tuple[tuple[Axes, Axes], ...]:
        """Axes of (x, W), (dy, W) and (x, dy) in fprop, dgrad and wgrad."""

    def fprop(self, x: QuantizedOperand, w: QuantizedOperand, recipe: Recipe) -> Any:
        """The result, float32."""

    def dgrad(self, dy: QuantizedOperand, w: QuantizedOperand, recipe: Recipe, x: Any) -> Any:
        """The gradient of x, float32."""

    def wgrad(self, x: QuantizedOperand, dy: QuantizedOperand, recipe: Recipe, w: Any) -> Any:
        """The gradient of W, float32."""


class Dot(NamedTuple):
    """`lax.dot_general`.

    Args:
      dims: its dimension numbers.
    """

    dims: Dims

    def axes(self, x: Any, w: Any) -> tuple[tuple[Axes, Axes], ...]:
        """See `Bilinear`."""
        (d_dims, _), (w_dims, _) = backward_dims(self.dims, x.ndim, w.ndim)
        return self.dims[0], d_dims[0], w_dims[0]

    def fprop(self, x: QuantizedOperand, w: QuantizedOperand, recipe: Recipe) -> Any:
        """See `Bilinear`."""
        return combine(x, w, self.dims, recipe)

    def dgrad(self, dy: QuantizedOperand, w: QuantizedOperand, recipe: Recipe, x: Any) -> Any:
        """See `Bilinear`."""
        (dims, order), _ = backward_dims(self.dims, x.ndim, w.values.ndim)
        return lax.transpose(combine(dy, w, dims, recipe), order)

    def wgrad(self, x: QuantizedOperand, dy: QuantizedOperand, recipe: Recipe, w: Any) -> Any:
        """See `Bilinear`."""
        _, (dims, order) = backward_dims(self.dims, x.values.ndim, w.ndim)
        return lax.transpose(combine(x, dy, dims, recipe), order)


class ProductSpec(NamedTuple):
    """What is static about a product.

    Args:
      op: the operation.
      recipe: how it is quantised.
      compute: dtype of x and dy before they are quantised, and of operands that are not.
      output: dtype of the result.
      where: path of the module, for errors.
    """

    op: Bilinear
    recipe: Recipe
    compute: Any
    output: Any
    where: str


def key_data(key: Any, where: str) -> Any:
    """Returns two words of threefry, whatever kind of key was given."""
    if key is None:
        return None
    check_key(key, where)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if str(jax.random.key_impl(key)) != PRNG:
        return jax.random.bits(key, (2,), jnp.uint32)
    return jax.random.key_data(key)


def check_operands(a: Any, b: Any, spec: ProductSpec, amax: AmaxHistory | None) -> None:
    """Checks operands and state of a product.

    Raises:
      ConfigError: delayed scaling without its state, a state that the recipe does not use, or
        operands that are not float32, bfloat16 or float16.
    """
    recipe = spec.recipe
    for name, x in (("left", a), ("right", b)):
        if x.dtype not in ROUNDED:
            raise ConfigError(
                f"{spec.where}: recipe {recipe.name!r} quantises float32, bfloat16 and float16"
                f" operands, the {name} one is {x.dtype.name}; cast it, or leave the recipe out"
            )
        if x.size == 0:
            raise ConfigError(
                f"{spec.where}: recipe {recipe.name!r} has nothing to quantise, the {name} operand"
                f" has shape {x.shape}; leave the product out"
            )
    if recipe.history and amax is None:
        raise ConfigError(
            f"{spec.where}: recipe {recipe.name!r} takes its scales from past steps and has no"
            " state; pass amax=AmaxHistory.empty(steps) (a model: state=model.init_state()), or"
            f" take a recipe without history, such as fp8"
        )
    if amax is not None and not isinstance(amax, AmaxHistory):
        raise ConfigError(f"{spec.where}: amax is {brief(amax)}; pass AmaxHistory.empty(steps)")
    if amax is not None and not recipe.history:
        raise ConfigError(
            f"{spec.where}: recipe {recipe.name!r} keeps no amax history; leave amax out, or take"
            " fp8-delayed"
        )
