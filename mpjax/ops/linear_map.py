"""Derivatives and transposes written by hand, of every order and in every transform.

What JAX has serves one order. `custom_vjp` cannot be pushed forward; `linear_call` can neither be
mapped nor be differentiated in what it is not linear in; and both `custom_jvp` and `custom_vjp`
lose their rules in the forward pass of a `scan` that is differentiated, which the next order would
need. Primitives keep their rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

from mpjax.errors import ConfigError


class Map(Protocol):
    """A map that is linear in `tangents`; hashable. Both methods can be differentiated."""

    def apply(self, at: Any, tangents: Any) -> Any:
        """Its value."""

    def transpose(self, at: Any, cotangents: Any, tangents: Any) -> Any:
        """The cotangents of `tangents`, which are shapes and dtypes."""


linear_map_p = Primitive("linear_map")
linear_map_p.multiple_results = True


def linear_map(of: Map, outs: Sequence[Any], at: Any, tangents: Any) -> list[Any]:
    """Applies a linear map.

    Args:
      of: the map.
      outs: types of its results.
      at: where it is taken.
      tangents: what it is linear in.

    Returns:
      Its results, as a list.
    """
    flat, tree = jax.tree.flatten((at, tangents))
    count = len(jax.tree.leaves(at))
    # Inside a shard_map: what is the same in all shards has a gradient that is summed over them.
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in flat))
    for i, x in enumerate(flat[count:], count):
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        flat[i] = lax.pcast(x, missing, to="varying") if missing else x
    return linear_map_p.bind(
        *flat, of=of, outs=tuple(outs), tree=tree, count=count, mapped=()
    )  # fmt: skip


def _over(function: Any, mapped: Any) -> Any:
    for axes in mapped:
        function = jax.vmap(function, axes)
    return function


def applied(*flat: Any, of: Map, outs: Any, tree: Any, count: int, mapped: Any) -> list[Any]:
    """Returns what an equation `linear_map` gives, by what it is made of."""

    def function(*flat: Any) -> list[Any]:
        return jax.tree.leaves(of.apply(*jax.tree.unflatten(tree, flat)))

    return _over(function, mapped)(*flat)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def function(*values: Any) -> list[Any]:
        flat = list(primals)
        for i, value in zip(moving, values, strict=True):
            flat[i] = value
        return applied(*flat, **params)

    return jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])


def _transpose(
    cts: Any, *flat: Any, of: Map, outs: Any, tree: Any, count: int, mapped: Any
) -> list[Any]:
    residuals, linear = flat[:count], flat[count:]
    cts = [*map(ad.instantiate_zeros, cts)]
    types = [x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in linear]

    def function(*values: Any) -> list[Any]:
        at, tangents = jax.tree.unflatten(tree, [*values[:count], *types])
        return jax.tree.leaves(of.transpose(at, values[count:], tangents))

    zero = [(*axes[:count], *[0] * len(cts)) for axes in mapped]
    found = _over(function, zero)(*residuals, *cts)
    return [None] * count + [
        ct if ad.is_undefined_primal(x) else None for x, ct in zip(linear, found, strict=True)
    ]


def _batch(
    flat: Any, axes: Any, *, of: Map, outs: Any, tree: Any, count: int, mapped: Any
) -> tuple[list[Any], list[int]]:
    size = _size(flat, axes)
    # What it is linear in is mapped wholly: the cotangent of what was not is a sum.
    linear = _first(flat[count:], axes[count:], size)
    level = (*axes[:count], *[0] * len(linear))
    outs = tuple(unmapped_aval(size, 0, out) for out in outs)
    found = linear_map_p.bind(
        *flat[:count], *linear, of=of, outs=outs, tree=tree, count=count, mapped=(*mapped, level)
    )
    return found, [0] * len(found)


class Rule(Protocol):
    """The derivative of a function of `operands`; hashable."""

    def derivative(self, outs: Any, operands: Any, tangents: Any) -> tuple[Any, Any]:
        """The function's results, from the ones given, and their tangents."""


with_derivative_p = Primitive("with_derivative")
with_derivative_p.multiple_results = True


def with_derivative(of: Rule, outs: Any, operands: Any) -> Any:
    """Returns `outs` with the derivative that a rule gives them, and no other.

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
    primals: Any, tangents: Any, *, of: Rule, tree: Any, count: int, mapped: Any
) -> Any:
    def function(*values: Any) -> Any:
        outs, operands = jax.tree.unflatten(tree, values[: len(primals)])
        along = jax.tree.unflatten(jax.tree.structure(operands), values[len(primals) :])
        return tuple(map(jax.tree.leaves, of.derivative(outs, operands, along)))

    # An integer has no tangent and stands for its own, which no rule reads.
    moving = [
        x if not jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros_like(x) if type(t) is ad.Zero
        else t for x, t in zip(primals[count:], tangents[count:], strict=True)
    ]  # fmt: skip
    return _over(function, [(*axes, *axes[count:]) for axes in mapped])(*primals, *moving)


def _with_derivative_transpose(cts: Any, *flat: Any, **params: Any) -> Any:
    # What rounds comes before this equation, and each of its own would need a rule as well.
    raise ConfigError(
        "a product under a recipe cannot be transposed, as jax.linear_transpose and solvers of"
        " linear systems ask; leave it out by a rule for its path, such as 'solver/**=fp32'"
    )


def _with_derivative_batch(
    flat: Any, axes: Any, *, of: Rule, tree: Any, count: int, mapped: Any
) -> tuple[list[Any], list[int]]:
    outs = _first(flat[:count], axes[:count], _size(flat, axes))
    level = (*[0] * count, *axes[count:])
    found = with_derivative_p.bind(
        *outs, *flat[count:], of=of, tree=tree, count=count, mapped=(*mapped, level)
    )
    return found, [0] * count


def _size(flat: Any, axes: Any) -> int:
    (size,) = {x.shape[axis] for x, axis in zip(flat, axes, strict=True) if axis is not None}
    return size


def _first(flat: Any, axes: Any, size: int) -> list[Any]:
    """Arrays with the mapped axis first, put before those that have none."""
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
