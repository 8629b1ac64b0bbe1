"""Which pass an equation belongs to: forward, backward or optimizer.

JAX marks transposed equations. It does not mark the derivatives that it computes in the forward
pass as residuals, such as 1 / (2 sqrt(x)): an equation whose results only backward equations read
is backward as well. An equation behind the last transposed one, outside every differentiation, is
the optimizer's, unless it depends on the forward pass alone (a metric).
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from mpjax.interpret.core.location import Location, location_of
from mpjax.interpret.core.walk import inner_jaxprs

_WHOLE = ("scan", "while", "cond", "shard_map")  # each output depends on all inputs


def held_jaxprs(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """Returns the jaxprs that an equation holds, in the order of `Rebind`'s numbers."""
    if eqn.primitive.name == "while":
        return [eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]]
    return inner_jaxprs(eqn)


def direction(closed: ClosedJaxpr, key: Sequence[int | None]) -> str:
    """Returns `forward`, `backward` or `optimizer` for an equation of a program.

    Args:
      closed: the program.
      key: numbers of the equations that hold it, from outside in, each with that of the jaxpr it
        holds (None for the body of a loop), and its own.
    """
    wanted = [True] * len(closed.jaxpr.outvars)
    jaxpr, outer = closed.jaxpr, Location()
    numbers = list(key)
    while True:
        index = numbers.pop(0)
        assert index is not None
        eqn, location = jaxpr.eqns[index], location_of(jaxpr.eqns[index], outer, line=False)
        if location.backward:
            return "backward"
        forward, read = _forward(jaxpr, wanted, outer)
        if not forward[index]:
            return "backward"
        if _is_optimizer(jaxpr, index, outer):
            return "optimizer"
        if not numbers:
            return "forward"
        number = numbers.pop(0)
        held = held_jaxprs(eqn)
        inner = held[number if number is not None else len(held) - 1].jaxpr
        wanted = _inner_wanted(eqn, inner, [_is_read(var, read) for var in eqn.outvars])
        jaxpr, outer = inner, location


def _is_read(var: Var, read: dict[Var, bool]) -> bool:
    """Whether something forward reads a value; a value without readers counts as read."""
    return read.get(var, True)


def _inner_wanted(eqn: JaxprEqn, inner: Jaxpr, wanted: Sequence[bool]) -> list[bool]:
    """Which outputs of a held jaxpr something forward reads, given those of its equation."""
    count = len(inner.outvars)
    unknown = eqn.primitive.name == "while" or len(wanted) != count
    return [True] * count if unknown else list(wanted)


def _forward(
    jaxpr: Jaxpr, wanted: Sequence[bool], outer: Location
) -> tuple[list[bool], dict[Var, bool]]:
    """Which equations are forward; and of each value that is read, whether something forward does.

    Args:
      jaxpr: whose equations are looked at, from the last to the first.
      wanted: which of its outputs something forward reads.
      outer: where it stands.
    """
    read: dict[Var, bool] = {}

    def note(atoms: Sequence[object], by_forward: Sequence[bool]) -> None:
        for atom, forward in zip(atoms, by_forward, strict=True):
            if isinstance(atom, Var):
                read[atom] = read.get(atom, False) or forward

    note(jaxpr.outvars, wanted)
    found = [False] * len(jaxpr.eqns)
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        location = location_of(eqn, outer, line=False)
        outs = [_is_read(var, read) for var in eqn.outvars]
        used = any(var in read for var in eqn.outvars)
        found[index] = not location.backward and (not used or any(outs))
        ins = [found[index]] * len(eqn.invars)
        held = held_jaxprs(eqn)
        if found[index] and len(held) == 1 and len(held[0].jaxpr.invars) == len(eqn.invars):
            inner = held[0].jaxpr
            _, within = _forward(inner, _inner_wanted(eqn, inner, outs), location)
            ins = [within.get(var, False) for var in inner.invars]
        note(eqn.invars, ins)
    return found, read


def _holds_backward(eqn: JaxprEqn, outer: Location) -> bool:
    location = location_of(eqn, outer, line=False)
    if location.backward:
        return True
    return any(
        _holds_backward(inner, location) for held in held_jaxprs(eqn) for inner in held.jaxpr.eqns
    )


def _is_optimizer(jaxpr: Jaxpr, index: int, outer: Location) -> bool:
    """Whether an equation comes after the gradients and follows from them, or from none of it."""
    if outer.tangent:
        return False
    backward = [i for i, eqn in enumerate(jaxpr.eqns) if _holds_backward(eqn, outer)]
    if not backward or index <= backward[-1]:
        return False
    if location_of(jaxpr.eqns[index], outer, line=False).tangent:
        return False
    follows: dict[Var, set[str]] = {}
    for eqn in jaxpr.eqns[: index + 1]:
        parts = _follows(eqn, [_of(atom, follows) for atom in eqn.invars], outer)
        follows |= dict(zip(eqn.outvars, parts, strict=True))
    passes = set().union(*(_of(atom, follows) for atom in jaxpr.eqns[index].invars))
    return "backward" in passes or "forward" not in passes


def _of(atom: object, follows: dict[Var, set[str]]) -> set[str]:
    return follows.get(atom, set()) if isinstance(atom, Var) else set()


def _follows(eqn: JaxprEqn, ins: Sequence[set[str]], outer: Location) -> list[set[str]]:
    """Of each output, whether it follows from forward and from backward equations."""
    location, everything = location_of(eqn, outer, line=False), set().union(*ins)
    if location.backward:
        return [everything | {"backward"}] * len(eqn.outvars)
    held = held_jaxprs(eqn)
    if len(held) == 1 and eqn.primitive.name not in _WHOLE and len(ins) == len(held[0].in_avals):
        inner = held[0].jaxpr
        follows = dict(zip(inner.invars, ins, strict=True))
        for each in inner.eqns:
            parts = _follows(each, [_of(atom, follows) for atom in each.invars], location)
            follows |= dict(zip(each.outvars, parts, strict=True))
        return [_of(atom, follows) for atom in inner.outvars]
    if location.tangent:
        everything = everything | {"forward"}
    if _holds_backward(eqn, outer):
        everything = everything | {"backward"}
    return [everything] * len(eqn.outvars)
