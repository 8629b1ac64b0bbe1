"""Converts between a leaf of the parameter tree and the tensors of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Sharding

from mpjax.errors import ConfigError
from mpjax.models.hf.tensor_files import Tensors
from mpjax.models.hf.tensor_names import Weight
from mpjax.typing import Array, DType, DTypeLike, Shape

_ALIGNED = 64  # bytes; JAX on CPU uses an array of this alignment without a copy


def tensor_shape(shape: Shape, weight: Weight) -> Shape:
    """Returns the shape of the tensor, of one layer if stacked, that a leaf's shape asks for."""
    if weight.stacked:
        shape = shape[1:]
    shape = (*shape[:-1], shape[-1] * weight.part[1])
    return shape[::-1] if weight.transposed else shape


def filled(
    name: str,
    shape: Shape,
    dtype: DTypeLike,
    weight: Weight,
    tensors: Tensors,
    sharding: Sharding | None,
) -> Array:
    """Returns a leaf on its devices.

    Of the checkpoint one tensor is held at a time, of the leaf one shard.

    Args:
      name: our path, for errors.
      shape: of the leaf, with the layer axis.
      dtype: of the leaf.
      weight: its tensors.
      tensors: the checkpoint's.
      sharding: of the leaf; None is the default device.

    Raises:
      ConfigError: a finite number that overflows in dtype, or a tensor of NaN alone.
    """
    names = weight.names(shape[0])

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(shape)
        spans = [range(n)[cut] for n, cut in zip(shape, index, strict=True)]
        out = _empty(tuple(len(span) for span in spans), np.dtype(dtype))
        if not weight.stacked:
            _copy(name, names[0], weight, tensors, index, out)
            return out
        for row, layer in zip(out, spans[0], strict=True):
            _copy(name, names[layer], weight, tensors, index[1:], row)
        return out

    if sharding is None:
        return jax.device_put(shard(None))
    return jax.make_array_from_callback(shape, sharding, shard)


def _copy(
    leaf: str,
    name: str,
    weight: Weight,
    tensors: Tensors,
    index: tuple[slice, ...],
    out: np.ndarray,
) -> None:
    """Reads a tensor and copies a shard's part of it; the tensor is then freed."""
    x = tensors[name].read()
    if weight.transposed:
        x = x.T
    # The first number decides whether the rest is searched.
    if x.size and np.isnan(x.flat[0]) and np.isnan(x).all():
        raise ConfigError(f"{leaf}: {name} is NaN throughout; fetch the checkpoint again")
    i, n = weight.part
    width = x.shape[-1] // n
    x = x[..., i * width : (i + 1) * width][index]
    with np.errstate(over="ignore"):  # raised below, with the tensor's name
        np.copyto(out, x, casting="unsafe")  # to the dtype that the rule stores
    if np.isinf(out).any() and not np.isinf(x).any():
        raise ConfigError(
            f"{leaf}: {name} has numbers beyond the largest {out.dtype.name}; store it in float32"
            " or bfloat16"
        )


def _empty(shape: Shape, dtype: DType) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def joined(
    leaves: Sequence[Array], weights: Sequence[Weight], layer: int, dtype: DTypeLike
) -> np.ndarray:
    """Returns the tensor of one layer that leaves are the parts of; inverse of `filled`."""
    parts = []
    for leaf, weight in zip(leaves, weights, strict=True):
        x = np.asarray(leaf[layer] if weight.stacked else leaf)
        parts.append(x.T if weight.transposed else x)
    whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    with np.errstate(over="ignore"):  # raised below, with the tensor's name
        # to the dtype that the export asks for; row-major, as the file is
        out = np.ascontiguousarray(whole, dtype=dtype)
    if np.isinf(out).any() and not np.isinf(whole).any():
        name = weights[0].names(layer + 1)[layer]
        raise ConfigError(
            f"{name} has numbers beyond the largest {out.dtype.name}; export in float32 or bfloat16"
        )
    return out
