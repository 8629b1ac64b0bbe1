"""For each value of a program the operation that makes it and those that read it, through calls.

Found by `walk` on values that hold their history alone, so nothing is computed. Carries of loops
and results of branches are joins: values that are one of several others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from jax.core import Atom, ShapedArray
from jax.extend.core import ClosedJaxpr, JaxprEqn

from mpjax.interpret.core.location import Location
from mpjax.interpret.core.platforms import branch_taken, check_platform
from mpjax.interpret.core.retrace import aval_of, is_float
from mpjax.interpret.core.trace import Program
from mpjax.interpret.core.walk import SCALAR, inner_jaxprs, scan_sizes, walk
from mpjax.typing import Array

WIDE = 4  # bytes: float32 and float64; narrower floats are low


class Value:
    """An array of a program.

    Args:
      aval: its shape and dtype.
      step: the operation that makes it; None for arguments, constants and joins.
      origin: what it is if it is an argument or a constant, such as `args[0]['w']`.
    """

    __slots__ = ("aval", "step", "origin", "number", "same", "joins", "readers", "returned")

    def __init__(self, aval: ShapedArray, step: Step | None = None, origin: str = "") -> None:
        self.aval, self.step, self.origin = aval, step, origin
        self.number = False  # a scalar constant
        self.same: list[Value] = []  # the values that it is one of
        self.joins: list[Value] = []  # the values that may be this one
        self.readers: list[Step] = []
        self.returned = False

    @property
    def wide(self) -> bool:
        """Whether it is float32 or float64."""
        return is_float(self.aval) and self.aval.dtype.itemsize >= WIDE

    @property
    def low(self) -> bool:
        """Whether it is a float narrower than float32."""
        return is_float(self.aval) and self.aval.dtype.itemsize < WIDE


class Step:
    """An operation of a program, one for each call of the jaxpr that holds it.

    Args:
      eqn: the equation.
      location: where it stands; `location.loops` counts how often it runs.
      ins: its arguments.
      order: its number.
    """

    __slots__ = ("eqn", "location", "ins", "outs", "order")

    def __init__(self, eqn: JaxprEqn, location: Location, ins: list[Value], order: int) -> None:
        self.eqn, self.location, self.ins, self.order = eqn, location, ins, order
        self.outs = [Value(aval_of(var), self) for var in eqn.outvars]
        for value in ins:
            value.readers.append(self)

    @property
    def name(self) -> str:
        """The name of its primitive."""
        return self.eqn.primitive.name

    @property
    def transposed(self) -> bool:
        """Whether it is part of a gradient and not a forward operation that is run again."""
        return self.location.backward and not self.location.recomputed


class Flow:
    """The steps of a program in order, those inside control flow where their holder stands.

    A call that depends on the platform is the branch that one platform takes.

    Args:
      program: a traced function.
      platform: that platform, as `check_platform` gives it; None for the default device's.
    """

    def __init__(self, program: Program, platform: str | None = None) -> None:
        self._platform = check_platform("flow", None) if platform is None else platform
        self.steps: list[Step] = []
        self.paths: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self._constants: dict[int, tuple[Value, Array]] = {}
        closed = program.closed
        self.args = [
            Value(var.aval, origin=name)
            for var, name in zip(closed.jaxpr.invars, program.names, strict=True)
        ]
        self.outs = self._run(closed, self.args, Location())
        for value in self.outs:
            value.returned = True

    def _run(
        self, closed: ClosedJaxpr, args: Sequence[Value | Array], outer: Location
    ) -> list[Value]:
        outs = walk(closed, args, self._visit, outer)
        return [self._value(*pair) for pair in zip(closed.jaxpr.outvars, outs, strict=True)]

    def _value(self, atom: Atom, x: Value | Array) -> Value:
        if isinstance(x, Value):
            return x
        if id(x) not in self._constants:
            aval = aval_of(atom)
            shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", "")
            size = f"{dtype}[{','.join(map(str, shape))}]"
            value = Value(aval, origin=f"a constant {size}" if shape else f"the {dtype} number {x}")
            value.number = not shape
            self._constants[id(x)] = value, x  # held, so that its id stays its own
        return self._constants[id(x)][0]

    def _visit(self, eqn: JaxprEqn, location: Location, args: list[Value | Array]) -> list[Value]:
        self.paths[location.path] = None
        ins = [self._value(*pair) for pair in zip(eqn.invars, args, strict=True)]
        name = eqn.primitive.name
        if rule := _RULES.get(name):
            return rule(self, eqn, location, ins)
        held = inner_jaxprs(eqn)
        if len(held) == 1:
            inner = held[0].jaxpr
            if len(inner.invars) == len(ins) and len(inner.outvars) == len(eqn.outvars):
                return self._run(held[0], ins, location)
        if held and name not in SCALAR:
            self.notes[f"{name} is one operation here: what runs in it is not looked into"] = None
        step = Step(eqn, location, ins, len(self.steps))
        self.steps.append(step)
        return step.outs

    def _scan(self, eqn: JaxprEqn, location: Location, ins: list[Value]) -> list[Value]:
        body, (n, size) = eqn.params["jaxpr"], scan_sizes(eqn)
        inputs = [*ins[:n], *map(_join, body.in_avals[n:], ins[n:])]
        within = location._replace(loops=location.loops * int(eqn.params["length"]))
        outs = self._run(body, inputs, within)
        _feed(inputs[n : n + size], outs)
        return _joins(eqn, outs)

    def _while(self, eqn: JaxprEqn, location: Location, ins: list[Value]) -> list[Value]:
        self.notes["a while loop counts as one iteration: how many it takes is not known"] = None
        p = eqn.params
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        carry = [_join(x.aval, x) for x in ins[m:]]
        for value in self._run(p["cond_jaxpr"], [*ins[:n], *carry], location):
            value.returned = True  # the predicate
        outs = self._run(p["body_jaxpr"], [*ins[n:m], *carry], location)
        _feed(carry, outs)
        return _joins(eqn, carry, outs)

    def _cond(self, eqn: JaxprEqn, location: Location, ins: list[Value]) -> list[Value]:
        number = branch_taken(eqn, self._platform)
        if number is not None:
            self.notes[f"a call that depends on the platform counts as on {self._platform}"] = None
            return self._run(eqn.params["branches"][number], ins[1:], location)
        self.notes["every branch of a conditional counts as if it ran"] = None
        ins[0].returned = True  # the index of the branch
        branches = [self._run(branch, ins[1:], location) for branch in eqn.params["branches"]]
        return _joins(eqn, *branches)

    def _linear_solve(self, eqn: JaxprEqn, location: Location, ins: list[Value]) -> list[Value]:
        sizes = list(eqn.params["const_lengths"])
        first = sum(sizes[:2])  # after the constants of the operator and of its transpose
        inputs = [*ins[first : first + sizes[2]], *ins[sum(sizes) :]]
        outs = self._run(eqn.params["jaxprs"].solve, inputs, location)
        return _joins(eqn, outs[: len(eqn.outvars)])

    def _shard_map(self, eqn: JaxprEqn, location: Location, ins: list[Value]) -> list[Value]:
        (held,) = inner_jaxprs(eqn)
        sizes = dict(eqn.params["mesh"].shape)
        shards = math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
        inputs = list(map(_join, held.in_avals, ins))
        return _joins(
            eqn, self._run(held, inputs, location._replace(loops=location.loops * shards))
        )


_RULES: dict[str, Callable[[Flow, JaxprEqn, Location, list[Value]], list[Value]]] = {
    "scan": Flow._scan,
    "while": Flow._while,
    "cond": Flow._cond,
    "shard_map": Flow._shard_map,
    "custom_linear_solve": Flow._linear_solve,
}


def _joins(eqn: JaxprEqn, *outs: Sequence[Value]) -> list[Value]:
    """The results of an equation, each a join of what its jaxprs return for it."""
    return [_join(aval_of(var), *values) for var, *values in zip(eqn.outvars, *outs, strict=True)]


def reach(starts: Iterable[Value], ahead: Callable[[Value], Iterable[Value]]) -> Iterator[Value]:
    """Yields values and what `ahead` returns for each of them, every value once, depth first."""
    visited, todo = set[Value](), list(starts)
    while todo:
        value = todo.pop()
        if value not in visited:
            visited.add(value)
            yield value
            todo += ahead(value)


def _join(aval: ShapedArray, *values: Value) -> Value:
    join = Value(aval)
    for value in values:
        _feed([join], [value])
    return join


def _feed(joins: Sequence[Value], values: Sequence[Value]) -> None:
    for join, value in zip(joins, values, strict=False):
        join.same.append(value)
        value.joins.append(join)
