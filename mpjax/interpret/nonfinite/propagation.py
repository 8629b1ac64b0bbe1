"""Propagation of infinities and NaN: which sites they reach, and whether they affect an output.

They are followed on the host, along values that were not finite when the program ran. A gated step
returns its old state when it breaks, so that all outputs are finite; there the fault reaches an
`is_finite`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from mpjax.interpret.core.walk import scan_sizes
from mpjax.interpret.nonfinite.direction import held_jaxprs
from mpjax.interpret.nonfinite.fault import is_inexact
from mpjax.interpret.nonfinite.sites import Key


class Propagation:
    """How far the infinities and NaN of some sites came.

    Args:
      closed: the program.
      starts: these sites.
      sites: all sites.
      nonfinite: those that were not finite.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        starts: Collection[Key],
        sites: Collection[Key],
        nonfinite: Collection[Key],
    ) -> None:
        self._starts, self._sites, self._nonfinite = starts, sites, nonfinite
        self._holders = {key[:size] for key in starts for size in range(1, len(key) + 1)}
        self._reached_check = False
        self.reached_sites: set[Key] = set(starts)
        outs = self._through(closed.jaxpr, (), [False] * len(closed.jaxpr.invars))
        self.outs = frozenset(number for number, is_nonfinite in enumerate(outs) if is_nonfinite)
        self.affects_output = self._reached_check or bool(self.outs)

    def _through(self, jaxpr: Jaxpr, key: Key, ins: Sequence[bool]) -> list[bool]:
        broken = {var for var, is_nonfinite in zip(jaxpr.invars, ins, strict=True) if is_nonfinite}
        for index, eqn in enumerate(jaxpr.eqns):
            own = (*key, index)
            operands = [isinstance(atom, Var) and atom in broken for atom in eqn.invars]
            if any(operands) or own in self._holders:
                outs = self._equation(eqn, own, operands)
                broken |= {
                    var
                    for var, is_nonfinite in zip(eqn.outvars, outs, strict=True)
                    if is_nonfinite and is_inexact(var.aval)
                }
        return [isinstance(atom, Var) and atom in broken for atom in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, key: Key, ins: list[bool]) -> list[bool]:
        """Which results of an equation are not finite, from which operands are."""
        name, count = eqn.primitive.name, len(eqn.outvars)
        if key in self._starts:
            return [True] * count
        if key in self._sites:
            if key in self._nonfinite:
                self.reached_sites.add(key)
            return [key in self._nonfinite] * count
        if name == "is_finite":
            self._reached_check = True
            return [False]
        held = held_jaxprs(eqn)
        if name == "scan":
            consts, carry = scan_sizes(eqn)
            return self._loop(held[0].jaxpr, key, ins, consts, carry)
        if name == "while":
            skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            return self._loop(held[1].jaxpr, key, ins[skip:], consts, count)
        if name == "cond":
            parts = [self._through(j.jaxpr, (*key, i), ins[1:]) for i, j in enumerate(held)]
            return [any(each) for each in zip(*parts, strict=True)]
        if len(held) == 1 and len(held[0].jaxpr.invars) == len(ins):
            return self._through(held[0].jaxpr, (*key, 0), ins)
        return [any(ins)] * count

    def _loop(
        self, body: Jaxpr, key: Key, ins: Sequence[bool], consts: int, carry: int
    ) -> list[bool]:
        """Which results of a loop are not finite: its body, until the carry stays the same."""
        now = list(ins)
        while True:
            outs = self._through(body, (*key, None), now)
            after = list(now)
            for number, is_nonfinite in enumerate(outs[:carry]):
                after[consts + number] |= is_nonfinite
            if after == now:
                return outs
            now = after
