"""A pickled pandas DataFrame as plain arrays, read without pandas and without running anything."""

from __future__ import annotations

import io
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.errors import ConfigError


class _Frame:
    """Stands in for pandas.DataFrame: keeps what its state holds."""

    manager: tuple[list[Any], list[Any]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.manager = state["_mgr"]


def _new_index(kind: str, fields: dict[str, Any]) -> Any:
    if kind == "range":
        return np.arange(fields["start"], fields["stop"], fields["step"])
    return fields["data"]


# All that a frame of numbers and texts needs; whatever else a pickle names is refused.
_KNOWN: dict[tuple[str, str], Any] = {
    ("builtins", "slice"): slice,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): lambda kind, *rest: np.ndarray.__new__(kind, *rest),
    ("numpy.core.numeric", "_frombuffer"): (
        lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order)
    ),
    ("pandas._libs.internals", "_unpickle_block"): lambda values, where, ndim: (values, where),
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.indexes.base", "Index"): "index",
    ("pandas.core.indexes.base", "_new_Index"): _new_index,
    ("pandas.core.indexes.range", "RangeIndex"): "range",
    ("pandas.core.internals.managers", "BlockManager"): lambda blocks, axes: (blocks, axes),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of data needs")
        return _KNOWN[module, name]


def read_frame(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the columns of an xz-compressed, pickled DataFrame of numbers and texts.

    Args:
        path: what ``DataFrame.to_pickle(path, compression="xz")`` of pandas 1 and 2 writes.

    Returns:
        Column name -> array, shape (rows,).

    Raises:
        ConfigError: a file that is something else, or that names any other code.
    """
    path = Path(path)
    try:
        frame = _Unpickler(io.BytesIO(lzma.decompress(path.read_bytes()))).load()
        blocks, (names, _) = frame.manager
        columns = {}
        for values, where in blocks:
            where = np.arange(len(names))[where] if isinstance(where, slice) else where
            for place, row in zip(where, values, strict=True):
                columns[str(names[place])] = row
        return {str(name): columns[str(name)] for name in names}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); fetch it again") from None
    except Exception as error:  # bytes of anybody: whatever they do to the unpickler
        raise ConfigError(
            f"{path}: no pickled table of numbers and texts ({error}); nothing of it was run"
        ) from None
