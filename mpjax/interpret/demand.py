"""Backward demand: what feeds only float32 operations is computed in float32 too.

`exp(x - max(x))` reaches an operation list as `sub` and `exp`. With `exp` alone in float32 the
difference is already rounded to 8 bits, and the softmax is off by percents. An operation that
works value by value, or only moves values, therefore runs in float32 when every reader of its
results does. A maximum is exact in any dtype; it follows where its argument is in float32 anyway,
which saves a cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Var

from mpjax.interpret.lists import ELEMENTWISE, SHAPE

_EXACT = frozenset({"reduce_max", "reduce_min"})
_MAY_FOLLOW = ELEMENTWISE | SHAPE | _EXACT


def demanded(jaxpr: Jaxpr, is_full: Callable[[JaxprEqn], bool]) -> frozenset[int]:
    """Returns the numbers of the equations that are computed in float32 because of their readers.

    Args:
      jaxpr: its equations are looked at from the last to the first.
      is_full: whether an equation computes in float32 by itself.
    """
    readers: dict[Any, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if isinstance(atom, Var):
                readers.setdefault(atom, []).append(index)
    leaves = {atom for atom in jaxpr.outvars if isinstance(atom, Var)}
    full = [False] * len(jaxpr.eqns)
    found = set()
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        full[index] = is_full(eqn)
        if full[index] or eqn.primitive.name not in _MAY_FOLLOW:
            continue
        mine = [reader for var in eqn.outvars for reader in readers.get(var, ())]
        if eqn.primitive.name in _EXACT and not any(
            full[r] for r in readers.get(eqn.invars[0], ()) if r != index
        ):
            continue
        if mine and not leaves.intersection(eqn.outvars) and all(full[r] for r in mine):
            full[index] = True
            found.add(index)
    return frozenset(found)
