"""A pickled pandas DataFrame as plain arrays, read without pandas and without running anything."""

from __future__ import annotations

import io
import lzma
import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpjax.errors import ConfigError, printable
from mpjax.plain_pickle import Maker, read_pickle
from mpjax.typing import Json

_MOST_GROWN, _LEAST = 10, 2**20  # text unpacks to 3 or 4 times its size, numbers that repeat to 8
_MEMORY = 2**27  # of the decompressor; the largest preset of xz takes 65 MB
_DTYPE = re.compile("[iuf][1248]|b1|O8")


class _Frame:
    """Stands in for pandas.DataFrame: keeps what its state holds."""

    blocks: list[tuple[_Array, slice | _Array]]
    names: Sequence[str]


class _Array:
    """Stands in for numpy.ndarray, which a pickle makes empty and fills later."""

    values: np.ndarray

    def fill(self, shape: object, dtype: object, data: object, order: object) -> _Array:
        """Sets shape and numbers, or texts; there must be as many as the shape says."""
        if not isinstance(dtype, np.dtype) or not isinstance(shape, tuple) or len(shape) > 2:
            raise pickle.UnpicklingError("an array of unknown kind")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array without a shape")
        if dtype.kind == "O":
            if not isinstance(data, list) or len(data) != math.prod(shape):
                raise pickle.UnpicklingError("an array of another length than it says")
            if not all(isinstance(x, str | float | int | None) for x in data):
                raise pickle.UnpicklingError("a cell that is neither text nor number")
            flat = np.empty(len(data), object)
            flat[:] = data
        else:
            if not isinstance(data, bytes | bytearray):
                raise pickle.UnpicklingError("an array without its bytes")
            flat = np.frombuffer(data, dtype)
        self.values = flat.reshape(shape, order="F" if order in (True, "F") else "C")
        return self


def _dtype(kind: object, *flags: object) -> np.dtype:
    del flags  # whether to copy and align
    if not isinstance(kind, str) or not _DTYPE.fullmatch(kind):
        raise pickle.UnpicklingError("a dtype of neither numbers nor texts")
    return np.dtype(kind)


def _new_index(kind: object, fields: Json) -> range | np.ndarray:
    if kind == "range":
        return range(fields["start"], fields["stop"], fields["step"])
    return fields["data"].values


def _set_state(target: object, state: Json) -> None:
    if isinstance(target, np.dtype):
        if state[1] not in ("<", "|", "="):
            raise pickle.UnpicklingError("a big-endian machine's numbers")
    elif isinstance(target, _Array):
        _, *rest, data = state
        shape, dtype, order = rest
        target.fill(shape, dtype, data, order)
    elif isinstance(target, _Frame):
        target.blocks, (target.names, _) = state["_mgr"]
    else:
        raise pickle.UnpicklingError("an attempt to set the state of what has none")


# The names that a frame of numbers and texts needs; others are refused.
_KNOWN: dict[str, str | Maker] = {
    "builtins.slice": Maker(slice),
    "numpy.dtype": Maker(_dtype),
    "numpy.ndarray": "array",
    "numpy.core.multiarray._reconstruct": Maker(lambda kind, shape, code: _Array()),
    "numpy.core.numeric._frombuffer": Maker(
        lambda data, dtype, shape, order: _Array().fill(shape, dtype, data, order)
    ),
    "pandas._libs.internals._unpickle_block": Maker(lambda values, where, ndim: (values, where)),
    "pandas.core.frame.DataFrame": Maker(_Frame),
    "pandas.core.indexes.base.Index": "index",
    "pandas.core.indexes.base._new_Index": Maker(_new_index),
    "pandas.core.indexes.range.RangeIndex": "range",
    "pandas.core.internals.managers.BlockManager": Maker(lambda blocks, axes: (blocks, axes)),
}


def read_frame(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the columns of an xz-compressed, pickled DataFrame of numbers and texts.

    Args:
        path: what ``DataFrame.to_pickle(path, compression="xz")`` of pandas 1 and 2 writes.

    Returns:
        Column name -> array, shape (rows,).

    Raises:
        ConfigError: a file that is something else, that names any other code, or that unpacks to
            far more than texts do.
    """
    path = Path(path)
    try:
        file = io.BytesIO(_unpacked(path.read_bytes()))
        frame = read_pickle(file, _KNOWN, build=_set_state)
        found = [(array.values, where) for array, where in frame.blocks]
        if len(frame.names) != sum(len(values) for values, _ in found):
            raise ValueError("another number of names than of columns")
        columns = {}
        for values, where in found:
            places = np.arange(len(frame.names))[
                where if isinstance(where, slice) else where.values
            ]
            for place, row in zip(places, values, strict=True):
                columns[str(frame.names[place])] = row
        return {str(name): columns[str(name)] for name in frame.names}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); fetch it again") from None
    except Exception as error:  # a damaged file may raise anything
        raise ConfigError(
            f"{path}: no pickled table of numbers and texts ({printable(str(error), 200)}); nothing"
            " of it was run"
        ) from None


def _unpacked(data: bytes) -> bytes:
    most = _MOST_GROWN * len(data) + _LEAST
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
    unpacked = unpacker.decompress(data, max_length=most)
    if not unpacker.eof:
        raise ValueError(f"cut, or more than {most} bytes once unpacked")
    return unpacked
