"""Hand-written derivatives and transposes, of every order and under every transform.

JAX's own tools support one order. `custom_vjp` has no forward mode; `linear_call` cannot be mapped,
nor differentiated in the arguments that it is not linear in; and both `custom_jvp` and `custom_vjp`
lose their rules in the forward pass of a differentiated `scan`, where the next order needs them.
Primitives keep their rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import AbstractValue
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir
from jax.tree_util import PyTreeDef

from mpjax.errors import ConfigError
from mpjax.typing import Array, PyTree, Tree

Axes: TypeAlias = Sequence[int | None]  # the mapped axis of each array
Level: TypeAlias = tuple[int | None, ...]  # the same, of one enclosing `vmap`
Flat: TypeAlias = Sequence[Array]  # leaves of a tree


class Map(Protocol):
    """A hashable map that is linear in `tangents`; both methods are differentiable."""

    def apply(self, at: PyTree, tangents: PyTree) -> PyTree:
        """Its value."""

    def transpose(self, at: PyTree, cotangents: Sequence[Array], tangents: PyTree) -> PyTree:
        """The cotangents of `tangents`, which are given by shape and dtype."""


linear_map_p = Primitive("linear_map")
linear_map_p.multiple_results = True


def linear_map(of: Map, outs: Sequence[AbstractValue], at: PyTree, tangents: PyTree) -> list[Array]:
    """Applies a linear map.

    Args:
      of: the map.
      outs: types of its results.
      at: the point at which it is applied.
      tangents: the arguments that it is linear in.

    Returns:
      Its results, as a list.
    """
    flat, tree = jax.tree.flatten((at, tangents))
    count = len(jax.tree.leaves(at))
    # Inside a shard_map, the gradient of a value that is equal in all shards is summed over them.
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in flat))
    for i, x in enumerate(flat[count:], count):
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        flat[i] = lax.pcast(x, missing, to="varying") if missing else x
    return linear_map_p.bind(*flat, of=of, outs=tuple(outs), tree=tree, count=count, mapped=())


def _over(function: Callable[..., PyTree], mapped: Sequence[Level]) -> Callable[..., PyTree]:
    for axes in mapped:
        function = jax.vmap(function, axes)
    return function


def applied(*flat: Array, of: Map, tree: PyTreeDef, mapped: Sequence[Level], **_: object) -> Flat:
    """Returns the results of an equation `linear_map`, computed by its map."""

    def function(*flat: Array) -> Flat:
        return jax.tree.leaves(of.apply(*jax.tree.unflatten(tree, flat)))

    return _over(function, mapped)(*flat)


def _jvp(primals: Flat, tangents: Flat, **params: Any) -> tuple[Flat, Flat]:
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def function(*values: Array) -> Flat:
        flat = list(primals)
        for i, value in zip(moving, values, strict=True):
            flat[i] = value
        return applied(*flat, **params)

    return jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])


def _transpose(
    cts: Flat, *flat: Array, of: Map, tree: PyTreeDef, count: int, mapped: Sequence[Level],
    **_: object,
) -> list[Array | None]:  # fmt: skip
    residuals, linear = flat[:count], flat[count:]
    cts = [*map(ad.instantiate_zeros, cts)]
    types = [x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in linear]

    def function(*values: Array) -> Flat:
        at, tangents = jax.tree.unflatten(tree, [*values[:count], *types])
        return jax.tree.leaves(of.transpose(at, values[count:], tangents))

    zero = [(*axes[:count], *[0] * len(cts)) for axes in mapped]
    found = _over(function, zero)(*residuals, *cts)
    own = (ct if ad.is_undefined_primal(x) else None for x, ct in zip(linear, found, strict=True))
    return [*[None] * count, *own]


def _batch(
    flat: Flat, axes: Axes, *, outs: Sequence[AbstractValue], count: int, mapped: Sequence[Level],
    **params: Any,
) -> tuple[Flat, list[int]]:  # fmt: skip
    size = _size(flat, axes)
    # Every argument that the map is linear in gets the mapped axis; the broadcast of one that has
    # none makes its cotangent a sum.
    linear = _first(flat[count:], axes[count:], size)
    level = (*axes[:count], *[0] * len(linear))
    outs = tuple(unmapped_aval(size, 0, out) for out in outs)
    found = linear_map_p.bind(
        *flat[:count], *linear, outs=outs, count=count, mapped=(*mapped, level), **params
    )
    return found, [0] * len(found)


class Rule(Protocol[Tree]):
    """The derivative of a function of `operands`; a hashable object."""

    def derivative(self, outs: Tree, operands: PyTree, tangents: PyTree) -> tuple[Tree, Tree]:
        """Returns the results of the function, whose values are `outs`, and their tangents."""


with_derivative_p = Primitive("with_derivative")
with_derivative_p.multiple_results = True


def with_derivative(of: Rule[Tree], outs: Tree, operands: PyTree) -> Tree:
    """Returns `outs` with the derivative of a rule; other derivatives are dropped.

    Args:
      of: the rule.
      outs: results of a function, arrays.
      operands: of the function.
    """
    flat, tree = jax.tree.flatten((outs, operands))
    count = len(jax.tree.leaves(outs))
    found = with_derivative_p.bind(*flat, of=of, tree=tree, count=count, mapped=())
    return jax.tree.unflatten(jax.tree.structure(outs), found)


def _with_derivative_jvp(
    primals: Flat, tangents: Flat, *, of: Rule, tree: PyTreeDef, count: int, mapped: Sequence[Level]
) -> tuple[Flat, Flat]:
    def function(*values: Array) -> PyTree:
        outs, operands = jax.tree.unflatten(tree, values[: len(primals)])
        along = jax.tree.unflatten(jax.tree.structure(operands), values[len(primals) :])
        return tuple(map(jax.tree.leaves, of.derivative(outs, operands, along)))

    # An integer has no tangent; the integer itself is passed in its place, and no rule reads it.
    moving = [
        x if not jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros_like(x) if type(t) is ad.Zero
        else t for x, t in zip(primals[count:], tangents[count:], strict=True)
    ]  # fmt: skip
    return _over(function, [(*axes, *axes[count:]) for axes in mapped])(*primals, *moving)


def _with_derivative_transpose(cts: Flat, *flat: Array, **params: object) -> Flat:
    # The rounding precedes this equation, and each of its equations would need a rule as well.
    raise ConfigError(
        "a product under a recipe cannot be transposed, as jax.linear_transpose and solvers of"
        " linear systems ask; leave it out by a rule for its path, such as 'solver/**=fp32'"
    )


def _with_derivative_batch(
    flat: Flat, axes: Axes, *, count: int, mapped: Sequence[Level], **params: Any
) -> tuple[Flat, list[int]]:
    outs = _first(flat[:count], axes[:count], _size(flat, axes))
    mapped = (*mapped, (*[0] * count, *axes[count:]))
    found = with_derivative_p.bind(*outs, *flat[count:], count=count, mapped=mapped, **params)
    return found, [0] * count


def _size(flat: Flat, axes: Axes) -> int:
    (size,) = {x.shape[axis] for x, axis in zip(flat, axes, strict=True) if axis is not None}
    return size


def _first(flat: Flat, axes: Axes, size: int) -> list[Array]:
    """Arrays with the mapped axis first; those that have none are broadcast."""
    return [
        lax.broadcast(x, (size,)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(flat, axes, strict=True)
    ]


linear_map_p.def_impl(
    lambda *flat, **params: jax.jit(lambda *flat: applied(*flat, **params))(*flat)
)
linear_map_p.def_abstract_eval(lambda *_, outs, **params: list(outs))
ad.primitive_jvps[linear_map_p] = _jvp
ad.primitive_transposes[linear_map_p] = _transpose
batching.primitive_batchers[linear_map_p] = _batch
mlir.register_lowering(linear_map_p, mlir.lower_fun(applied, multiple_results=True))

with_derivative_p.def_impl(lambda *flat, count, **_: list(flat[:count]))
with_derivative_p.def_abstract_eval(lambda *avals, count, **_: list(avals[:count]))
ad.primitive_jvps[with_derivative_p] = _with_derivative_jvp
ad.primitive_transposes[with_derivative_p] = _with_derivative_transpose
batching.primitive_batchers[with_derivative_p] = _with_derivative_batch
mlir.register_lowering(with_derivative_p, lambda ctx, *flat, count, **_: flat[:count])
