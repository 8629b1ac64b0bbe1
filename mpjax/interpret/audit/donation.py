"""Donation: large inputs of a jitted function that an output could take the memory of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from mpjax.interpret.audit.cost import size_in_bytes
from mpjax.interpret.core.trace import Program

LARGE = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Undonated:
    """An input that is not donated, though an output of its shape and dtype has no memory yet.

    Args:
      name: of the argument, such as `args[0]['w']`.
      array: dtype and shape.
      size: in bytes.
    """

    name: str
    array: str
    size: int


def undonated(fn: Any, program: Program) -> tuple[Undonated, ...]:
    """Returns the large inputs that a `jax.jit` could donate and does not.

    Args:
      fn: the function; one that is not jitted donates nothing and misses nothing.
      program: it, traced.
    """
    jaxpr = program.closed.jaxpr
    if not hasattr(fn, "lower") or len(jaxpr.eqns) != 1:
        return ()
    (eqn,) = jaxpr.eqns
    if "donated_invars" not in eqn.params:
        return ()
    inputs = list(zip(eqn.invars, eqn.params["donated_invars"], strict=True))
    free = Counter(_kind(var.aval) for var in eqn.outvars)
    free.subtract(_kind(atom.aval) for atom, donated in inputs if donated)
    names = dict(zip(jaxpr.invars, program.names, strict=True))
    found = []
    for atom, donated in inputs:
        kind, size = _kind(atom.aval), size_in_bytes(atom.aval)
        if not donated and size >= LARGE and free[kind] > 0 and atom in names:
            free[kind] -= 1
            shape = ",".join(map(str, atom.aval.shape))
            found.append(Undonated(names[atom], f"{atom.aval.dtype}[{shape}]", size))
    return tuple(found)


def _kind(aval: Any) -> tuple[Any, ...]:
    return tuple(aval.shape), str(aval.dtype)
