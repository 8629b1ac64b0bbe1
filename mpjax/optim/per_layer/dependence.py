"""What the outputs of a traced optimizer depend on, and whether shapes matter to it.

An optimizer's update is traced once and its jaxpr is read. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from mpjax.typing import PyTree, Shape

Atom: TypeAlias = Var | Literal

RANDOM = -1  # among the inputs of a value: random bits

_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil"
    " clamp complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc"
    " exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min"
    " mul ne neg nextafter not optimization_barrier or pow real reduce_precision rem round rsqrt"
    " select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square"
    " stop_gradient sub tan tanh xor".split()
)
_REDUCTIONS = {
    "reduce_sum": "add",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
}
_NEUTRAL: dict[str, Any] = {"add": 0, "and": True, "or": False}  # max and min: any constant
# Parameters of primitives that say how large arrays are.
_SIZES = frozenset(
    "shape broadcast_dimensions axes dimensions dimension_numbers new_sizes sharding out_sharding"
    " name".split()
)


def aval_of(x: Atom) -> jax.core.ShapedArray:
    """Returns the shape and dtype of a value of a jaxpr."""
    return x.aval  # type: ignore[return-value]  # of arrays; JAX's type covers all values


class _NotElementwise(Exception):
    """Shapes matter to the program, or cannot be shown not to."""


def _inner(eqn: JaxprEqn) -> Jaxpr | None:
    """The jaxpr that an equation calls with its own operands, or None."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    found = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    found = getattr(found, "jaxpr", found)
    if found is None or found.constvars or len(found.invars) != len(eqn.invars):
        return None
    return found


def _branches(eqn: JaxprEqn) -> list[Jaxpr]:
    return [branch.jaxpr for branch in eqn.params["branches"]]


def called(eqn: JaxprEqn) -> tuple[list[Jaxpr], list[Atom]]:
    """Returns the jaxprs that an equation calls, none for a primitive, and their operands."""
    if eqn.primitive.name == "cond":
        return _branches(eqn), eqn.invars[1:]
    body = _inner(eqn)
    return ([] if body is None else [body]), eqn.invars


