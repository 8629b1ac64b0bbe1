"""Keys and values kept between calls: in which storage, and which rows.

Shapes: L layers, B batch, S slots, T new tokens, G key/value heads, K head width. A token has one
scale for each head, so that writing it touches no other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.formats import Scaling, is_quantized, quantize
from mpjax.models.core.storage import Storage


def cache_storage(value: Any) -> Storage:
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


def empty(shape: tuple[int, ...], storage: Storage, dtype: Any) -> Any:
    """Returns an empty cache as stored.

    Args:
      shape: (..., K).
      storage: a dtype gives an array, a Format a Quantized with tiles of one token and head.
      dtype: of the keys and values that will be written and read.
    """
    one = storage.shaped(jax.ShapeDtypeStruct((1, 1, 1, shape[-1]), dtype))
    return jax.tree.map(lambda a: jnp.zeros((*shape[:-1], a.shape[-1]), a.dtype), one)


def write(stored: Any, new_BTGK: Any, first: Any) -> Any:
    """Returns the keys or values of one layer with new ones at slots first .. first + T - 1.

    Args:
      stored: (B, S, G, K), an array or a Quantized.
      new_BTGK: what to write.
      first: number of the first slot; where the last slot is beyond S, what is written is NaN.

    Raises:
      ConfigError: more rows or tokens than it holds.
    """
    (B, T), (rows, slots) = new_BTGK.shape[:2], stored.shape[:2]
    if B != rows or T > slots:
        raise ConfigError(
            f"cache: {B} rows of {T} tokens do not fit into one of {rows} rows of {slots}; pass"
            f" init_cache({B}, length) with room for all tokens"
        )
    new_BTGK = jnp.where(first + T <= slots, new_BTGK, jnp.nan)  # it would land elsewhere
    new = new_BTGK.astype(stored.dtype)  # the storage that was asked for
    if is_quantized(stored):
        kind = "mx" if stored.scale_bits == 8 else "block"
        scaling, offset = Scaling(kind, 1, stored.tile[-1]), stored.offsets is not None
        new = quantize(new, stored.format, scaling, offset=offset)
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, first, 0, 0)), stored, new
    )


def read(stored: Any) -> Any:
    """Returns keys or values as attention takes them."""
    return stored.dequantize() if is_quantized(stored) else stored


def take_rows(state: Any, rows_B: Any) -> Any:
    """Returns a state whose rows are others' copies, as beams need when they change places.

    Args:
      state: of a model that decodes: the leaves of `layers` have their rows on axis 1, the other
        arrays on axis 0; numbers and amax histories are shared by all rows.
      rows_B: for each new row, the row to copy.
    """

    def take(name: str, part: Any) -> Any:
        axis = int(name == "layers")
        return jax.tree.map(lambda a: jnp.take(a, rows_B, axis=axis) if a.ndim else a, part)

    return {n: part if n == "amax" else take(n, part) for n, part in state.items()}
