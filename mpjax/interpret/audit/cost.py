"""What an operation costs: floating-point operations and bytes, before any fusion."""

from __future__ import annotations

import math

from jax.core import AbstractValue, Atom
from jax.extend.core import JaxprEqn

from mpjax.interpret.core.op_lists import PRODUCTS, SCALED, SHAPE
from mpjax.interpret.core.retrace import aval_of, is_float
from mpjax.typing import Shape

# They move or make values and compute none.
_FREE = SHAPE | frozenset(
    {
        *("convert_element_type", "copy", "copy_p", "iota", "name", "optimization_barrier"),
        *("stop_gradient", "device_put", "pvary", "squeeze", "select_n", "sort", "argsort"),
        *("settled", "with_derivative"),  # of our products: identities
    }
)
# Views of memory: they neither read nor write.
MOVES = frozenset(
    {
        *("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "name", "stop_gradient"),
        *("pvary", "settled", "with_derivative"),
    }
)
_REDUCTIONS = frozenset(
    {
        *("reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce", "argmax", "argmin"),
        *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
    }
)


def contracted(eqn: JaxprEqn) -> int:
    """Returns how many products each number of a product's result sums."""
    a, b = (_shape(atom) for atom in eqn.invars[:2])
    p = eqn.params
    if eqn.primitive.name == "conv_general_dilated":
        out = p["dimension_numbers"].rhs_spec[0]
        return math.prod(b) // b[out]
    if eqn.primitive.name in SCALED:
        return int(a[-1])
    if eqn.primitive.name in ("ragged_dot", "ragged_dot_general"):
        (axes, _), _ = p["ragged_dot_dimension_numbers"].dot_dimension_numbers
    else:
        (axes, _), _ = p["dimension_numbers"]
    return math.prod(a[axis] for axis in axes)


def _groups(eqn: JaxprEqn) -> int:
    """How many results share a ragged axis that is summed over; 1 without one."""
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None or not set(numbers.lhs_ragged_dimensions) <= set(
        numbers.dot_dimension_numbers[0][0]
    ):
        return 1
    return _shape(eqn.invars[2])[-1]


def operations(eqn: JaxprEqn) -> int:
    """Returns the operations of an equation that holds no jaxpr, run once.

    A product, of integers too, takes two for each number that it multiplies; a reduction of
    floating-point numbers one for each number that it reads; what only moves values none;
    everything else that makes floating-point numbers one for each of them.
    """
    name = eqn.primitive.name
    if name in PRODUCTS:
        return 2 * math.prod(_shape(eqn.outvars[0])) * contracted(eqn) // _groups(eqn)
    floats = [_shape(var) for var in eqn.outvars if is_float(var.aval)]
    if not floats or name in _FREE:
        return 0
    size = math.prod(floats[0])
    if name in _REDUCTIONS:
        return math.prod(_shape(eqn.invars[0]))
    return size


def _shape(atom: Atom) -> Shape:
    return aval_of(atom).shape


def size_in_bytes(aval: AbstractValue) -> int:
    """Returns what an array takes; 0 for what is none (a token, a key)."""
    dtype = getattr(aval, "dtype", None)
    return math.prod(getattr(aval, "shape", ())) * dtype.itemsize if dtype is not None else 0
