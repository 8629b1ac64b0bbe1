"""Which pass an equation belongs to: forward, backward or optimizer.

JAX marks transposed equations. It does not mark the derivatives that it computes in the forward
pass as residuals, such as 1 / (2 sqrt(x)): an equation whose results only backward equations read
is backward as well. An equation behind the last transposed one, outside every differentiation, is
the optimizer's, unless it depends on the forward pass alone (a metric).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jax.core import Atom
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
      key: as `holders` takes it.
    """
    outer, holder, wanted = Location(), "", [True] * len(closed.jaxpr.outvars)
    for jaxpr, index in holders(closed, key):
        eqn, location = jaxpr.eqns[index], location_of(jaxpr.eqns[index], outer, line=False)
        if location.backward:
            return "backward"
        forward, read = _forward(jaxpr, _inner_wanted(holder, jaxpr, wanted), outer)
        if not forward[index]:
            return "backward"
        if _is_optimizer(jaxpr, index, outer):
            return "optimizer"
        outer, holder = location, eqn.primitive.name
        wanted = [read.get(var, True) for var in eqn.outvars]
    return "forward"


def holders(closed: ClosedJaxpr, key: Sequence[int | None]) -> Iterator[tuple[Jaxpr, int]]:
    """Yields the jaxprs that hold an equation, from outside in, and which equation it is in.

    Args:
      closed: the program.
      key: numbers of the equations that hold it, from outside in, each with that of the jaxpr it
        holds (None for the body of a loop), and its own.
    """
    jaxpr = closed.jaxpr
    for position in range(0, len(key), 2):
        index = key[position]
        assert index is not None
        yield jaxpr, index
        for number in key[position + 1 : position + 2]:
            jaxpr = held_jaxprs(jaxpr.eqns[index])[-1 if number is None else number].jaxpr


def _inner_wanted(holder: str, inner: Jaxpr, wanted: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr something forward reads, from the results of its equation."""
    count = len(inner.outvars)
    return [True] * count if holder == "while" or len(wanted) != count else list(wanted)


def _forward(
    jaxpr: Jaxpr, wanted: Sequence[bool], outer: Location
) -> tuple[list[bool], dict[Var, bool]]:
    """Which equations are forward; and of each value that is read, whether something forward does.

    `wanted` says which outputs something forward reads. A value without readers counts as read.
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
        outs = [read.get(var, True) for var in eqn.outvars]
        used = any(var in read for var in eqn.outvars)
        found[index] = not location.backward and (not used or any(outs))
        ins = [found[index]] * len(eqn.invars)
        held = held_jaxprs(eqn)
        if found[index] and len(held) == 1 and len(held[0].jaxpr.invars) == len(eqn.invars):
            inner = held[0].jaxpr
            wanted = _inner_wanted(eqn.primitive.name, inner, outs)
            _, within = _forward(inner, wanted, location)
            ins = [within.get(var, False) for var in inner.invars]
        note(eqn.invars, ins)
    return found, read


def _holds_backward(eqn: JaxprEqn, outer: Location) -> bool:
    location = location_of(eqn, outer, line=False)
    inner = (each for held in held_jaxprs(eqn) for each in held.jaxpr.eqns)
    return location.backward or any(_holds_backward(each, location) for each in inner)


def _is_optimizer(jaxpr: Jaxpr, index: int, outer: Location) -> bool:
    """Whether an equation comes after the gradients and follows from them, or from none of it."""
    if outer.tangent:
        return False
    backward = [i for i, eqn in enumerate(jaxpr.eqns) if _holds_backward(eqn, outer)]
    if not backward or index <= backward[-1]:
        return False
    if location_of(jaxpr.eqns[index], outer, line=False).tangent:
        return False
    passes = set().union(*_passes(jaxpr.eqns[:index], {}, jaxpr.eqns[index].invars, outer))
    return "backward" in passes or "forward" not in passes


def _passes(
    eqns: Sequence[JaxprEqn],
    known: dict[Var, set[str]],
    wanted: Sequence[Atom],
    outer: Location,
) -> list[set[str]]:
    """Of each wanted value, after some equations, which passes it follows from."""

    def of(atoms: Sequence[Atom]) -> list[set[str]]:
        return [known.get(atom, set()) if isinstance(atom, Var) else set() for atom in atoms]

    for eqn in eqns:
        known |= zip(eqn.outvars, _follows(eqn, of(eqn.invars), outer), strict=True)
    return of(wanted)


def _follows(eqn: JaxprEqn, ins: Sequence[set[str]], outer: Location) -> list[set[str]]:
    """Of each output, whether it follows from forward and from backward equations."""
    location, everything = location_of(eqn, outer, line=False), set().union(*ins)
    if location.backward:
        return [everything | {"backward"}] * len(eqn.outvars)
    held = held_jaxprs(eqn)
    if len(held) == 1 and eqn.primitive.name not in _WHOLE and len(ins) == len(held[0].in_avals):
        inner = held[0].jaxpr
        known = dict(zip(inner.invars, ins, strict=True))
        return _passes(inner.eqns, known, inner.outvars, location)
    everything |= {"forward"} if location.tangent else set()
    everything |= {"backward"} if _holds_backward(eqn, outer) else set()
    return [everything] * len(eqn.outvars)
