"""Donation: large inputs of a jitted function whose memory an output could take."""

from __future__ import annotations

import dataclasses
from collections import Counter

from jax.core import Atom

from mpjax.interpret.audit.cost import size_in_bytes
from mpjax.interpret.core.retrace import aval_of
from mpjax.interpret.core.trace import Program
from mpjax.typing import Shape

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


def undonated(fn: object, program: Program) -> tuple[Undonated, ...]:
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
    free = Counter(map(_kind, eqn.outvars))
    free.subtract(_kind(atom) for atom, donated in inputs if donated)
    names = dict(zip(jaxpr.invars, program.names, strict=True))
    found = []
    for atom, donated in inputs:
        kind, size = _kind(atom), size_in_bytes(atom.aval)
        if not donated and size >= LARGE and free[kind] > 0 and atom in names:
            free[kind] -= 1
            shape, dtype = kind
            found.append(Undonated(names[atom], f"{dtype}[{','.join(map(str, shape))}]", size))
    return tuple(found)


def _kind(atom: Atom) -> tuple[Shape, str]:
    return tuple(aval_of(atom).shape), str(aval_of(atom).dtype)
