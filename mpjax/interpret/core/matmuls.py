"""Which equations are matrix products, and how many wide ones an equation holds."""

from __future__ import annotations

from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from mpjax.interpret.core.op_lists import LOW
from mpjax.interpret.core.retrace import aval_of, is_float
from mpjax.interpret.core.walk import equations

SCALED = frozenset({"scaled_matmul", "scaled_matmul_wrapper"})  # of blocks, which stay as they are
PRODUCTS = LOW | SCALED


def is_product(eqn: JaxprEqn) -> bool:
    """Returns whether an equation is a matrix product or convolution of floating-point arrays."""
    return eqn.primitive.name in PRODUCTS and all(is_float(atom.aval) for atom in eqn.invars[:2])


def held_products(eqn: JaxprEqn) -> int:
    """Returns how many float32 or float64 products stand in the jaxprs that an equation runs."""
    params = eqn.params
    if eqn.primitive.name == "custom_linear_solve":
        params = {"solve": params["jaxprs"].solve}  # the others are for its derivatives
    return sum(
        is_product(eqn) and any(aval_of(atom).dtype.itemsize >= 4 for atom in eqn.invars[:2])
        for held in _jaxprs(tuple(params.values()))
        for eqn, _ in equations(held)
    )


def _jaxprs(value: object) -> Iterator[ClosedJaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value
    elif isinstance(value, Jaxpr):
        inputs = [*value.constvars, *value.invars]
        yield ClosedJaxpr(value.replace(constvars=[], invars=inputs), ())
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _jaxprs(each)
