"""The one walk over a jaxpr: equation by equation, with module path and source line at hand.

`walk` evaluates a jaxpr, each equation by the caller's `visit`; `equations` lists its equations.
Equations that hold jaxprs of their own are rebuilt by `control_flow.Rebind`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import lax
from jax.core import Atom, ShapedArray, Tracer
from jax.extend import source_info_util
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxpr_as_fun,
)

from mpjax.interpret.core.location import NOWHERE, Location, location_of
from mpjax.interpret.core.retrace import as_closed, aval_of, is_staged
from mpjax.ops.products.linear_map import applied, linear_map_p
from mpjax.typing import Array, DType

# What evaluates a jaxpr as if its equations stood in its place, and what has a rule beside it.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
V = TypeVar("V")  # what `walk` has for an array


@functools.lru_cache(maxsize=4096)
def _last_uses(jaxpr: Jaxpr) -> dict[int, list[Var]]:
    """Index of an equation -> the variables that are not read after it."""
    last: dict[Var, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for atom in (*eqn.invars, *eqn.outvars):
            if isinstance(atom, Var):
                last[atom] = index
    for atom in jaxpr.outvars:
        if isinstance(atom, Var):
            last.pop(atom, None)
    found: dict[int, list[Var]] = {}
    for var, index in last.items():
        found.setdefault(index, []).append(var)
    return found


@functools.lru_cache(maxsize=4096)
def _operation(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Array]:
    """A primitive as a function whose derivative JAX keeps, as it does for those of jax.numpy."""
    return jax.jit(lambda *args: primitive.bind(*args, **dict(params)), inline=True)


def bind(eqn: JaxprEqn, args: Sequence[Array], **changed: object) -> list[Array]:
    """Runs an equation's primitive on new arguments, with some of its parameters changed.

    The function by which a scatter combines two numbers follows the dtype of its arguments.
    """
    primitive, bound = eqn.primitive, eqn.params | changed
    combiner = bound.get("update_jaxpr")
    if combiner is not None and combiner.invars[0].aval.dtype != args[0].dtype:
        consts = bound.get("update_consts", ())
        bound["update_jaxpr"] = _combiner(combiner, tuple(consts), args[0].dtype)
        bound |= {"update_consts": ()} if consts else {}
    if primitive.multiple_results:
        return list(primitive.bind(*args, **primitive.get_bind_params(bound)))
    return [run(primitive, args, bound)]


def _combiner(old: Jaxpr, consts: tuple[Array, ...], dtype: DType) -> Jaxpr:
    """A function of two numbers in another dtype; that of `.at[].apply` computes as traced."""
    number, was = jax.ShapeDtypeStruct((), dtype), aval_of(old.invars[0]).dtype
    both = len(old.eqns) == 1 and list(old.eqns[0].invars) == list(old.invars)
    if not old.eqns and old.outvars == [old.invars[1]]:
        return jax.make_jaxpr(lambda a, b: b)(number, number).jaxpr
    if both and old.eqns[0].primitive.name in ("add", "mul", "min", "max"):
        return jax.make_jaxpr(old.eqns[0].primitive.bind)(number, number).jaxpr

    def inside(a: Array, b: Array) -> Array:
        wide = [lax.convert_element_type(x, was) for x in (a, b)]
        return lax.convert_element_type(jaxpr_as_fun(ClosedJaxpr(old, consts))(*wide)[0], dtype)

    return jax.make_jaxpr(inside)(number, number).jaxpr


def run(primitive: Primitive, args: Sequence[Array], params: dict[str, object]) -> Array:
    """Runs a primitive of one result; its rule of differentiation is traced only once."""
    if any(isinstance(x, Tracer) and not is_staged(x) for x in args):
        try:
            operation = _operation(primitive, tuple(params.items()))
        except TypeError:  # a parameter that cannot be a key
            return primitive.bind(*args, **params)
        return operation(*args)
    return primitive.bind(*args, **params)


def as_typed(x: Any) -> Any:
    """Returns a constant of a jaxpr with a dtype, which JAX does not give to True and False."""
    return np.bool_(x) if isinstance(x, bool) else x


def walk(
    closed: ClosedJaxpr,
    args: Sequence[V],
    visit: Callable[[JaxprEqn, Location, list[V]], Sequence[V]],
    outer: Location = NOWHERE,
    *,
    lines: bool = True,
) -> list[V]:
    """Evaluates a jaxpr, each equation by `visit`.

    Args:
      closed: the jaxpr with its constants, which come as arrays.
      args: one value for each of its inputs.
      visit: gets the equation, its location and its arguments, returns its results.
      outer: the location of the equation that holds this jaxpr.
      lines: whether locations carry the source line.

    Returns:
      One value for each output.
    """
    jaxpr = closed.jaxpr
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, map(as_typed, closed.consts), strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Atom) -> V:
        return as_typed(atom.val) if isinstance(atom, Literal) else env[atom]

    last, before = _last_uses(jaxpr), source_info_util.current_name_stack()
    for index, eqn in enumerate(jaxpr.eqns):
        info = eqn.source_info
        with (
            source_info_util.user_context(info.traceback, name_stack=before + info.name_stack),
            eqn.ctx.manager,
        ):
            outs = visit(eqn, location_of(eqn, outer, line=lines), [read(a) for a in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in last.get(index, ()):
            env.pop(var, None)
    return [read(atom) for atom in jaxpr.outvars]


class LocatedEquation(NamedTuple):
    """An equation and where it stands.

    Args:
      eqn: the equation.
      location: without its line.
    """

    eqn: JaxprEqn
    location: Location


# Jaxprs in these combine two numbers; they are no part of the program's own equations.
SCALAR = frozenset(
    {
        *("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "reduce"),
        *("reduce_window", "select_and_scatter", "argmin", "argmax"),
    }
)


def scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """Returns how many inputs of a scan are constants of its body, and how many are carried."""
    if "ft_in" in eqn.params:  # JAX 0.12
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


@functools.lru_cache(maxsize=1024)
def _applied(avals: tuple[ShapedArray, ...], params: tuple[tuple[str, Any], ...]) -> ClosedJaxpr:
    return jax.make_jaxpr(lambda *args: applied(*args, **dict(params)))(*avals)


def inner_jaxprs(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """Returns the jaxprs that an equation runs, in order; of a custom rule its plain function."""
    if eqn.primitive.name in SCALAR:
        return []
    if eqn.primitive is linear_map_p:  # what it runs is made when it is compiled
        return [_applied(tuple(map(aval_of, eqn.invars)), tuple(eqn.params.items()))]
    if "call_jaxpr" in eqn.params:  # beside it stand the rule's thunks
        held = [eqn.params["call_jaxpr"]]
    else:
        # Not jaxprs_in_params, which drops the constants that a closed jaxpr holds.
        values = (v if isinstance(v, tuple | list) else (v,) for v in eqn.params.values())
        held = [j for each in values for j in each if isinstance(j, Jaxpr | ClosedJaxpr)]
    # One whose constants are elsewhere, as lineax keeps that of an operator, is not what is run.
    return [as_closed(j) for j in held if isinstance(j, ClosedJaxpr) or not j.constvars]


def equations(closed: ClosedJaxpr, outer: Location = NOWHERE) -> Iterator[LocatedEquation]:
    """Yields every equation of a program, those inside control flow after the one that holds them.

    Args:
      closed: the program.
      outer: where it stands.
    """
    for eqn in closed.jaxpr.eqns:
        location = location_of(eqn, outer, line=False)
        yield LocatedEquation(eqn, location)
        for inner in inner_jaxprs(eqn):
            yield from equations(inner, location)
