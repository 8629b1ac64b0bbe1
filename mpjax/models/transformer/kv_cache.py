"""The key/value cache: its storage, writing, reading and choosing rows.

Shapes: L layers, B batch, S slots, T new tokens, G key/value heads, K head width. Each head of a
token has its own scale, so that a write changes no other token.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.formats import Quantized, Scaling, quantize
from mpjax.models.core.storage import Storage
from mpjax.typing import Array, DTypeLike, ModelState, PyTree, Shape

Stored: TypeAlias = Array | Quantized
Cache: TypeAlias = tuple[Stored, ...]  # keys, values; of cross-attention too if there is any


def cache_storage(value: str | DTypeLike | Storage) -> Storage:
    """Reads the storage of a cache.

    Raises:
      ConfigError: unknown, or a scale that tokens would share.

    Example:
      >>> str(cache_storage("e4m3"))
      'e4m3@row'
    """
    storage = Storage.parse(value, "cache")
    s = storage.scaling
    if s is not None and (s.kind in ("tensor", "nv") or s.rows > 1):
        raise ConfigError(
            f"cache: {value!r} shares a scale between tokens, and each is written alone; write"
            f" {storage.format.name} or {storage.format.name}@32"
        )
    return storage


def empty(shape: Shape, storage: Storage, dtype: DTypeLike) -> Stored:
    """Returns an empty cache as stored.

    Args:
      shape: (..., K).
      storage: a dtype gives an array, a Format a Quantized with tiles of one token and head.
      dtype: of the keys and values that will be written and read.
    """
    one = storage.shaped(jax.ShapeDtypeStruct((1, 1, 1, shape[-1]), dtype))
    return jax.tree.map(lambda a: jnp.zeros((*shape[:-1], a.shape[-1]), a.dtype), one)


def write(stored: Stored, new_BTGK: Array, first: Array | int) -> Stored:
    """Returns the keys or values of one layer with new ones at slots first .. first + T - 1.

    Args:
      stored: (B, S, G, K), an array or a Quantized.
      new_BTGK: what to write.
      first: number of the first slot; if the last one is beyond S, NaN is written.

    Raises:
      ConfigError: more rows or tokens than it holds.
    """
    (B, T), (rows, slots) = new_BTGK.shape[:2], stored.shape[:2]
    if B != rows or T > slots:
        raise ConfigError(
            f"cache: {B} rows of {T} tokens do not fit into one of {rows} rows of {slots}; pass"
            f" init_cache({B}, length) with room for all tokens"
        )
    # dynamic_update_slice would clamp `first` and overwrite earlier slots.
    new_BTGK = jnp.where(first + T <= slots, new_BTGK, jnp.nan)
    new: Stored = new_BTGK.astype(stored.dtype)  # the storage that was asked for
    if isinstance(stored, Quantized):
        kind = "mx" if stored.scale_bits == 8 else "block"
        scaling, offset = Scaling(kind, 1, stored.tile[-1]), stored.offsets is not None
        new = quantize(new_BTGK.astype(stored.dtype), stored.format, scaling, offset=offset)
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, first, 0, 0)), stored, new
    )


def read(stored: Stored) -> Array:
    """Returns keys or values as attention takes them."""
    return stored.dequantize() if isinstance(stored, Quantized) else stored


def take_rows(state: ModelState, rows_B: Array) -> ModelState:
    """Returns a state with rows copied from others, as beam search reorders them.

    Args:
      state: rows are axis 1 of the leaves of `layers`, axis 0 of other arrays; numbers and amax
        histories are shared by all rows.
      rows_B: for each new row, the row to copy.
    """

    def take(name: str, part: PyTree) -> PyTree:
        axis = int(name == "layers")
        return jax.tree.map(lambda a: jnp.take(a, rows_B, axis=axis) if a.ndim else a, part)

    return {n: part if n == "amax" else take(n, part) for n, part in state.items()}
