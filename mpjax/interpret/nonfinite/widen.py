"""One operation in float32, whatever it was traced in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from mpjax.interpret.core.op_lists import FOLLOW, FULL_CUDA, LOW
from mpjax.interpret.core.retrace import cast, is_float
from mpjax.interpret.core.walk import bind

_KNOWN = FOLLOW | FULL_CUDA | LOW | {"convert_element_type"}
_FULL = jnp.dtype(jnp.float32)


def is_low(dtype: Any) -> bool:
    """Returns whether a dtype is a float narrower than float32."""
    return (
        dtype is not None
        and jnp.issubdtype(dtype, jnp.floating)
        and jnp.dtype(dtype).itemsize < _FULL.itemsize
    )


def widened(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any] | None:
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
    floats = [x.dtype for x in args if hasattr(x, "dtype") and is_float(x)]
    if not any(is_low(dtype) for dtype in floats) and not _mixed(eqn, floats):
        return None
    values = [
        cast(x, _FULL) if hasattr(x, "dtype") and is_float(x) and is_low(x.dtype) else x
        for x in args
    ]
    changed: dict[str, Any] = {}
    if is_low(eqn.params.get("preferred_element_type")):
        changed["preferred_element_type"] = _FULL
    return bind(eqn, values, **changed)


def runs_wide(eqn: JaxprEqn) -> bool:
    """Returns whether an operation is float32 already, or `widened` can run it so."""
    return eqn.primitive.name in _KNOWN or not any(
        is_low(getattr(atom.aval, "dtype", None)) for atom in (*eqn.invars, *eqn.outvars)
    )


def _mixed(eqn: JaxprEqn, dtypes: Sequence[Any]) -> bool:
    """Whether it was traced low and comes in float32 already."""
    recorded = [a.aval.dtype for a in eqn.invars if hasattr(a.aval, "dtype") and is_float(a.aval)]
    return list(dtypes) != recorded
