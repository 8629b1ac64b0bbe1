"""Products under a recipe and their derivatives; `dot_general` is the public one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.errors import ConfigError, brief, explains_calls
from mpjax.formats.checks import ROUNDED, as_array, check_key
from mpjax.formats.delayed import AmaxHistory
from mpjax.formats.tiles import amax_of
from mpjax.ops.checks import Axes, Dims, DotDimensionNumbers, float_dtype, read_dims
from mpjax.ops.products.dot import add_parts
from mpjax.ops.products.hadamard import hadamard
from mpjax.ops.products.linear_map import linear_map, with_derivative
from mpjax.ops.products.quantized_operand import (
    QuantizedOperand,
    backward_dims,
    combine,
    need_key,
    quantize_operand,
)
from mpjax.precision import Recipe, get_recipe
from mpjax.typing import Array, ArrayLike, DType, DTypeLike, Key, PyTree, Shard, Tree

PRNG = "threefry2x32"
Scales: TypeAlias = tuple[Array | None, Array | None]  # of a and b, where they are known
# a, b, the key's words, amax and observed amax of delayed scaling, known scales of a and b; the
# result and observed amax
Inputs: TypeAlias = tuple[Array, Array, Array | None, Array | None, Array | None, Scales]
Result: TypeAlias = tuple[Array, Array | None]
# a, b, dy, the key's words, amax and scales; the gradients of a and b
Pulled: TypeAlias = tuple[Array, Array, Array, Array | None, Array | None, Scales]
Gradients: TypeAlias = tuple[Array, Array]
PullResult: TypeAlias = tuple[Gradients, Array | None]  # and the amax of dy
# a, b, the key's words, amax, scales
_Point: TypeAlias = tuple[Array, Array, Array | None, Array | None, Scales]


class Bilinear(Protocol):
    """A hashable operation that is linear in x and in W."""

    def axes(self, x: Array, w: Array) -> tuple[tuple[Axes, Axes], ...]:
        """The axes that fprop sums over, of x and W; dgrad, of dy and W; and wgrad, of x and dy."""

    def fprop(self, x: QuantizedOperand, w: QuantizedOperand, recipe: Recipe) -> Array:
        """The result, float32."""

    def dgrad(self, dy: QuantizedOperand, w: QuantizedOperand, recipe: Recipe, x: Array) -> Array:
        """The gradient of x, float32."""

    def wgrad(self, x: QuantizedOperand, dy: QuantizedOperand, recipe: Recipe, w: Array) -> Array:
        """The gradient of W, float32."""


class Sums(NamedTuple):
    """How devices hold the terms of x W and dy W', whose sums they send in a low dtype.

    Each device casts the sums of its terms before they are added, as it does without a recipe.

    Args:
      parts: how many of them hold terms of x W, and of dy W'.
      axes: logical axes of both.
      shard: the sharding constraint.
      dtypes: of both sums; `linear` fills them in.
    """

    parts: tuple[int, int]
    axes: tuple[str | None, str | None]
    shard: Shard
    dtypes: tuple[DType, DType] = (jnp.dtype("float32"), jnp.dtype("float32"))

    def total(self, sums: Array, number: int) -> Array:
        """Adds the sums (parts, N, F) of each device."""
        dtype = self.dtypes[number]
        return add_parts(self.shard(sums.astype(dtype), (self.axes[number], "batch", None)))


class Dot(NamedTuple):
    """`lax.dot_general`.

    Args:
      dims: its dimension numbers.
      sums: of a product of matrices over several devices, or None.
    """

    dims: Dims
    sums: Sums | None = None

    def _combined(
        self, a: QuantizedOperand, b: QuantizedOperand, dims: Dims, recipe: Recipe, number: int
    ) -> Array:
        parts = (
            1 if self.sums is None or recipe.accumulate != "float32" else self.sums.parts[number]
        )
        y = combine(a, b, dims, recipe, parts)
        return y if self.sums is None or parts == 1 else self.sums.total(y, number)

    def axes(self, x: Array, w: Array) -> tuple[tuple[Axes, Axes], ...]:
        """See `Bilinear`."""
        (d_dims, _), (w_dims, _) = backward_dims(self.dims, x.ndim, w.ndim)
        return self.dims[0], d_dims[0], w_dims[0]

    def fprop(self, x: QuantizedOperand, w: QuantizedOperand, recipe: Recipe) -> Array:
        """See `Bilinear`."""
        return self._combined(x, w, self.dims, recipe, 0)

    def dgrad(self, dy: QuantizedOperand, w: QuantizedOperand, recipe: Recipe, x: Array) -> Array:
        """See `Bilinear`."""
        (dims, order), _ = backward_dims(self.dims, x.ndim, w.values.ndim)
        return lax.transpose(self._combined(dy, w, dims, recipe, 1), order)

    def wgrad(self, x: QuantizedOperand, dy: QuantizedOperand, recipe: Recipe, w: Array) -> Array:
        """See `Bilinear`."""
        _, (dims, order) = backward_dims(self.dims, x.values.ndim, w.ndim)
        return lax.transpose(combine(x, dy, dims, recipe), order)


class ProductSpec(NamedTuple):
    """The static part of a product.

    Args:
      op: the operation.
      recipe: how it is quantised.
      compute: dtype of x and dy before they are quantised, and of operands that are not.
      output: dtype of the result.
      where: path of the module, for errors.
    """

    op: Bilinear
    recipe: Recipe
    compute: DType
    output: DType
    where: str


def key_data(key: Key | None, where: str) -> Array | None:
    """Returns two words of threefry for a key of any implementation."""
    if key is None:
        return None
    check_key(key, where)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if str(jax.random.key_impl(key)) != PRNG:
        return jax.random.bits(key, (2,), jnp.uint32)
    return jax.random.key_data(key)


def check_operands(a: Array, b: Array, spec: ProductSpec, amax: AmaxHistory | None) -> None:
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


def _key(data: Array | None, number: int) -> Key | None:
    if data is None:
        return None
    return jax.random.fold_in(jax.random.wrap_key_data(data, impl=PRNG), number)


def _part(amax: Array | None, number: int) -> Array | None:
    return None if amax is None else amax[number]


# The jitted functions below are one program each in an eager call, part of the caller's jaxpr under
# a trace. Their spec has no path: it does not affect the numbers, and without it two modules of
# equal shapes share a program.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _multiply(operands: Inputs, spec: ProductSpec) -> Result:
    a, b, key, amax, observed_amax, scales = operands
    recipe, ((x_axes, w_axes), *_) = spec.recipe, spec.op.axes(a, b)
    x = a.astype(spec.compute)
    left = quantize_operand(
        x, recipe.fprop[0], x_axes, _key(key, 0), spec.compute, _part(amax, 0), scales[0]
    )
    # a weight is quantised from its stored dtype: a cast first would round it twice
    right = quantize_operand(
        b, recipe.fprop[1], w_axes, _key(key, 1), spec.compute, _part(amax, 1), scales[1]
    )
    y = spec.op.fprop(left, right, recipe).astype(spec.output)
    if observed_amax is not None:
        now = [amax_of(v, v.shape).reshape(()) for v in (x, b)]
        observed_amax = jnp.maximum(observed_amax, jnp.stack([*now, jnp.float32(0)]))
    return y, observed_amax


# A product is linear in x, in W and, in the backward pass, in dy. Derivatives of every order treat
# rounding as the identity (straight-through), so they consist of products of the same three kinds,
# each quantised as the recipe says for its kind:
#
#   push  (dx, dW) -> dx W + x dW        at x, W; its transpose is pull
#   pull  dy -> (dy W', x' dy)           at x, W; its transpose is push
#   cross (dx, dW) -> (dy dW', dx' dy)   at dy; it is its own transpose
#
# A tangent replaces its primal as an operand. Its scale comes from its own amax, since no history
# records it, and its random bits from `_key(key, number)` with the number of the replaced operand.
# A dy that is differentiated again uses its own amax too: the history is that of the outermost
# cotangent.
_FOR_X, _FOR_W, _FOR_DY, _FOR_BOTH = 7, 8, 9, 10


def _fresh(amax: Array | None, *replaced: int) -> Array | None:
    """The amax of delayed scaling, 0 (unknown) for operands that were replaced."""
    if amax is None:
        return None
    keep = [float(number not in replaced) for number in range(3)]
    return amax * jnp.asarray(keep, amax.dtype)


def _folded(data: Array | None, number: int) -> Array | None:
    key = _key(data, number)
    return None if key is None else jax.random.key_data(key)


def _forward(operands: Inputs, spec: ProductSpec) -> Result:
    need_key(spec.recipe, operands[2], False, spec.where)
    outs = _multiply(lax.stop_gradient(operands), spec._replace(where=""))
    return with_derivative(OfProduct(spec), outs, operands)


# `_forward` already has this derivative; the rule makes a product one equation of the jaxpr.
_product = jax.custom_jvp(_forward, nondiff_argnums=(1,))


@_product.defjvp
def _product_jvp(
    spec: ProductSpec, primals: tuple[Inputs], tangents: tuple[Inputs]
) -> tuple[Result, Result]:
    outs = _forward(primals[0], spec)
    return outs, OfProduct(spec).along(outs, primals[0], tangents[0])


class OfProduct(NamedTuple):
    """The derivative of `_multiply`.

    Args:
      spec: the product.
    """

    spec: ProductSpec

    def along(self, outs: Result, operands: Inputs, tangents: Inputs) -> Result:
        """The tangents of its results."""
        a, b, key, amax, _, scales = operands
        da, db, _, _, d_observed, _ = tangents
        # The residual is x in the compute dtype; the cast of W is repeated, to save memory.
        at = a.astype(self.spec.compute), b, key, amax, scales
        return LinearMap("push", self.spec).bind(at, (da, db, d_observed), outs)

    def derivative(self, outs: Result, operands: Inputs, tangents: Inputs) -> tuple[Result, Result]:
        """See `mpjax.ops.products.linear_map.Rule`."""
        outs = with_derivative(self, outs, operands)
        return outs, self.along(outs, operands, tangents)


def _push(
    spec: ProductSpec, at: _Point, tangents: tuple[Array, Array, Array | None]
) -> tuple[Array, Array | None]:
    a, b, key, amax, (a_scale, b_scale) = at
    da, db, d_observed = tangents
    left = _product((da, b, _folded(key, _FOR_X), _fresh(amax, 0), None, (None, b_scale)), spec)[0]
    right = _product((a, db, _folded(key, _FOR_W), _fresh(amax, 1), None, (a_scale, None)), spec)[0]
    return left + right, d_observed


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _pull_back(spec: ProductSpec, like: DType | None, operands: Pulled) -> PullResult:
    x, b, dy, key, amax, scales = operands
    recipe, compute = spec.recipe, spec.compute
    x, dy = x.astype(compute), dy.astype(compute)
    _, (dy_axes, b_axes), (x_axes, dy_tokens) = spec.op.axes(x, b)

    left = quantize_operand(dy, recipe.dgrad[0], dy_axes, _key(key, 2), compute, _part(amax, 2))
    right = quantize_operand(
        b, recipe.dgrad[1], b_axes, _key(key, 3), compute, _part(amax, 1), scales[1]
    )
    dx = spec.op.dgrad(left, right, recipe, x)

    tokens, gradient = x, dy
    if recipe.hadamard and x_axes:
        sign_key = _key(key, 4)
        assert sign_key is not None  # `need_key` said so
        signs = jax.random.rademacher(sign_key, (recipe.hadamard,), jnp.float32)
        tokens = hadamard(x, x_axes[-1], signs)
        gradient = hadamard(dy, dy_tokens[-1], signs)
    left = quantize_operand(
        tokens, recipe.wgrad[0], x_axes, _key(key, 5), compute, _part(amax, 0), scales[0]
    )
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
    like: DType | None

    def derivative(
        self, outs: Gradients, operands: Pulled, tangents: Pulled
    ) -> tuple[Gradients, Gradients]:
        """See `mpjax.ops.products.linear_map.Rule`."""
        (a, b, dy, key, amax, scales), (da, db, ddy, *_) = operands, tangents
        own = _fresh(amax, 2)
        if amax is not None:  # the history belongs to another dy
            still = lax.stop_gradient((a, b, dy, key, own, scales))
            outs, _ = _pull_back(self.spec._replace(where=""), self.like, still)
        outs = with_derivative(self, outs, (a, b, dy, key, own, scales))
        along = LinearMap("pull", *self).bind((a, b, key, own, scales), (ddy,), outs)
        across = LinearMap("cross", *self).bind((dy, key, own), (da, db), outs)
        return outs, (along[0] + across[0], along[1] + across[1])


def _pull(spec: ProductSpec, like: DType | None, operands: Pulled) -> PullResult:
    """The gradients of x, in a dtype, and of W; and the amax of dy for delayed scaling."""
    need_key(spec.recipe, operands[3], True, spec.where)
    outs, now = _pull_back(spec._replace(where=""), like, lax.stop_gradient(operands))
    return with_derivative(OfPull(spec, like), outs, operands), now


class LinearMap(NamedTuple):
    """One of the maps push, pull and cross described above.

    Args:
      kind: push, pull or cross.
      spec: the product.
      like: dtype of the gradient of x that it gives; None for push.
    """

    kind: str
    spec: ProductSpec
    like: DType | None = None

    def bind(self, at: PyTree, tangents: PyTree, outs: Tree) -> Tree:
        """Applies it at a point; its results have the types of `outs`."""
        result, shape = jax.tree.flatten(outs)
        alike = tuple(jax.typeof(x).to_tangent_aval() for x in result)
        return jax.tree.unflatten(shape, linear_map(self, alike, at, tangents))

    def apply(self, at: PyTree, tangents: PyTree) -> PyTree:
        """See `mpjax.ops.products.linear_map.Map`."""
        spec = self.spec
        if self.kind == "push":
            return _push(spec, at, tangents)
        if self.kind == "pull":
            (a, b, key, amax, scales), (dy,) = at, tangents
            operands = a, b, dy, _folded(key, _FOR_DY), _fresh(amax, 2), scales
            return _pull(spec, self.like, operands)[0]
        (dy, key, amax), (a, b) = at, tangents
        operands = a, b, dy, _folded(key, _FOR_BOTH), _fresh(amax, 0, 1, 2), (None, None)
        return _pull(spec, self.like, operands)[0]

    def transpose(self, at: PyTree, cotangents: Sequence[Array], tangents: PyTree) -> PyTree:
        """See `mpjax.ops.products.linear_map.Map`."""
        if self.kind == "pull":
            da, db = cotangents
            return (_push(self.spec, at, (da, db, None))[0].astype(tangents[0].dtype),)
        if self.kind == "cross":
            return self._replace(like=tangents[0].dtype).apply(at, cotangents)
        (a, b, key, amax, scales), (dy, *observed_amax) = at, cotangents
        (da, db), now = _pull(self.spec, tangents[0].dtype, (a, b, dy, key, amax, scales))
        if now is None or not observed_amax:
            return da, db
        zero = jnp.float32(0)
        new = jnp.stack([zero, zero, lax.stop_gradient(now)])
        return da, db, jnp.maximum(observed_amax[0], new)


def product(
    a: Array,
    b: Array,
    spec: ProductSpec,
    key: Key | None,
    amax: AmaxHistory | None,
    scales: Scales = (None, None),
) -> tuple[Array, AmaxHistory | None]:
    """Multiplies under a recipe; for `dot_general`, `conv_general_dilated` and `linear`.

    Args:
      a: the left operand.
      b: the right one.
      spec: the product.
      key: random key, for recipes that draw.
      amax: state of delayed scaling.
      scales: of a, one for fprop and wgrad, and of b, for fprop and dgrad, where they are known.

    Raises:
      ConfigError: delayed scaling without its state, a state that the recipe does not use, or
        operands that are not float32, bfloat16 or float16.
    """
    check_operands(a, b, spec, amax)
    past = observed = None
    if amax is not None:
        past, observed = amax.past(spec.recipe.margin), amax.observed_amax
    y, observed = _product((a, b, key_data(key, spec.where), past, observed, scales), spec)
    if amax is not None and observed is not None:
        amax = amax._replace(observed_amax=observed)
    return y, amax


@explains_calls
def dot_general(
    a: ArrayLike,
    b: ArrayLike,
    dimension_numbers: DotDimensionNumbers,
    recipe: str | Recipe,
    *,
    key: Key | None = None,
    amax: AmaxHistory | None = None,
    compute_dtype: DTypeLike | None = None,
    preferred_element_type: DTypeLike | None = None,
    where: str = "dot_general",
) -> Any:
    r"""`lax.dot_general` with operands, and those of both gradients, quantised by a recipe.

    $$y = Q(a) Q(b), \qquad da = Q(dy) Q(b^T), \qquad db = Q(a^T) Q(dy)$$

    Derivatives of every order, forward mode too, are straight-through: they consist of products of
    these three kinds, with tangents in the place of primals. A tangent takes its scale from itself,
    also under delayed scaling, and draws its own random bits.

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
