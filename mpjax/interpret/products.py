"""Products in a region of autocast: low operands, or quantised by a recipe."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from mpjax.errors import ConfigError
from mpjax.interpret.place import Place
from mpjax.interpret.region import Region
from mpjax.interpret.retrace import cast
from mpjax.interpret.walker import bind
from mpjax.ops import conv_general_dilated, dot_general


def product(eqn: JaxprEqn, values: list[Any], region: Region, place: Place) -> Any:
    """Returns a product whose floating-point operands are already low.

    It leaves in the region's output dtype, unless the function asked for a dtype of its own: a
    `preferred_element_type` other than that of the operands.

    Args:
      eqn: the product as it was traced.
      values: its operands.
      region: what happens here.
      place: where it stands.

    Raises:
      ConfigError: a recipe that needs a state or a random key, or for a product of a backward
        pass, whose operands a recipe cannot tell apart.
    """
    asked = _asked(eqn)
    wanted = region.output if asked is None else asked
    if region.recipe is not None and eqn.primitive.name in ("dot_general", "conv_general_dilated"):
        return cast(_quantised(eqn, values, region, place), wanted)
    if "preferred_element_type" not in eqn.params:
        return cast(bind(eqn, values)[0], wanted)
    return bind(eqn, values, preferred_element_type=jnp.dtype(wanted))[0]


def _asked(eqn: JaxprEqn) -> Any:
    """The dtype that the function asked a product for; None where it only followed."""
    preferred = eqn.params.get("preferred_element_type")
    operands = {getattr(v.aval, "dtype", None) for v in eqn.invars[:2]}
    return None if preferred is None or {jnp.dtype(preferred)} == operands else preferred


def _quantised(eqn: JaxprEqn, values: list[Any], region: Region, place: Place) -> Any:
    recipe, where = region.recipe, f"autocast: {place.path or 'the function'}"
    assert recipe is not None
    if place.backward:
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} quantises a product's gradients itself, and here they"
            " are traced already; write jax.grad(mpjax.autocast(fn, ...)), not"
            " autocast(jax.grad(fn), ...)"
        )
    if recipe.history:
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} takes its scales from past steps, for which a"
            " function alone has no state; take fp8"
        )
    if recipe.uses_key:
        raise ConfigError(
            f"{where}: recipe {recipe.name!r} rounds at random, for which autocast has no key;"
            " take a recipe that rounds to nearest, or call mpjax.dot_general with key="
        )
    p = eqn.params
    if eqn.primitive.name == "dot_general":
        return dot_general(
            values[0],
            values[1],
            p["dimension_numbers"],
            recipe,
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
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=p["dimension_numbers"],
        feature_group_count=p["feature_group_count"],
        preferred_element_type=jnp.float32,
        where=where,
    )
