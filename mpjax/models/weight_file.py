"""Quantised weights in one file: safetensors with four bits in half a byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, need
from mpjax.files import write_file
from mpjax.formats import Format, Quantized, is_quantized

_KEY = "mpjax"
_VERSION = 1
_PARTS = ("values", "scales", "tensor_scale", "offsets")
_EXTRA = ("hub", "a file of weights")


def _bits(dtype: np.dtype) -> int:
    return {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2}.get(dtype.name, 0)


def pack(array: np.ndarray) -> np.ndarray:
    """Returns the bits of an array in a dtype that every reader of safetensors knows.

    Numbers of numpy's own dtypes stay; of bfloat16 and float8 the bytes; of four bits two to a
    byte, the first in the lower half.

    Example:
      >>> pack(np.asarray(jnp.array([1, -1, 7], jnp.int4))).tolist()
      [241, 7]
    """
    if array.dtype.isbuiltin == 1:
        return array
    bits = _bits(array.dtype)
    codes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if not bits:
        return codes
    per = 8 // bits
    groups = np.pad(codes & (2**bits - 1), (0, -codes.size % per)).reshape(-1, per)
    shifted = groups << (bits * np.arange(per, dtype=np.uint8))[None, :]
    return np.bitwise_or.reduce(shifted, axis=1)


def unpack(packed: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the array that `pack` took; the inverse of `pack`."""
    dtype = jnp.dtype(dtype)
    if packed.dtype == dtype:
        return packed
    bits = _bits(dtype)
    if bits:
        shifts = bits * np.arange(8 // bits, dtype=np.uint8)
        packed = (packed[:, None] >> shifts[None, :]).reshape(-1)[: int(np.prod(shape))]
        packed = packed & np.uint8(2**bits - 1)
        if np.dtype(dtype).name.startswith("int"):  # the sign is the top bit of a few
            signed = packed.astype(np.int8) << (8 - bits) >> (8 - bits)
            return signed.astype(dtype).reshape(shape)
    return packed.view(dtype).reshape(shape)


def save_weights(params: Any, path: str | Path) -> int:
    """Writes weights, quantised or not, to one file, whole or not at all.

    Args:
      params: a tree of dicts.
      path: of the file, such as `weights.safetensors`.

    Returns:
      Its size in bytes.

    Raises:
      ConfigError: safetensors is not installed, or the file cannot be written.

    Example:
      See `load_weights`.
    """
    numpy = need("safetensors.numpy", *_EXTRA)
    tensors: dict[str, np.ndarray] = {}
    about: dict[str, dict[str, Any]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        parts = {"": leaf}
        about[name] = {}
        if is_quantized(leaf):
            parts = {f"#{p}": a for p in _PARTS if (a := getattr(leaf, p)) is not None}
            about[name] = {
                "format": leaf.format.name, "tile": leaf.tile, "dtype": np.dtype(leaf.dtype).name,
                "scale_bits": leaf.scale_bits,
            }  # fmt: skip
        for part, array in parts.items():
            value = np.asarray(jax.device_get(array))
            about[name][f"array{part}"] = [value.dtype.name, value.shape]
            tensors[name + part] = pack(value)
    page = {_KEY: json.dumps({"version": _VERSION, "weights": about})}
    path = Path(path)
    content = numpy.save(tensors, page)
    try:
        write_file(path, lambda file: file.write(content))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from None
    return path.stat().st_size


def load_weights(path: str | Path) -> Any:
    """Returns the weights that `save_weights` wrote, bit for bit.

    Args:
      path: of the file.

    Raises:
      ConfigError: safetensors is not installed, there is no such file, or it is damaged or of
        another kind.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from mpjax.models import quantize_weights
      >>> small = quantize_weights({"up": {"kernel": jnp.ones((64, 4))}}, "int4@32")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     bytes = save_weights(small, f"{folder}/small.safetensors")
      ...     again = load_weights(f"{folder}/small.safetensors")
      >>> again["up"]["kernel"].values.dtype.name, again["up"]["kernel"].scales.shape
      ('int4', (2, 4))
    """
    safetensors = need("safetensors", *_EXTRA)
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give one that save_weights wrote")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            page = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            if page.get("version") != _VERSION:
                raise ConfigError(
                    f"{path}: not a file of save_weights, version {_VERSION}; read checkpoints of"
                    " others with mpjax.models.hf.load_checkpoint"
                )
            read = file.get_tensor
            return _tree({name: _leaf(name, a, read) for name, a in page["weights"].items()})
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).splitlines()[0][:100]
        raise ConfigError(f"{path}: damaged ({reason}); write it again") from None


def _leaf(name: str, about: dict[str, Any], read: Any) -> Any:
    def array(part: str) -> Any:
        dtype, shape = about[f"array{part}"]
        return jnp.asarray(unpack(read(name + part), dtype, tuple(shape)))

    if "format" not in about:
        return array("")
    parts = {p: array(f"#{p}") if f"array#{p}" in about else None for p in _PARTS}
    return Quantized(
        **parts, format=Format(about["format"]), tile=tuple(about["tile"]),
        dtype=jnp.dtype(about["dtype"]), scale_bits=about["scale_bits"],
    )  # fmt: skip


def _tree(leaves: dict[str, Any]) -> Any:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        at, keys = tree, name.split("/")
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = leaf
    return tree
