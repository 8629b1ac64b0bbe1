"""One operation in float32, whatever it was traced in."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from mpjax.interpret.core.op_lists import FOLLOW, FULL_CUDA, LOW
from mpjax.interpret.core.retrace import aval_of, cast, is_float
from mpjax.interpret.core.walk import bind
from mpjax.typing import Array, DType, DTypeLike

_KNOWN = FOLLOW | FULL_CUDA | LOW | {"convert_element_type"}
_FULL = jnp.dtype(jnp.float32)


def is_low(dtype: DTypeLike | None) -> bool:
    """Returns whether a dtype is a float narrower than float32."""
    return (
        dtype is not None
        and jnp.issubdtype(dtype, jnp.floating)
        and jnp.dtype(dtype).itemsize < _FULL.itemsize
    )


def widened(eqn: JaxprEqn, args: Sequence[Array]) -> list[Array] | None:
    """Runs an operation with everything low in float32; None for one that has to stay as it is.

    Args:
      eqn: the operation.
      args: its arguments, in whatever dtypes they come.
    """
    name = eqn.primitive.name
    if name not in _KNOWN:
        return None
    if name == "convert_element_type":
        if not is_low(eqn.params["new_dtype"]):
            return bind(eqn, args)
        return [lax.convert_element_type(args[0], jnp.float32)]
    floats = [x.dtype for x in args if is_float(x)]
    if not any(map(is_low, floats)) and not _mixed(eqn, floats):
        return None
    values = [cast(x, _FULL) if is_float(x) and is_low(x.dtype) else x for x in args]
    asked = is_low(eqn.params.get("preferred_element_type"))
    return bind(eqn, values, **({"preferred_element_type": _FULL} if asked else {}))


def runs_wide(eqn: JaxprEqn) -> bool:
    """Returns whether an operation is float32 already, or `widened` can run it so."""
    return eqn.primitive.name in _KNOWN or not any(
        is_low(getattr(atom.aval, "dtype", None)) for atom in (*eqn.invars, *eqn.outvars)
    )


def _mixed(eqn: JaxprEqn, dtypes: Sequence[DType]) -> bool:
    """Whether it was traced low and has float32 arguments already."""
    return list(dtypes) != [aval_of(a).dtype for a in eqn.invars if is_float(a.aval)]
