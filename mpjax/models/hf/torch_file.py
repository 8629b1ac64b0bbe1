"""`pytorch_model.bin` without torch: memory-mapped storages, and a pickle that cannot run code.

Both formats of `torch.save` are read: a zip archive (since torch 1.6) and, before it, five pickles
followed by the storages.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from mpjax.errors import ConfigError
from mpjax.models.hf.tensors import Tensor, Tensors

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the older format
_PROTOCOL = 1001  # its second


class _Storage:
    """A storage that a pickle names: dtype, key and count; where it lies is known later."""

    __slots__ = ("count", "dtype", "key")

    def __init__(self, dtype: np.dtype, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count


class _View:
    """A tensor that a pickle rebuilds: a strided view of a storage."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> None:
        del rest  # requires_grad, hooks and metadata, which are not about numbers
        whole = [offset, *shape, *strides]
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in whole):
            raise pickle.UnpicklingError("a tensor that is no view of a storage")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.count:
            raise pickle.UnpicklingError("a tensor that reaches over the end of its storage")
        self.storage, self.offset = storage, offset
        self.shape, self.strides = tuple(shape), tuple(strides)


class _Kind:
    """Stands for torch's class of a storage; cannot be called or changed by a pickle."""

    __slots__ = ("_dtype",)
    _dtype: np.dtype

    def __init__(self, dtype: Any) -> None:
        object.__setattr__(self, "_dtype", np.dtype(dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"an attempt to set {name}")

    @property
    def dtype(self) -> np.dtype:
        return self._dtype


class _Rebuild:
    """Stands for torch's function that rebuilds a tensor; cannot be changed by a pickle."""

    __slots__ = ()

    def __call__(self, *args: Any) -> _View:
        return _View(*args)


class _Reader(pickle.Unpickler):
    """Unpickles storages, views of them, and containers; finds no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in _STORAGES:
            return _Kind(_STORAGES[name])
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a state dict does not need")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id that is no storage")
        _, kind, key, _, count = pid[:5]
        view = pid[5] if len(pid) > 5 else None
        if not isinstance(kind, _Kind) or type(count) is not int or count < 0 or view is not None:
            raise pickle.UnpicklingError("a storage of unknown kind")
        return _Storage(kind.dtype, str(key), count)


def read_torch(path: Path) -> Tensors:
    """Returns the tensors of a file that `torch.save(model.state_dict(), path)` wrote.

    No name outside torch's storages, `_rebuild_tensor_v2` and `OrderedDict` is ever looked up.

    Raises:
      ConfigError: a file that is absent or truncated, a pickle that names anything else, or one
        that holds no plain dict of tensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            state, offsets = _zipped(path) if zipped else _older(file, size)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a pytorch_model.bin") from None
    # A hostile or broken pickle raises anything: an IndexError at a mark that is not there, say.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{path}: not read, for it is no state dict of plain tensors ({reason}); nothing in"
            " it was run; take a safetensors file instead"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(view, _View) for name, view in state.items()
    ):
        raise ConfigError(
            f"{path}: expected a dict of tensors by name, as model.state_dict() gives; got other"
            " objects in it; save the state dict alone"
        )
    for name, view in state.items():
        nbytes = view.storage.count * view.storage.dtype.itemsize
        start = offsets.get(view.storage.key)
        if start is None or start + nbytes > size:
            raise ConfigError(f"{path}: truncated: {name} lies behind its end; fetch it again")
    return {
        name: Tensor(view.shape, view.storage.dtype, _mapped(path, view, offsets))
        for name, view in state.items()
    }


def _mapped(path: Path, view: _View, offsets: dict[str, int]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        storage = view.storage
        if 0 in view.shape:
            return np.zeros(view.shape, storage.dtype)
        start = offsets[storage.key]
        flat = np.memmap(path, storage.dtype, "r", start, (storage.count,))[view.offset :]
        steps = tuple(s * storage.dtype.itemsize for s in view.strides)
        return np.lib.stride_tricks.as_strided(flat, view.shape, steps, writeable=False)

    return read


def _zipped(path: Path) -> tuple[Any, dict[str, int]]:
    """The state dict, and the offset in the file of each storage."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("a zip archive without one data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise pickle.UnpicklingError("a big-endian machine's numbers")
        offsets = {}
        for name, info in entries.items():
            if name.startswith(f"{root}data/"):
                if info.compress_type != zipfile.ZIP_STORED:
                    raise pickle.UnpicklingError("compressed storages")
                file.seek(info.header_offset + 26)  # lengths of the local name and extra field
                lengths = np.frombuffer(file.read(4), "<u2")
                start = info.header_offset + 30 + int(lengths.sum())
                offsets[name.removeprefix(f"{root}data/")] = start
        return _Reader(io.BytesIO(archive.read(pickles[0]))).load(), offsets


def _older(file: IO[bytes], size: int) -> tuple[Any, dict[str, int]]:
    """The same of torch's format before zip archives."""
    if _Reader(file).load() != _MAGIC or _Reader(file).load() != _PROTOCOL:
        raise pickle.UnpicklingError("a pickle that torch.save did not write")
    system = _Reader(file).load()
    if not isinstance(system, dict) or not system.get("little_endian", False):
        raise pickle.UnpicklingError("a big-endian machine's numbers")
    reader = _Counted(file)
    state, keys = reader.load(), _Reader(file).load()
    offsets = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        storage = reader.storages.get(str(key))
        if storage is None or count != storage.count:
            raise pickle.UnpicklingError(f"storage {key} of another size than its tensors say")
        offsets[str(key)] = file.tell()
        file.seek(min(file.tell() + count * storage.dtype.itemsize, size), os.SEEK_SET)
    return state, offsets


class _Counted(_Reader):
    """Keeps the storages that it saw, by key: the older format has their sizes only here."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        storage = super().persistent_load(pid)
        return self.storages.setdefault(storage.key, storage)
