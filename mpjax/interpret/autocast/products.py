"""Products under a CastPolicy: low operands, or quantised by a recipe.

A custom backward rule holds products of its own. A recipe quantises their operands that come from
the cotangents as gradients, and all others as residuals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.core import Atom
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from mpjax.errors import ConfigError
from mpjax.formats.delayed import AmaxHistory
from mpjax.interpret.autocast.rules import CastPolicy
from mpjax.interpret.core.dataflow import Flow, Value, reach
from mpjax.interpret.core.location import Location
from mpjax.interpret.core.op_lists import is_product
from mpjax.interpret.core.retrace import aval_of, cast
from mpjax.interpret.core.trace import Program
from mpjax.interpret.core.walk import bind
from mpjax.ops import conv_general_dilated, dot_general
from mpjax.ops.products.dot import dot
from mpjax.precision import Recipe
from mpjax.typing import Array, DTypeLike, Key

# Whether the left and the right operand of a product are gradients.
Sides: TypeAlias = tuple[bool, bool]


def product(
    eqn: JaxprEqn,
    values: list[Array],
    cast_policy: CastPolicy,
    location: Location,
    key: Key | None = None,
    gradients: Sides | None = None,
    amax: AmaxHistory | None = None,
) -> tuple[Array, AmaxHistory | None]:
    """Returns a product whose floating-point operands are already in the low dtype of its policy.

    It leaves in the policy's output dtype, unless the function asked for a dtype of its own: a
    `preferred_element_type` other than that of the operands.

    Args:
      eqn: the product as it was traced.
      values: its operands.
      cast_policy: what happens here.
      location: where it stands.
      key: random key, for a recipe that draws.
      gradients: in a custom backward rule, which of the two operands are gradients.
      amax: state of delayed scaling, for a recipe that has one; it is returned with what this
        product observed.

    Raises:
      ConfigError: a recipe that needs a state, or a key and has none, or for a product of a
        backward pass that is traced already, whose operands a recipe cannot tell apart.
    """
    wanted = _asked(eqn)
    if wanted is None:
        output = cast_policy.output
        wanted = aval_of(eqn.outvars[0]).dtype if output is None else output
    if cast_policy.recipe is not None and eqn.primitive.name in (
        "dot_general",
        "conv_general_dilated",
    ):
        found = _quantised(eqn, values, cast_policy, location, key, gradients, amax)
        y, amax = (found, None) if amax is None else found
        return cast(y, wanted), amax
    return _plain(eqn, values, wanted), None


def _plain(eqn: JaxprEqn, values: list[Array], wanted: DTypeLike) -> Array:
    """A product that no recipe quantises."""
    if "preferred_element_type" not in eqn.params:
        return cast(bind(eqn, values)[0], wanted)
    bf16 = all(x.dtype == jnp.bfloat16 for x in values[:2])
    if bf16 and eqn.primitive.name == "dot_general" and jnp.dtype(wanted) == jnp.float32:
        return dot(values[0], values[1], eqn.params["dimension_numbers"])  # in any layout on a CPU
    return bind(eqn, values, preferred_element_type=jnp.dtype(wanted))[0]


def biases(jaxpr: Jaxpr) -> dict[int, int]:
    """Returns the additions of a bias to a product, by `id`, with the number of the product.

    A bias is a vector, or an array of the right operand's free axes, behind axes of length one. A
    model's `x @ w + b` so stays in the dtype of its product; a float32 bias would widen it.
    """
    made: dict[Atom, int] = {}  # a product, perhaps transposed -> free axes of its right operand
    producers: dict[Atom, JaxprEqn] = {}
    found: dict[int, int] = {}
    for eqn in jaxpr.eqns:
        name, first = eqn.primitive.name, eqn.invars[0] if eqn.invars else None
        if name == "dot_general":
            contracted, batch = eqn.params["dimension_numbers"]
            rank = len(aval_of(eqn.invars[1]).shape)
            made[eqn.outvars[0]] = rank - len(contracted[1]) - len(batch[1])
        elif name == "conv_general_dilated":
            made[eqn.outvars[0]] = 1
        elif name == "transpose" and not isinstance(first, Literal) and first in made:
            made[eqn.outvars[0]] = 1
        elif name in ("reshape", "broadcast_in_dim"):
            producers[eqn.outvars[0]] = eqn
        elif name == "add" and not any(isinstance(atom, Literal) for atom in eqn.invars):
            for side, (product, bias) in enumerate((eqn.invars, eqn.invars[::-1])):
                if product in made and bias in producers:
                    if _is_bias(producers[bias], made[product]):
                        found[id(eqn)] = side
    return found


def add_bias(eqn: JaxprEqn, args: Sequence[Array], side: int) -> list[Array]:
    """Adds a bias in the dtype of its product.

    Args:
      eqn: the addition.
      args: its operands.
      side: which of them is the product.
    """
    product, bias = args[side], args[1 - side]
    if bias.dtype != product.dtype:
        # Broadcast first: the gradient of a bias, a sum over all tokens, so adds up in float32.
        bias = cast(jnp.broadcast_to(bias, product.shape), product.dtype)
    return bind(eqn, [product, bias] if side == 0 else [bias, product])


def _is_bias(eqn: JaxprEqn, free: int) -> bool:
    source, shape = aval_of(eqn.invars[0]).shape, aval_of(eqn.outvars[0]).shape
    rank = len(source)
    if not 0 < rank < len(shape) or rank not in (1, free):
        return False
    if eqn.primitive.name == "reshape":  # which only put axes of length one in
        if [n for n in shape if n > 1] != [n for n in source if n > 1]:
            return False
        return rank == 1 or shape[-rank:] == source
    last = tuple(range(len(shape) - rank, len(shape)))
    return rank == 1 or eqn.params["broadcast_dimensions"] == last


def _asked(eqn: JaxprEqn) -> DTypeLike | None:
    """A product's `preferred_element_type`; None if that is the dtype of its operands."""
    preferred = eqn.params.get("preferred_element_type")
    operands = {getattr(v.aval, "dtype", None) for v in eqn.invars[:2]}
    return None if preferred is None or {jnp.dtype(preferred)} == operands else preferred


