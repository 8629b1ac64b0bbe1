"""Which operands of a backward rule's products are gradients.

A custom backward rule holds products of its own. A recipe quantises their operands that come from
the cotangents as gradients, and all others as residuals.
"""

from __future__ import annotations

import dataclasses

from jax.extend.core import ClosedJaxpr

from mpjax.interpret.core.dataflow import Flow, Value
from mpjax.interpret.core.matmuls import is_product
from mpjax.interpret.core.trace import Program
from mpjax.precision import Recipe

Sides = tuple[bool, bool]  # of a product's operands, left and right: whether it is a gradient


def sides(closed: ClosedJaxpr, residuals: int) -> dict[int, Sides]:
    """Returns for each product of a backward rule, by its equation's `id`, which are gradients.

    Args:
      closed: the rule.
      residuals: how many of its arguments, the first, are no cotangents.
    """
    flow = Flow(Program(closed, [], [""] * len(closed.in_avals), list))
    reached: set[Value] = set()
    ahead = list(flow.args[residuals:])
    while ahead:
        value = ahead.pop()
        if value not in reached:
            reached.add(value)
            ahead += [*value.joins, *(out for step in value.readers for out in step.outs)]
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
