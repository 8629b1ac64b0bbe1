"""Settings of generation, from Python, NumPy or JAX, as plain values that a program is kept for."""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

import jax
import numpy as np

from mpjax.errors import ConfigError, brief
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.kv_cache import cache_storage

# What a caller may give; the functions below say what it must be.
Count = Any  # a whole number of Python, NumPy or JAX
Number = Any  # a real one
Ends = Any  # a token, several or None
CacheStorage = Any  # text such as `int8`, a dtype, a Storage or None


def as_count(value: Any, name: str) -> int:
    """Returns a whole number.

    Args:
      value: an integer of Python, or an integer scalar of NumPy or JAX.
      name: of the setting.

    Raises:
      ConfigError: something else.

    Example:
      >>> as_count(np.int64(3), "new")
      3
    """
    plain = _untraced(value, name)
    if not isinstance(plain, bool) and str(getattr(plain, "dtype", "")) != "bool":
        try:
            return operator.index(plain)
        except TypeError:
            pass
    raise ConfigError(f"{name}: {brief(value)}; give a whole number")


def as_number(value: Any, name: str) -> float:
    """Returns a real number.

    Args:
      value: a number of Python, or a scalar of NumPy or JAX.
      name: of the setting.

    Raises:
      ConfigError: something else.

    Example:
      >>> as_number(np.float32(0.5), "temperature")
      0.5
    """
    plain = _untraced(value, name)
    if isinstance(plain, int | float) and not isinstance(plain, bool):
        return float(plain)
    if np.shape(plain) == () and getattr(plain, "dtype", None) is not None:
        kinds = (np.integer, np.floating)  # bfloat16 is one too, as JAX sees it
        if any(jax.dtypes.issubdtype(plain.dtype, kind) for kind in kinds):
            return float(plain)
    raise ConfigError(f"{name}: {brief(value)}; give a number")


def as_ends(value: Any, vocabulary: int) -> tuple[int, ...]:
    """Returns the tokens that end a text; empty where none does.

    Args:
      value: None, a token, or several.
      vocabulary: how many the model has.

    Raises:
      ConfigError: something else, or no token of the model.

    Example:
      >>> as_ends([2, 5], 8), as_ends(None, 8)
      ((2, 5), ())
    """
    if value is None:
        return ()
    shape = getattr(value, "shape", None)
    several = isinstance(value, list | tuple | Set | range) if shape is None else len(shape) == 1
    try:
        ends = tuple(as_count(one, "end") for one in (value if several else (value,)))
    except ConfigError:
        raise ConfigError(
            f"end: {brief(value)}; give the id of a token or a list of them, such as end=[2, 5]"
        ) from None
    for end in ends:
        if not 0 <= end < vocabulary:
            raise ConfigError(
                f"end: {end} is no token of the model; give one of 0..{vocabulary - 1}"
            )
    return tuple(dict.fromkeys(ends))


def as_cache(value: Any) -> str | Storage:
    """Returns the storage of a cache; empty where it is the products' compute dtype.

    Args:
      value: None, text such as `int8`, a dtype, or a Storage.

    Raises:
      ConfigError: something else, or an unknown one.

    Example:
      >>> str(as_cache("int8")), str(as_cache(np.dtype("float32"))), as_cache(None)
      ('int8@row', 'f32', '')
    """
    empty = value is None or (isinstance(value, str) and not value)
    return "" if empty else cache_storage(value)


def _untraced(value: Any, name: str) -> Any:
    if isinstance(value, jax.core.Tracer):
        raise ConfigError(
            f"{name}: a traced {value.aval.str_short()}; it must be known when the program is"
            " compiled, so give it from outside of jit"
        )
    return value
