"""Weak constants: values made of Python numbers alone, which follow the dtype of other operands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Atom
from jax.extend.core import JaxprEqn, Literal, Var

from mpjax.interpret.core.retrace import is_float
from mpjax.interpret.core.walk import bind
from mpjax.typing import Array, DType

# A value that these give is no larger than their largest argument.
_KEEPS_BOUND = frozenset(
    {
        *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "slice", "neg"),
        *("select_n", "concatenate", "convert_element_type", "pad", "copy", "abs", "max", "min"),
        *("stop_gradient", "pvary", "rev", "gather", "dynamic_slice"),
    }
)
_WEAK_SUMS = frozenset({"reduce_sum", "cumsum"})
_HALF = float(jnp.finfo(jnp.float16).max)


class Weak:
    """The weak values of one jaxpr, each with a bound of its magnitude.

    A mask filled with `finfo(float32).min` is infinite in bfloat16, and -1e9 is in float16: where a
    bound does not fit into a dtype, the value is clamped, and infinities stay.

    Args:
      inputs: its inputs.
      bounds: of each; None for one that is not weak.
    """

    def __init__(self, inputs: Sequence[Var], bounds: Sequence[float | None]) -> None:
        pairs = zip(inputs, bounds, strict=True)
        self._bounds = {var: bound for var, bound in pairs if bound is not None}
        self._filled: dict[Atom, tuple[JaxprEqn, Array]] = {}  # a number, broadcast

    def bound(self, atom: Atom) -> float | None:
        """The largest magnitude of a weak value; None for one that is not weak."""
        if isinstance(atom, Literal):
            if np.ndim(atom.val) or not is_float(atom.aval):
                return None
            value = abs(float(atom.val))
            return value if np.isfinite(value) else 0.0  # an infinity fits every dtype
        return self._bounds.get(atom)

    def mark(self, var: Var, bound: float | None) -> None:
        """Says of a value that it is weak; nothing for None."""
        if bound is not None:
            self._bounds[var] = bound

    def follow(self, eqn: JaxprEqn, args: Sequence[Array]) -> None:
        """Marks the results of an equation whose floating-point arguments are all weak."""
        bounds = [self.bound(atom) for atom in eqn.invars if is_float(atom.aval)]
        if not bounds or None in bounds:
            return
        name = eqn.primitive.name
        if name == "broadcast_in_dim" and is_known_number(args[0]):
            self._filled[eqn.outvars[0]] = eqn, args[0]
        most = max(bound or 0.0 for bound in bounds)
        if name in _WEAK_SUMS:  # weak while it fits into float16
            axes = eqn.params["axes"] if name == "reduce_sum" else (eqn.params["axis"],)
            most *= math.prod(args[0].shape[axis] for axis in axes)
            if most <= _HALF:
                self._bounds[eqn.outvars[0]] = most
            return
        for var in eqn.outvars:
            self._bounds[var] = most if name in _KEEPS_BOUND else float("inf")

    def narrow(self, atom: Atom, x: Array, dtype: DType) -> Array | None:
        """Returns a weak value in a dtype, clamped where it does not fit; None if it is strong."""
        bound = self.bound(atom)
        if bound is None:
            return None
        if is_known_number(x):
            return _constant(x, dtype)
        if atom in self._filled:  # broadcast again instead of cast
            eqn, number = self._filled[atom]
            return bind(eqn, [_constant(number, dtype)])[0]
        limit = float(jnp.finfo(dtype).max)
        if bound > limit:
            most = jnp.asarray(limit, x.dtype)
            x = lax.select(lax.is_finite(x), lax.clamp(-most, x, most), x)
        return lax.convert_element_type(x, dtype)


def _constant(x: Array, dtype: DType) -> Any:
    """A number in a dtype, clamped where it does not fit."""
    number, limit = float(x), float(jnp.finfo(dtype).max)
    return np.asarray(np.clip(number, -limit, limit) if np.isfinite(number) else number, dtype)


def is_known_number(x: object) -> bool:
    """Returns whether a value is a number that is known while tracing."""
    return isinstance(x, np.ndarray | np.generic | float | int) and not np.ndim(x)
