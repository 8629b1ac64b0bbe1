"""Settings of generation: from Python, NumPy or JAX to plain values, static arguments of `jit`."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

from mpjax.errors import ConfigError, brief
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.kv_cache import cache_storage
from mpjax.typing import Array, DTypeLike, Key

# Numbers of Python, NumPy or JAX. `as_count` and `as_number` check them.
Count: TypeAlias = Any
Number: TypeAlias = Any
if TYPE_CHECKING:
    CacheStorage: TypeAlias = str | DTypeLike | Storage | None
    Ends: TypeAlias = int | np.integer | Array | Collection[Count] | None
    KeyLike: TypeAlias = Key | None
    Lengths: TypeAlias = Array | np.ndarray | Sequence[int] | None
    Prompt: TypeAlias = Array | np.ndarray
    Prompts: TypeAlias = Iterable[Array | np.ndarray | Sequence[int]]
else:  # At run time any value reaches the check that refuses it with a ConfigError.
    CacheStorage = Ends = KeyLike = Lengths = Prompt = Prompts = object


def as_count(value: Count, name: str) -> int:
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
    _check_untraced(value, name)
    try:
        if not isinstance(value, bool) and str(getattr(value, "dtype", "")) != "bool":
            return operator.index(value)
    except TypeError:
        pass
    raise ConfigError(f"{name}: {brief(value)}; give a whole number")


def as_number(value: object, name: str) -> float:
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
    _check_untraced(value, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.shape == ():
        # JAX's issubdtype: NumPy's does not count bfloat16 among the floating ones.
        if any(jax.dtypes.issubdtype(value.dtype, kind) for kind in (np.integer, np.floating)):
            return float(value)
    raise ConfigError(f"{name}: {brief(value)}; give a number")


def as_ends(value: Ends, vocabulary: int) -> tuple[int, ...]:
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
    if isinstance(value, np.ndarray | jax.Array) and value.ndim == 1:
        value = list(value)
    several = value if isinstance(value, list | tuple | Set | range) else (value,)
    try:
        ends = tuple(as_count(one, "end") for one in several)
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


def as_cache(value: CacheStorage) -> str | Storage:
    """Returns the storage of a cache; empty for the products' compute dtype.

    Args:
      value: None, text such as `int8`, a dtype, or a Storage.

    Raises:
      ConfigError: something else, or an unknown one.

    Example:
      >>> str(as_cache("int8")), str(as_cache(np.dtype("float32"))), as_cache(None)
      ('int8@row', 'f32', '')
    """
    if value is None or (isinstance(value, str) and not value):
        return ""
    return cache_storage(value)


def _check_untraced(value: object, name: str) -> None:
    if isinstance(value, jax.core.Tracer):
        raise ConfigError(
            f"{name}: a traced {value.aval.str_short()}; it must be known when the program is"
            " compiled, so give it from outside of jit"
        )
