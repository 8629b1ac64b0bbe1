"""A tensor of a checkpoint file, and the safetensors files of a folder."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from mpjax.errors import ConfigError, brief, listed, need, printable
from mpjax.json_text import read_json
from mpjax.typing import DType, DTypeLike, Shape

# dtype in a safetensors header -> NumPy dtype. Scaled formats (such as F8_E4M3) are absent: they
# need scales, whose names differ between checkpoints.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read when asked for, and not kept.

    Args:
      shape: as stored.
      dtype: that `read` gives.
      read: returns the numbers.
    """

    shape: Shape
    dtype: DType
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def check_size(shape: Shape, dtype: DTypeLike) -> None:
    """Checks that the bytes of a shape fit int64, with empty axes counted as 1.

    Raises:
      ValueError: it may not.
    """
    if math.prod(n or 1 for n in shape) * np.dtype(dtype).itemsize >= 2**62:
        raise ValueError("a tensor of more bytes than can be counted")


def read_safetensors(path: Path) -> Tensors:
    """Returns the tensors of a safetensors file, memory-mapped.

    Raises:
      ConfigError: an unreadable or truncated file, or a dtype that is no plain number.
    """
    package = need("safetensors", "hub", str(path))
    try:
        file = package.safe_open(path, framework="np")
    except (OSError, package.SafetensorError) as error:
        raise ConfigError(
            f"{path}: not a whole safetensors file ({printable(str(error), 200)}); fetch it again"
        ) from None
    tensors = {}
    for name in file.keys():
        part = file.get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ConfigError(
                f"{path}: {name} has dtype {part.get_dtype()}; expected one of"
                f" {' '.join(_DTYPES)}; take the checkpoint before it was quantised"
            )
        shape = tuple(part.get_shape())  # safetensors compares it with the bytes, if it has any
        try:
            check_size(shape, dtype)
        except ValueError as error:
            raise ConfigError(f"{path}: {name} is {error}; fetch it again") from None
        tensors[name] = Tensor(shape, dtype, functools.partial(file.get_tensor, name))
    return tensors


def read_sharded(index: Path, read: Callable[[Path], Tensors]) -> Tensors:
    """Returns the tensors of the files that an index such as model.safetensors.index.json names.

    Args:
      index: the index.
      read: returns the tensors of one of its files.

    Raises:
      ConfigError: a file that is absent or outside the folder, or a tensor that is not in its file.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise ConfigError(f"{index}: no weight_map of tensor and file names; fetch it again")
    files = {}
    for file in sorted(set(names.values())):
        # An index must not name a file outside its folder.
        if Path(file).name != file or not file.isprintable():
            raise ConfigError(
                f"{index}: names the file {brief(file)}, which is not in its folder; fetch it again"
            )
        files[file] = read(index.parent / file)
    absent = [name for name, file in names.items() if name not in files[file]]
    if absent:
        raise ConfigError(
            f"{index}: {listed(absent)} not in the files that it names; fetch them again"
        )
    extra = [n for tensors in files.values() for n in tensors if n not in names]
    if extra:
        raise ConfigError(f"{index}: {listed(extra)} in the files but not in it; fetch it again")
    return {name: files[file][name] for name, file in names.items()}
