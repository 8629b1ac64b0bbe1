"""A product under a recipe, `dot_general` first: forward and both ways backward."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import ROUNDED, as_array, check_key
from mpjax.formats.delayed import AmaxHistory
from mpjax.formats.tiles import amax_of
from mpjax.ops.checks import Axes, Dims, float_dtype, read_dims
from mpjax.ops.hadamard import hadamard
from mpjax.ops.linear_map import linear_map, with_derivative
from mpjax.ops.quantized_operand import (
    QuantizedOperand,
    backward_dims,
    combine,
    need_key,
    quantize_operand,
)
from mpjax.precision import Recipe, get_recipe

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


def _key(data: Any, number: int) -> Any:
    if data is None:
        return None
    return jax.random.fold_in(jax.random.wrap_key_data(data, impl=PRNG), number)


def _part(amax: Any, number: int) -> Any:
    return None if amax is None else amax[number]


# Each is one program where a product is called by itself, part of the caller's jaxpr where it is
# traced. The path of the module says nothing about the numbers: it stays outside, so that two
# modules of equal shapes share a program.
@functools.partial(jax.jit, static_argnums=5, inline=True)
def _multiply(a: Any, b: Any, key: Any, amax: Any, observed_amax: Any, spec: ProductSpec) -> Any:
    recipe, ((x_axes, w_axes), *_) = spec.recipe, spec.op.axes(a, b)
    x = a.astype(spec.compute)
    left = quantize_operand(x, recipe.fprop[0], x_axes, _key(key, 0), spec.compute, _part(amax, 0))
    # a weight is quantised as it is stored: a cast before would round it twice
    right = quantize_operand(b, recipe.fprop[1], w_axes, _key(key, 1), spec.compute, _part(amax, 1))
    y = spec.op.fprop(left, right, recipe).astype(spec.output)
    if observed_amax is not None:
        now = [amax_of(v, v.shape).reshape(()) for v in (x, b)]
        observed_amax = jnp.maximum(observed_amax, jnp.stack([*now, jnp.float32(0)]))
    return y, observed_amax


# A product is linear in x, in W and, backwards, in dy. Rounding is taken as the identity
# (straight-through) in derivatives of every order, which are so made of products of the same three
# kinds, each quantised as the recipe says for its kind:
#
#   push  (dx, dW) -> dx W + x dW        at x, W; its transpose is pull
#   pull  dy -> (dy W', x' dy)           at x, W; its transpose is push
#   cross (dx, dW) -> (dy dW', dx' dy)   at dy; it is its own transpose
#
# An operand that is the derivative of another stands in its place. It takes its own amax, since a
# history knows nothing of it, and draws from a key of its own, `_key(key, number)` with the number
# of what was replaced. A dy that is differentiated again takes its own amax too: the history is
# that of the outermost cotangent.
_FOR_X, _FOR_W, _FOR_DY, _FOR_BOTH = 7, 8, 9, 10


def _fresh(amax: Any, *replaced: int) -> Any:
    """The state of delayed scaling without what it knows of operands that were replaced."""
    if amax is None:
        return None
    keep = [float(number not in replaced) for number in range(3)]
    return amax * jnp.asarray(keep, amax.dtype)


def _folded(key: Any, number: int) -> Any:
    return None if key is None else jax.random.key_data(_key(key, number))


def _still(tree: Any) -> Any:
    return jax.tree.map(lax.stop_gradient, tree)


def _forward(a: Any, b: Any, key: Any, amax: Any, observed_amax: Any, spec: ProductSpec) -> Any:
    need_key(spec.recipe, key, False, spec.where)
    operands = a, b, key, amax, observed_amax
    outs = _multiply(*_still(operands), spec._replace(where=""))
    return with_derivative(OfProduct(spec), outs, operands)


# The rule says nothing that the function does not; what walks over a program meets one equation.
_product = jax.custom_jvp(_forward, nondiff_argnums=(5,))


@_product.defjvp
def _product_jvp(spec: ProductSpec, primals: Any, tangents: Any) -> Any:
    a, b, key, amax, observed_amax = primals
    outs = _forward(a, b, key, amax, observed_amax, spec)
    return outs, OfProduct(spec).along(outs, primals, tangents)


class OfProduct(NamedTuple):
    """The derivative of `_multiply`.

    Args:
      spec: the product.
    """

    spec: ProductSpec

    def along(self, outs: Any, operands: Any, tangents: Any) -> Any:
        """The tangents of its results."""
        a, b, key, amax, _ = operands
        da, db, _, _, d_observed = tangents
        # x is kept as the product used it; the weight's cast is repeated, which costs no memory.
        at = a.astype(self.spec.compute), b, key, amax
        return LinearMap("push", self.spec).bind(at, (da, db, d_observed), outs)

    def derivative(self, outs: Any, operands: Any, tangents: Any) -> Any:
        """See `mpjax.ops.linear_map.Rule`."""
        outs = with_derivative(self, outs, operands)
        return outs, self.along(outs, operands, tangents)


def _push(spec: ProductSpec, at: Any, tangents: Any) -> Any:
    a, b, key, amax = at
    da, db, d_observed = tangents
    left = _product(da, b, _folded(key, _FOR_X), _fresh(amax, 0), None, spec)[0]
    right = _product(a, db, _folded(key, _FOR_W), _fresh(amax, 1), None, spec)[0]
    return left + right, d_observed


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _pull_back(spec: ProductSpec, like: Any, operands: Any) -> Any:
    x, b, dy, key, amax = operands
    recipe, compute = spec.recipe, spec.compute
    x, dy = x.astype(compute), dy.astype(compute)
    _, (dy_axes, b_axes), (x_axes, dy_tokens) = spec.op.axes(x, b)

    left = quantize_operand(dy, recipe.dgrad[0], dy_axes, _key(key, 2), compute, _part(amax, 2))
    right = quantize_operand(b, recipe.dgrad[1], b_axes, _key(key, 3), compute, _part(amax, 1))
    dx = spec.op.dgrad(left, right, recipe, x)

    tokens, gradient = x, dy
    if recipe.hadamard and x_axes:
        signs = jax.random.rademacher(_key(key, 4), (recipe.hadamard,), jnp.float32)
        tokens = hadamard(x, x_axes[-1], signs)
        gradient = hadamard(dy, dy_tokens[-1], signs)
    left = quantize_operand(tokens, recipe.wgrad[0], x_axes, _key(key, 5), compute, _part(amax, 0))
    right = quantize_operand(
        gradient, recipe.wgrad[1], dy_tokens, _key(key, 6), compute, _part(amax, 2)
    )
    db = spec.op.wgrad(left, right, recipe, b)
    now = None if amax is None else amax_of(dy, dy.shape).reshape(())
    return (dx.astype(like), db.astype(b.dtype)), now


class OfPull(NamedTuple):
    """The derivative of `_pull_back`.

    Args:
      spec: the product.
      like: dtype of the gradient of x.
    """

    spec: ProductSpec
    like: Any

    def derivative(self, outs: Any, operands: Any, tangents: Any) -> Any:
        """See `mpjax.ops.linear_map.Rule`."""
        (a, b, dy, key, amax), (da, db, ddy, _, _) = operands, tangents
        own = _fresh(amax, 2)
        if amax is not None:  # this dy is not the one that the history is of
            still = _still((a, b, dy, key, own))
            outs, _ = _pull_back(self.spec._replace(where=""), self.like, still)
        outs = with_derivative(self, outs, (a, b, dy, key, own))
        along = LinearMap("pull", *self).bind((a, b, key, own), (ddy,), outs)
        across = LinearMap("cross", *self).bind((dy, key, own), (da, db), outs)
        return outs, tuple(x + y for x, y in zip(along, across, strict=True))


def _pull(spec: ProductSpec, like: Any, operands: Any) -> Any:
    """The gradients of x, in a dtype, and of W; and the amax of dy for delayed scaling."""
    need_key(spec.recipe, operands[3], True, spec.where)
    outs, now = _pull_back(spec._replace(where=""), like, _still(operands))
    return with_derivative(OfPull(spec, like), outs, operands), now


class LinearMap(NamedTuple):
    """One of the maps above; see there.

    Args:
      kind: push, pull or cross.
      spec: the product.
      like: dtype of the gradient of x that it gives, except for push.
    """

    kind: str
    spec: ProductSpec
    like: Any = None

    def bind(self, at: Any, tangents: Any, outs: Any) -> Any:
        """Applies it at a point, to what it is linear in; `outs` are like its results."""
        result, shape = jax.tree.flatten(outs)
        alike = tuple(jax.typeof(x).to_tangent_aval() for x in result)
        return jax.tree.unflatten(shape, linear_map(self, alike, at, tangents))

    def apply(self, at: Any, tangents: Any) -> Any:
        """Its value."""
        spec = self.spec
        if self.kind == "push":
            return _push(spec, at, tangents)
        if self.kind == "pull":
            (a, b, key, amax), (dy,) = at, tangents
            return _pull(spec, self.like, (a, b, dy, _folded(key, _FOR_DY), _fresh(amax, 2)))[0]
        (dy, key, amax), (a, b) = at, tangents
        operands = a, b, dy, _folded(key, _FOR_BOTH), _fresh(amax, 0, 1, 2)
        return _pull(spec, self.like, operands)[0]

    def transpose(self, at: Any, cotangents: Any, tangents: Any) -> Any:
        """The cotangents of `tangents`, which are shapes and dtypes."""
        if self.kind == "pull":
            return (_push(self.spec, at, (*cotangents, None))[0].astype(tangents[0].dtype),)
        if self.kind == "cross":
            return self._replace(like=tangents[0].dtype).apply(at, cotangents)
        (a, b, key, amax), (dy, *observed_amax) = at, cotangents
        (da, db), now = _pull(self.spec, tangents[0].dtype, (a, b, dy, key, amax))
        zero = jnp.float32(0)
        new = [
            jnp.maximum(s, jnp.stack([zero, zero, lax.stop_gradient(now)])) for s in observed_amax
        ]
        return da, db, *new


def product(
    a: Any, b: Any, spec: ProductSpec, key: Any = None, amax: AmaxHistory | None = None
) -> tuple[Any, AmaxHistory | None]:
    """Multiplies under a recipe; the callers are `dot_general` and `linear`.

    Raises:
      ConfigError: delayed scaling without its state, a state that the recipe does not use, or
        operands that are not float32, bfloat16 or float16.
    """
    recipe = spec.recipe
    check_operands(a, b, spec, amax)
    if amax is None:
        return _product(a, b, key_data(key, spec.where), None, None, spec)[0], None
    roomy = amax.amax * jnp.float32(2.0**recipe.margin)
    y, observed_amax = _product(a, b, key_data(key, spec.where), roomy, amax.observed_amax, spec)
    return y, amax._replace(observed_amax=observed_amax)


def dot_general(
    a: Any,
    b: Any,
    dimension_numbers: Any,
    recipe: str | Recipe,
    *,
    key: Any = None,
    amax: AmaxHistory | None = None,
    compute_dtype: Any = None,
    preferred_element_type: Any = None,
    where: str = "dot_general",
) -> Any:
    r"""`lax.dot_general` with operands, and those of both gradients, quantised by a recipe.

    $$y = Q(a) Q(b), \qquad da = Q(dy) Q(b^T), \qquad db = Q(a^T) Q(dy)$$

    Derivatives of every order, forward mode too, are straight-through: they are made of products of
    these three kinds, with what is derived in the place of what it is derived from. Such an operand
    takes its scale from itself, also under delayed scaling, and draws bits of its own.

    Args:
      a: the left operand: activations (x in a Recipe).
      b: the right operand: weights (W).
      dimension_numbers: `((a contracting, b contracting), (a batch, b batch))`.
      recipe: a Recipe or its name.
      key: random key, for recipes that draw (stochastic rounding, Hadamard).
      amax: state of delayed scaling; its `observed_amax` is threaded: use what is returned next.
      compute_dtype: of operands that the recipe does not quantise; by default the dtype of a.
      preferred_element_type: of the result; by default the dtype of a.
      where: what to call the product in an error.

    Returns:
      The product, laid out as by `lax.dot_general`; with delayed scaling `(product, amax)`.

    Raises:
      ConfigError: unknown recipe or dtype, no key or no state where the recipe needs one, operands
        that are not float32, bfloat16 or float16, have no elements or not the axes named.

    Example:
      >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
      >>> dot_general(x, w, (((1,), (0,)), ((), ())), "mxfp8").tolist()[0]
      [3.0, 3.0, 3.0, 3.0]

    References:
      Micikevicius et al. 2022, FP8 Formats for Deep Learning.
    """
    recipe = get_recipe(recipe, where)
    a, b = as_array(a, f"{where}: the left operand"), as_array(b, f"{where}: the right operand")
    dims = read_dims(dimension_numbers, a.shape, b.shape, where)
    compute = float_dtype(compute_dtype, a.dtype, f"{where}: compute_dtype")
    output = float_dtype(preferred_element_type, a.dtype, f"{where}: preferred_element_type")
    y, amax = product(a, b, ProductSpec(Dot(dims), recipe, compute, output, where), key, amax)
    return y if amax is None else (y, amax)
