"""Quantised weights in one file: safetensors with four bits in half a byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, brief, need, printable
from mpjax.files import write_bytes
from mpjax.formats import Format, Quantized
from mpjax.json_text import parse_json
from mpjax.models.core.checks import named_leaves
from mpjax.typing import Array, DTypeLike, Json, Params, PyTree, Shape

_KEY = "mpjax"
_VERSION = 1
_PARTS = ("values", "scales", "tensor_scale", "offsets")
_MOST_AXES, _MOST_PARTS = 32, 64  # of an array, and of a path: JAX walks a tree by recursion
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


def unpack(packed: np.ndarray, dtype: DTypeLike, shape: Shape) -> np.ndarray:
    """Returns the array that `pack` took; the inverse of `pack`."""
    dtype = jnp.dtype(dtype)
    if packed.dtype == dtype:
        return packed
    bits = _bits(dtype)
    if bits:
        shifts = bits * np.arange(8 // bits, dtype=np.uint8)
        packed = (packed[:, None] >> shifts[None, :]).reshape(-1)[: int(np.prod(shape))]
        packed = packed & np.uint8(2**bits - 1)
        if dtype.name.startswith("int"):  # sign extension
            signed = packed.astype(np.int8) << (8 - bits) >> (8 - bits)
            return signed.astype(dtype).reshape(shape)
    return packed.view(dtype).reshape(shape)


def save_weights(params: Params, path: str | Path) -> int:
    """Writes weights, quantised or not, to one file, atomically.

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
    about: dict[str, dict[str, Json]] = {}
    for name, leaf in named_leaves(params).items():
        parts = {"": leaf}
        about[name] = {}
        if isinstance(leaf, Quantized):
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
        write_bytes(path, content)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from None
    return path.stat().st_size


def load_weights(path: str | Path) -> Params:
    """Returns the weights that `save_weights` wrote, bit for bit.

    Args:
      path: of the file.

    Raises:
      ConfigError: safetensors is not installed, or the file is missing, damaged or another kind.

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
            page = parse_json((file.metadata() or {}).get(_KEY, "{}"), str(path), "write it again")
            if not isinstance(page, dict) or page.get("version") != _VERSION:
                raise ConfigError(
                    f"{path}: not a file of save_weights, version {_VERSION}; read checkpoints of"
                    " others with mpjax.models.hf.load_checkpoint"
                )
            weights = page.get("weights")
            if not isinstance(weights, dict):
                raise ValueError("it lists no weights")
            return _tree({name: _leaf(name, a, file.get_tensor) for name, a in weights.items()})
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = printable(str(error), 200)
        raise ConfigError(f"{path}: damaged ({reason}); write it again") from None


def _leaf(name: str, about: Json, read: Callable[[str], np.ndarray]) -> Array | Quantized:
    """One weight from its description, which is not trusted."""
    if not isinstance(about, dict):
        raise ValueError(f"{name} is described by {brief(about)}")

    def array(part: str) -> Array:
        described = about.get(f"array{part}")
        if not isinstance(described, list) or len(described) != 2:
            raise ValueError(f"{name}{part} is described by {brief(described)}")
        dtype, shape = described
        return jnp.asarray(_unpacked(read(name + part), dtype, shape, f"{name}{part}"))

    if "format" not in about:
        return array("")
    if lacking := {"tile", "dtype", "scale_bits", "array#values", "array#scales"} - set(about):
        raise ValueError(f"{name} has no {min(lacking)}")
    parts: dict[str, PyTree] = {
        p: array(f"#{p}") if f"array#{p}" in about else None for p in _PARTS
    }
    tile, bits = about["tile"], about["scale_bits"]
    shape = parts["values"].shape
    # A stack of layers, as `vmap` makes it, has the tiles of one layer.
    stack = len(shape) - len(tile) if _are_counts(tile, least=1) else -1
    if not 0 <= stack <= 1 or type(bits) is not int:
        raise ValueError(f"{name} has tiles {brief(tile)} and scales of {brief(bits)} bits")
    grid = (*shape[:stack], *(-(-n // t) for n, t in zip(shape[stack:], tile, strict=True)))
    for part in ("scales", "offsets"):
        if parts[part] is not None and parts[part].shape != grid:
            raise ValueError(f"{name} has {part} {parts[part].shape} for tiles {grid}")
    if not isinstance(about["format"], str):
        raise ValueError(f"{name} has the format {brief(about['format'])}")
    try:
        format = Format(about["format"])
    except ConfigError as error:
        raise ValueError(f"{name}: {error}") from None
    return Quantized(
        **parts, format=format, tile=tuple(tile),
        dtype=_dtype(about["dtype"], name), scale_bits=bits,
    )  # fmt: skip


def _unpacked(packed: np.ndarray, dtype: Json, shape: Json, name: str) -> np.ndarray:
    """`unpack`, after a check that an array of this dtype and shape is packed like this."""
    wanted = _dtype(dtype, name)
    if not _are_counts(shape, least=0):
        raise ValueError(f"{name} has shape {brief(shape)}")
    count, bits = math.prod(shape), _bits(wanted)
    length = -(-count * bits // 8) if bits else count * wanted.itemsize
    if wanted.isbuiltin == 1:
        whole = packed.dtype == wanted and packed.shape == tuple(shape)
    else:
        whole = packed.dtype == np.uint8 and packed.shape == (length,)
    if not whole:
        raise ValueError(
            f"{name} is stored as {packed.dtype} {packed.shape}, described as {wanted} {shape}"
        )
    return unpack(packed, wanted, tuple(shape))


def _are_counts(found: Json, least: int) -> bool:
    return isinstance(found, list) and len(found) <= _MOST_AXES and all(
        type(n) is int and least <= n < 2**63 for n in found
    )  # fmt: skip


def _dtype(found: Json, name: str) -> np.dtype:
    """The dtype of a name, of numbers or bool."""
    try:
        dtype = jnp.dtype(found if isinstance(found, str) else "")
    except TypeError:
        dtype = np.dtype(object)
    if not jnp.issubdtype(dtype, jnp.number) and dtype != np.bool_:
        raise ValueError(f"{name} has dtype {brief(found)}")
    return dtype


def _tree(leaves: dict[str, Array | Quantized]) -> PyTree:
    tree: dict[str, PyTree] = {}
    for name, leaf in leaves.items():
        at, keys = tree, name.split("/")
        if len(keys) > _MOST_PARTS:
            raise ValueError(f"the name {brief(name)} has {len(keys)} parts")
        for key in keys[:-1]:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                raise ValueError(f"{name} lies inside another weight")
        if keys[-1] in at:
            raise ValueError(f"{name} has other weights inside")
        at[keys[-1]] = leaf
    return tree