def inputs_of(jaxpr: Jaxpr, sources: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Returns for each output the inputs that its value depends on.

    Args:
      jaxpr: without the closure.
      sources: what each input depends on itself.

    Returns:
      Sets of numbers from `sources`, and of RANDOM.
    """
    known: dict[Var, frozenset[int]] = dict(zip(jaxpr.invars, sources, strict=True))

    def read(x: Atom) -> frozenset[int]:
        return frozenset() if isinstance(x, Literal) else known.get(x, frozenset())

    for eqn in jaxpr.eqns:
        operands = [read(x) for x in eqn.invars]
        name, body = eqn.primitive.name, _inner(eqn)
        if body is not None:
            outs = inputs_of(body, operands)
        elif name == "cond":
            each = [inputs_of(branch, operands[1:]) for branch in _branches(eqn)]
            outs = [operands[0].union(*parts) for parts in zip(*each, strict=True)]
        else:
            drawn = {RANDOM} if name in ("random_bits", "threefry2x32") else set()
            outs = [frozenset(drawn).union(*operands)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def alike(a: Jaxpr, b: Jaxpr) -> bool:
    """Returns whether two jaxprs are the same program but for the sizes of their arrays."""
    numbers: tuple[dict[Var, int], dict[Var, int]] = ({}, {})

    def name(side: int, x: Atom) -> int | tuple[str, bytes, str]:
        if isinstance(x, Literal):
            return ("literal", np.asarray(x.val).tobytes(), str(aval_of(x).dtype))
        return numbers[side].setdefault(aliases.get(x, x), len(numbers[side]))

    def same(xs: Sequence[Atom], ys: Sequence[Atom]) -> bool:
        return [name(0, x) for x in xs] == [name(1, y) for y in ys]

    # A matrix is ravelled and a vector is not: the result has the name of the operand.
    ravels = [e for j in (a, b) for e in j.eqns if _is_ravel(e)]
    aliases: dict[Var, Any] = {e.outvars[0]: e.invars[0] for e in ravels}
    x_eqns, y_eqns = ([e for e in j.eqns if not _is_ravel(e)] for j in (a, b))
    if len(x_eqns) != len(y_eqns):
        return False
    if not same(a.invars, b.invars) or not same(a.constvars, b.constvars):
        return False
    for x, y in zip(x_eqns, y_eqns, strict=True):
        if x.primitive is not y.primitive or x.params.keys() != y.params.keys():
            return False
        if not same(x.invars, y.invars) or not same(x.outvars, y.outvars):
            return False
        if not all(_same_setting(k, v, y.params[k]) for k, v in x.params.items()):
            return False
    return same(a.outvars, b.outvars)


def _is_ravel(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "reshape" or isinstance(eqn.invars[0], Literal):
        return False
    return aval_of(eqn.outvars[0]).shape == (aval_of(eqn.invars[0]).size,)


def _same_setting(name: str, a: Any, b: Any) -> bool:
    if name in _SIZES:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(_same_setting(name, x, y) for x, y in zip(a, b, strict=True))
    inner = [getattr(x, "jaxpr", x) for x in (a, b)]
    if all(hasattr(x, "eqns") for x in inner):
        return alike(*inner)
    if callable(a) and callable(b):  # differentiation rules, which are not used here
        return True
    return bool(a == b)


class _Kind(NamedTuple):
    """What is known of a value.

    Args:
      name: `element` of a weight's array, computed number by number; `flat`, the same as a vector;
        `partial`, a sum (maximum, ...) over whole weights that still lacks others; `scalar`,
        `uniform` (copies of a scalar, or random numbers) and `constant`, which no weight enters.
      leaves: the weights that enter.
      reduction: of a partial one.
    """

    name: str
    leaves: frozenset[int] = frozenset()
    reduction: str = ""


_SCALAR, _UNIFORM, _CONSTANT = _Kind("scalar"), _Kind("uniform"), _Kind("constant")


def element(leaf: int) -> _Kind:
    """Returns the kind of a number of a weight's array, or of a moment's."""
    return _Kind("element", frozenset((leaf,)))


def without_leaf(shape: Shape) -> _Kind:
    """Returns the kind of an array that belongs to no weight."""
    return _CONSTANT if shape else _SCALAR


def is_elementwise(jaxpr: Jaxpr, kinds_in: Sequence[_Kind], wanted: Sequence[_Kind]) -> bool:
    """Returns whether a program computes its outputs number by number.

    Sums over all weights together are allowed: how a weight is cut into several changes them by
    rounding alone.

    Args:
      jaxpr: without the closure.
      kinds_in: the kind of each input.
      wanted: of each output: the element of a weight, or what belongs to none.
    """
    count = len(frozenset[int]().union(*(kind.leaves for kind in kinds_in)))
    try:
        outs = _kinds(jaxpr, kinds_in, count)
    except _NotElementwise:
        return False
    uniform = ("uniform", "scalar")
    return all(
        out == want or (want.name == "element" and out.name in uniform)
        or (want.name in ("scalar", "constant") and not out.leaves)
        for out, want in zip(outs, wanted, strict=True)
    )  # fmt: skip


def _kinds(jaxpr: Jaxpr, kinds_in: Sequence[_Kind], count: int) -> list[_Kind]:
    known: dict[Var, _Kind] = dict(zip(jaxpr.invars, kinds_in, strict=True))

    def read(x: Atom) -> _Kind:
        if isinstance(x, Literal):
            return without_leaf(aval_of(x).shape)
        return (
            known[x] if x in known else without_leaf(aval_of(x).shape)
        )  # a constant of the closure

    for eqn in jaxpr.eqns:
        operands = [read(x) for x in eqn.invars]
        body = _inner(eqn)
        if body is not None:
            outs = _kinds(body, operands, count)
        elif eqn.primitive.name == "cond":
            if operands[0] != _SCALAR:
                raise _NotElementwise
            each = [_kinds(branch, operands[1:], count) for branch in _branches(eqn)]
            outs = [_joined(parts) for parts in zip(*each, strict=True)]
        else:
            outs = [_kind(eqn, operands, aval_of(x).shape) for x in eqn.outvars]
        for x, out in zip(eqn.outvars, outs, strict=True):
            if out.name == "partial" and len(out.leaves) == count > 1 and not aval_of(x).shape:
                out = _SCALAR  # it lacks nothing
            known[x] = out
    return [read(x) for x in jaxpr.outvars]


def _joined(kinds: Sequence[_Kind]) -> _Kind:
    found = {kind for kind in kinds if kind != _UNIFORM} or {_UNIFORM}
    if len(found) > 1:
        raise _NotElementwise
    return found.pop()


def _kind(eqn: JaxprEqn, operands: Sequence[_Kind], shape: Shape) -> _Kind:
    """The kind of a result of one primitive."""
    name = eqn.primitive.name
    leaves = frozenset[int]().union(*(kind.leaves for kind in operands))
    names = {kind.name for kind in operands}
    if not leaves:
        if not shape:
            if name in _REDUCTIONS and "uniform" in names:
                raise _NotElementwise  # it counts the numbers of an array
            return _SCALAR
        spread = name == "broadcast_in_dim" and names == {"scalar"}
        together = name in _ELEMENTWISE and names <= {"scalar", "uniform"}
        return _UNIFORM if spread or together or name == "random_bits" else _CONSTANT
    first = operands[0]
    if "partial" in names:
        return _partial(eqn, operands, shape)
    if "constant" in names or len(leaves) > 1:
        raise _NotElementwise
    size = int(np.prod(aval_of(eqn.invars[0]).shape))
    if name in _ELEMENTWISE and "flat" not in names:
        return element(*leaves)
    if name in _REDUCTIONS and not shape:
        return _Kind("partial", leaves, _REDUCTIONS[name])
    if name == "broadcast_in_dim" and shape == aval_of(eqn.invars[0]).shape:
        return first
    if name == "reshape" and shape == (size,):
        return _Kind("flat", leaves)
    if name == "dot_general" and not shape and names <= {"element", "flat"}:
        return _Kind("partial", leaves, "add")
    raise _NotElementwise


def _partial(eqn: JaxprEqn, operands: Sequence[_Kind], shape: Shape) -> _Kind:
    """The kind of a result that a sum over some of the weights enters."""
    name = eqn.primitive.name
    parts = [kind for kind in operands if kind.name == "partial"]
    reductions = {kind.reduction for kind in parts}
    leaves = frozenset[int]().union(*(kind.leaves for kind in parts))
    if len(reductions) > 1 or len(leaves) != sum(len(kind.leaves) for kind in parts):
        raise _NotElementwise
    (reduction,) = reductions
    rest = [x for x, kind in zip(eqn.invars, operands, strict=True) if kind.name != "partial"]
    neutral = all(
        isinstance(x, Literal) and (reduction in ("max", "min") or x.val == _NEUTRAL[reduction])
        for x in rest
    )
    moves = ("convert_element_type", "broadcast_in_dim", "reshape", "copy")
    moved = (name in moves and len(shape) < 2) or (name == "concatenate" and not rest)
    reduced = _REDUCTIONS.get(name) == reduction or (name == reduction and neutral)
    if moved or (reduced and not shape):
        return _Kind("partial", leaves, reduction)
    raise _NotElementwise


def traced(function: Callable[..., PyTree], *args: PyTree) -> tuple[ClosedJaxpr, PyTree]:
    """Returns the closed jaxpr of a function of abstract arrays, and its abstract output."""
    # Third parties mix dtypes and ranks, as where the optimizer really runs.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.make_jaxpr(function, return_shape=True)(*args)
