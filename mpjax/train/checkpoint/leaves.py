"""A state as a flat table: tree path -> array, and what a checkpoint records of each leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.paths import leaves_with_names
from mpjax.train.checkpoint.replica_leaves import fits_other_replicas
from mpjax.typing import DType, DTypeLike, PyTree

Leaf: TypeAlias = jax.Array | jax.ShapeDtypeStruct

# Dtypes that the array store does not know, and the one that carries their bits exactly.
_CARRIERS = {"float8_e4m3": "uint8", "uint4": "uint8", "uint2": "uint8"}


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a pytree by their path, its components joined by `/`.

    Static data and empty nodes have no leaf and do not appear.

    Args:
      tree: any pytree; a bare array gets the name `value`.

    Raises:
      ConfigError: two leaves have the same path (a dict key that contains `/`).

    Example:
      >>> sorted(named_leaves({"params": {"w": 1.0}, "moments": [2.0, 3.0]}))
      ['moments/0', 'moments/1', 'params/w']
    """
    table: dict[str, Any] = {}
    for path, leaf in leaves_with_names(tree):
        name = path or "value"
        if name in table:
            raise ConfigError(
                f"{name}: two leaves of the state have this path; rename the key that holds a '/'"
            )
        table[name] = leaf
    return table


def describe(leaf: Leaf) -> str:
    """Returns a leaf's dtype and shape as text.

    Example:
      >>> describe(jax.ShapeDtypeStruct((3, 4), jnp.bfloat16))
      'bfloat16[3,4]'
    """
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def parse(text: str) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype that `describe` wrote; the inverse of `describe`."""
    dtype, _, shape = text.removesuffix("]").partition("[")
    return jax.ShapeDtypeStruct([int(size) for size in shape.split(",") if size], jnp.dtype(dtype))


def target(leaf: Leaf, dtype: DTypeLike | None = None) -> jax.ShapeDtypeStruct:
    """Returns what to read for a leaf: its shape, its dtype (or another) and its sharding.

    Args:
      leaf: an array or a `jax.ShapeDtypeStruct`; without a sharding it goes to the first device.
      dtype: the dtype to read instead of the leaf's.
    """
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)


def carrier(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding under which a leaf lies in the array store."""
    return target(leaf, _CARRIERS.get(str(leaf.dtype)))


def to_carrier(array: jax.Array) -> jax.Array:
    """Returns an array of the same bits in a dtype that the array store knows."""
    if str(array.dtype) not in _CARRIERS:
        return array
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(_CARRIERS[str(array.dtype)])  # a wider integer holds every value
    return jax.lax.bitcast_convert_type(array, _CARRIERS[str(array.dtype)])


def from_carrier(array: jax.Array, dtype: DType) -> jax.Array:
    """Returns the array that `to_carrier` took; the inverse of `to_carrier`."""
    if array.dtype == dtype:
        return array
    if jnp.issubdtype(dtype, jnp.integer):
        return array.astype(dtype)  # the values fit, they came from this dtype
    return jax.lax.bitcast_convert_type(array, dtype)


def require_arrays(table: Mapping[str, object]) -> None:
    """Raises a ConfigError that names the first leaf which is not a `jax.Array` of numbers."""
    if not table:
        raise ConfigError("state: holds no array; there is nothing to save")
    for name, leaf in table.items():
        if not isinstance(leaf, jax.Array):
            raise ConfigError(
                f"state {name}: expected a jax.Array, got {type(leaf).__name__}; "
                "make it one with an explicit dtype, or move it to the metadata"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ConfigError(
                f"state {name}: a typed key ({leaf.dtype}) cannot be saved; "
                "keep jax.random.key_data(key) in the state"
            )


def require_same(where: str, saved: Mapping[str, str], wanted: Mapping[str, Leaf]) -> None:
    """Compares what a checkpoint holds with what is asked for.

    Args:
      where: the checkpoint, for the error.
      saved: path -> what `describe` said at the save.
      wanted: path -> leaf of the target.

    Raises:
      ConfigError: a path is on one side only, or a dtype or shape differs.
    """
    differences = [
        f"{name} is {saved[name]} in the checkpoint, {describe(leaf)} here"
        for name, leaf in wanted.items()
        if name in saved
        and saved[name] != describe(leaf)
        and not fits_other_replicas(name, parse(saved[name]), leaf)
    ]
    differences += [f"{name} is only in the checkpoint" for name in saved if name not in wanted]
    differences += [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ConfigError(
            f"{where}: expected the saved state, but {'; '.join(differences[:4])}{more}; "
            "resume with the saved settings, or restore into another Precision explicitly"
        )
