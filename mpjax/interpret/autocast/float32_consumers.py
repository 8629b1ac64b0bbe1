"""Operations that feed float32 operations only, and run in float32 for that.

A jaxpr has `exp(x - max(x))` as `sub` and `exp`. With `exp` alone in float32 the difference is
already rounded to 8 bits, and the softmax is off by percents. An operation that works value by
value, or only moves values, therefore runs in float32

- if every reader of its results runs in float32 (because of the lists, or of this rule);
- if its arguments are in float32 already, cast for another reader, and every reader of its results
  has another float32 argument: rounding its result and its cotangent would save nothing.

A maximum is exact in any dtype; it runs in float32 if its argument is cast anyway, which saves a
cast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import jax.numpy as jnp
from jax.core import Atom
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from mpjax.interpret.core.op_lists import ELEMENTWISE, SHAPE, WHOLE, WIDE, operation
from mpjax.interpret.core.retrace import is_float

_EXACT = frozenset({"reduce_max", "reduce_min"})
_MAY_FOLLOW = ELEMENTWISE | SHAPE | _EXACT
_FUNCTIONS = WHOLE | WIDE
_SHORT = 8  # equations


class _Plan:
    """The equations of a jaxpr, their readers, and which values are known to be in float32."""

    def __init__(
        self, jaxpr: Jaxpr, kind: Callable[[JaxprEqn], str | None], wide: Collection[Var]
    ) -> None:
        self.eqns = jaxpr.eqns
        self.kinds = [kind(eqn) for eqn in jaxpr.eqns]
        self.full = [kind in ("full", "wide") for kind in self.kinds]
        self.follows = [_may_follow(eqn) for eqn in jaxpr.eqns]
        self.found: set[int] = set()
        self.readers: dict[Atom, list[int]] = {}
        for index, eqn in enumerate(jaxpr.eqns):
            for atom in eqn.invars:
                if isinstance(atom, Var):
                    self.readers.setdefault(atom, []).append(index)
        self.leaves = {atom for atom in jaxpr.outvars if isinstance(atom, Var)}
        constants = (v for v in jaxpr.constvars if getattr(v.aval, "dtype", None) == jnp.float32)
        self.wide: set[Atom] = {*wide, *constants}
        self.weak: set[Atom] = set()

    def sweep(self, wanted: Callable[[int, list[int]], bool]) -> None:
        """Adds, from the last equation to the first, those that are wanted, by their readers."""
        for index in range(len(self.eqns) - 1, -1, -1):
            outs = self.eqns[index].outvars
            if not self.follows[index] or index in self.found or self.leaves.intersection(outs):
                continue
            consumers = [reader for var in outs for reader in self.readers.get(var, ())]
            if consumers and wanted(index, consumers):
                self.full[index] = True
                self.found.add(index)

    def by_readers(self, index: int, readers: list[int]) -> bool:
        """Whether every reader is in float32 by itself."""
        eqn = self.eqns[index]
        if eqn.primitive.name in _EXACT and not self._is_cast(eqn.invars[0], index):
            return False
        return all(self.full[r] for r in readers)

    def by_both(self, index: int, readers: list[int]) -> bool:
        """Whether every reader gets float32 anyway, and the arguments are there in float32."""
        return all(self.full[r] or self._is_wide(r) for r in readers) and all(
            isinstance(atom, Literal)
            or not is_float(atom.aval)
            or atom in self.wide
            or atom in self.weak
            or self._is_cast(atom, index)
            for atom in self.eqns[index].invars
        )

    def look_forward(self) -> None:
        """Finds which values are in float32, and which are weak."""
        for index, eqn in enumerate(self.eqns):
            outs = [var for var in eqn.outvars if is_float(var.aval)]
            floats = [a for a in eqn.invars if isinstance(a, Var) and is_float(a.aval)]
            strong = [atom for atom in floats if atom not in self.weak]
            if self.kinds[index] == "full" or index in self.found:
                self.wide.update(outs)
            elif self.kinds[index] == "wide" or (
                self.follows[index] and self.kinds[index] != "bias"
            ):
                if not strong:
                    self.weak.update(outs)
                elif not self.wide.isdisjoint(strong):
                    self.wide.update(outs)

    def _is_wide(self, index: int) -> bool:
        return self.follows[index] and not self.wide.isdisjoint(self.eqns[index].outvars)

    def _is_cast(self, atom: Atom, index: int) -> bool:
        """Whether another equation reads a value in float32."""
        return any(self.full[r] for r in self.readers.get(atom, ()) if r != index)


def float32_consumers(
    jaxpr: Jaxpr, kind: Callable[[JaxprEqn], str | None], wide: Collection[Var] = ()
) -> frozenset[int]:
    """Returns the numbers of the equations that are computed in float32 because of their readers.

    Args:
      jaxpr: its equations.
      kind: the list that an equation is on: `full` and `wide` compute in float32 by themselves;
        `bias` takes the dtype of a product.
      wide: those of its inputs that come in float32.
    """
    plan = _Plan(jaxpr, kind, wide)
    plan.sweep(plan.by_readers)
    plan.look_forward()
    plan.sweep(plan.by_both)
    return frozenset(plan.found)


def _may_follow(eqn: JaxprEqn) -> bool:
    """Whether an equation works value by value or only moves values."""
    if eqn.primitive.name in _MAY_FOLLOW or operation(eqn) in _FUNCTIONS:
        return True
    if eqn.primitive.name not in ("jit", "pjit"):
        return False
    inner = eqn.params["jaxpr"].jaxpr.eqns  # of jnp.where, jnp.clip, jnp.take_along_axis ...
    return len(inner) <= _SHORT and all(_moves(e) for e in inner)


def _moves(eqn: JaxprEqn) -> bool:
    if not any(is_float(var.aval) for var in eqn.outvars):
        return True
    if eqn.primitive.name == "convert_element_type":
        return not is_float(eqn.invars[0].aval)
    return eqn.primitive.name in ELEMENTWISE | SHAPE
