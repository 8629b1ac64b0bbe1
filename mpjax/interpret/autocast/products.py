"""Products under a CastPolicy: low operands, or quantised by a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from mpjax.errors import ConfigError
from mpjax.interpret.autocast.cotangents import Sides, of_sides
from mpjax.interpret.autocast.rules import CastPolicy
from mpjax.interpret.core.location import Location
from mpjax.interpret.core.retrace import cast
from mpjax.interpret.core.walk import bind
from mpjax.ops import conv_general_dilated, dot_general
from mpjax.ops.dot import dot


def product(
    eqn: JaxprEqn,
    values: list[Any],
    cast_policy: CastPolicy,
    location: Location,
    key: Any = None,
    gradients: Sides | None = None,
) -> Any:
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

    Raises:
      ConfigError: a recipe that needs a state, or a key and has none, or for a product of a
        backward pass that is traced already, whose operands a recipe cannot tell apart.
    """
    asked = _asked(eqn)
    recorded: Any = eqn.outvars[0].aval
    follows = recorded.dtype if cast_policy.output is None else cast_policy.output
    wanted = follows if asked is None else asked
    if cast_policy.recipe is not None and eqn.primitive.name in (
        "dot_general",
        "conv_general_dilated",
    ):
        return cast(_quantised(eqn, values, cast_policy, location, key, gradients), wanted)
    if "preferred_element_type" not in eqn.params:
        return cast(bind(eqn, values)[0], wanted)
    bf16 = all(x.dtype == jnp.bfloat16 for x in values[:2])
    if bf16 and eqn.primitive.name == "dot_general" and jnp.dtype(wanted) == jnp.float32:
        return dot(values[0], values[1], eqn.params["dimension_numbers"])  # in any layout on a CPU
    return bind(eqn, values, preferred_element_type=jnp.dtype(wanted))[0]


def biases(jaxpr: Jaxpr) -> dict[int, int]:
    """Returns the additions of a bias to a product, by `id`, with the number of the product.

    A bias is a vector, or an array of the right operand's free axes, with axes of length one put
    before it. A model's `x @ w + b` so stays in the dtype of its product; otherwise a bias of
    float32 would widen it.
    """
    made: dict[Any, int] = {}  # a product, perhaps transposed -> free axes of its right operand
    producers: dict[Any, JaxprEqn] = {}
    found: dict[int, int] = {}
    for eqn in jaxpr.eqns:
        name, first = eqn.primitive.name, eqn.invars[0] if eqn.invars else None
        if name == "dot_general":
            contracted, batch = eqn.params["dimension_numbers"]
            right: Any = eqn.invars[1].aval
            made[eqn.outvars[0]] = right.ndim - len(contracted[1]) - len(batch[1])
        elif name == "conv_general_dilated":
            made[eqn.outvars[0]] = 1
        elif name == "transpose" and not isinstance(first, Literal) and first in made:
            made[eqn.outvars[0]] = 1
        elif name in ("reshape", "broadcast_in_dim"):
            producers[eqn.outvars[0]] = eqn
        elif name == "add" and not any(isinstance(atom, Literal) for atom in eqn.invars):
            for side in (0, 1):
                product, bias = (eqn.invars[i] for i in (side, 1 - side))
                if (
                    product in made
                    and bias in producers
                    and _is_bias(producers[bias], made[product])
                ):
                    found[id(eqn)] = side
    return found


def add_bias(eqn: JaxprEqn, args: Sequence[Any], side: int) -> list[Any]:
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
    source: Any = eqn.invars[0].aval
    result: Any = eqn.outvars[0].aval
    shape, rank = result.shape, source.ndim
    if not 0 < rank < len(shape) or rank not in (1, free):
        return False
    if eqn.primitive.name == "reshape":  # which only put axes of length one in
        if [n for n in shape if n > 1] != [n for n in source.shape if n > 1]:
            return False
        return rank == 1 or shape[-rank:] == source.shape
    last = tuple(range(len(shape) - rank, len(shape)))
    return rank == 1 or eqn.params["broadcast_dimensions"] == last


def _asked(eqn: JaxprEqn) -> Any:
    """The dtype that the function asked a product for; None where it only followed."""
    preferred = eqn.params.get("preferred_element_type")
    operands = {getattr(v.aval, "dtype", None) for v in eqn.invars[:2]}
    return None if preferred is None or {jnp.dtype(preferred)} == operands else preferred


def _quantised(
    eqn: JaxprEqn,
    values: list[Any],
    cast_policy: CastPolicy,
    location: Location,
    key: Any,
    gradients: Sides | None,
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
    if recipe.history:
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} takes its scales from past steps, for which a"
            " function alone has no state; take fp8"
        )
    p = eqn.params
    if eqn.primitive.name == "dot_general":
        return dot_general(
            values[0],
            values[1],
            p["dimension_numbers"],
            recipe,
            key=key,
            preferred_element_type=jnp.float32,
            where=where,
        )
    if p["batch_group_count"] != 1:
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} does not take a convolution with batch groups; leave"
            " this path to bf16"
        )
    return conv_general_dilated(
        values[0],
        values[1],
        p["window_strides"],
        p["padding"],
        recipe,
        key=key,
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=p["dimension_numbers"],
        feature_group_count=p["feature_group_count"],
        preferred_element_type=jnp.float32,
        where=where,
    )