def _quantised(
    eqn: JaxprEqn,
    values: list[Array],
    cast_policy: CastPolicy,
    location: Location,
    key: Key | None,
    gradients: Sides | None,
    amax: AmaxHistory | None,
) -> Any:
    recipe, where = cast_policy.recipe, f"autocast: {location.path or 'the function'}"
    assert recipe is not None
    if gradients is not None:
        recipe = of_sides(recipe, gradients)
    elif location.backward:
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} quantises a product's gradients itself, and here they"
            " are traced already; write jax.grad(mpjax.autocast(fn, ...)), not"
            " autocast(jax.grad(fn), ...); where the function takes a derivative of its own, give"
            f" the recipe by rules that leave it out: rules=['{location.path or '**'}=fp32', ...]"
        )
    p = eqn.params
    common: dict[str, Any] = {
        "key": key, "preferred_element_type": jnp.float32, "where": where, "amax": amax,
    }  # fmt: skip
    if eqn.primitive.name == "dot_general":
        return dot_general(values[0], values[1], p["dimension_numbers"], recipe, **common)
    if p["batch_group_count"] != 1:
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} does not take a convolution with batch groups; leave"
            " this path to bf16"
        )
    names = ("lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")
    common |= {name: p[name] for name in names}
    return conv_general_dilated(
        values[0], values[1], p["window_strides"], p["padding"], recipe, **common
    )


def sides(closed: ClosedJaxpr, residuals: int) -> dict[int, Sides]:
    """Returns for each product of a backward rule, by its equation's `id`, which are gradients.

    Args:
      closed: the rule.
      residuals: how many of its arguments, the first, are no cotangents.
    """
    flow = Flow(Program(closed, [], [""] * len(closed.in_avals), list))

    def ahead(value: Value) -> list[Value]:
        return [*value.joins, *(out for step in value.readers for out in step.outs)]

    reached = set(reach(flow.args[residuals:], ahead))
    found: dict[int, Sides] = {}
    for step in flow.steps:
        if is_product(step.eqn):
            left, right = found.get(id(step.eqn), (False, False))
            found[id(step.eqn)] = left or step.ins[0] in reached, right or step.ins[1] in reached
    return found


def of_sides(recipe: Recipe, gradients: Sides) -> Recipe:
    """Returns a recipe whose forward product takes the operands of a product in a backward rule.

    Args:
      recipe: of the product's path.
      gradients: which operands are gradients.

    Example:
      >>> from mpjax.precision import get_recipe
      >>> of_sides(get_recipe("fp8"), (False, True)).fprop[1].format
      'e5m2'
    """
    if not any(gradients):
        return recipe
    gradient, other = recipe.dgrad
    left, right = (gradient if side else other for side in gradients)
    return dataclasses.replace(recipe, fprop=(left, right))
