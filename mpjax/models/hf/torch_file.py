"""`pytorch_model.bin` without torch: memory-mapped storages, and a pickle that cannot run code.

Both formats of `torch.save` are read: a zip archive (since torch 1.6) and, before it, five pickles
followed by the storages. Nothing is allocated for what a file says before that is compared with the
file's size.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import pickle
import zipfile
from pathlib import Path
from typing import IO, cast

import ml_dtypes
import numpy as np

from mpjax.errors import ConfigError, printable
from mpjax.models.hf.tensor_files import Tensor, Tensors, check_size
from mpjax.plain_pickle import Maker, read_pickle
from mpjax.typing import DType, Json

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
_MOST_AXES = 64  # of an array of NumPy
# A state dict may hold a tensor under several names; more views of one storage would fill the
# memory when they are copied.
_MOST_SHARED = 4


class _Storage:
    """A storage that a pickle names: dtype, key and count; its offset is found later."""

    __slots__ = ("count", "dtype", "key")

    def __init__(self, dtype: DType, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


class _View:
    """A tensor of a pickle: a strided view inside a storage, and no larger than it."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(
        self, storage: object, offset: Json, shape: Json, strides: Json, *rest: object
    ) -> None:
        del rest  # requires_grad, hooks and metadata
        if not (type(shape) is type(strides) is tuple and len(shape) == len(strides) <= _MOST_AXES):
            raise pickle.UnpicklingError("a tensor whose shape and strides do not match")
        whole = [offset, *shape, *strides]
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in whole):
            raise pickle.UnpicklingError("a tensor that is no view of a storage")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.count:
            raise pickle.UnpicklingError("a tensor that reaches over the end of its storage")
        if math.prod(shape) > storage.count:
            raise pickle.UnpicklingError("a tensor that repeats its storage, as expand() gives")
        check_size(shape, storage.dtype)
        self.storage, self.offset, self.shape = storage, offset, shape
        # The stride of an axis of size 1 is unused and may exceed int64.
        self.strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


def _ordered(items: Json = ()) -> dict[str, object]:
    """An OrderedDict: empty, for its items follow, or of Python 2, with a list of them."""
    if not all(type(item) is list and len(item) == 2 and type(item[0]) is str for item in items):
        raise pickle.UnpicklingError("a dict whose keys are no text")
    return dict(items)


_NAMES: dict[str, DType | Maker] = {
    f"torch.{name}": np.dtype(kind) for name, kind in _STORAGES.items()
} | {
    "collections.OrderedDict": Maker(_ordered),
    "torch._utils._rebuild_tensor_v2": Maker(_View),
}


def _no_state(value: object, state: object) -> None:
    """Accepts and drops a state dict's `_metadata`, the versions of modules."""
    if not isinstance(value, dict) or not isinstance(state, dict) or set(state) != {"_metadata"}:
        raise pickle.UnpicklingError("an attempt to set the state of what has none")


class _Storages:
    """The storages that a pickle names, by key; a key names one."""

    def __init__(self) -> None:
        self.found: dict[str, _Storage] = {}

    def __call__(self, pid: object) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id that is no storage")
        _, dtype, key, _, count = pid[:5]
        part = pid[5] if len(pid) > 5 else None  # of another storage, which no longer exists
        counted = type(count) is int and count >= 0
        if not isinstance(dtype, np.dtype) or not counted or part is not None:
            raise pickle.UnpicklingError("a storage of unknown kind")
        if not isinstance(key, str):
            raise pickle.UnpicklingError("a storage whose key is no text")
        storage = self.found.setdefault(key, _Storage(dtype, key, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise pickle.UnpicklingError("a storage of two kinds or sizes")
        return storage


def read_torch(path: Path) -> Tensors:
    """Returns the tensors of a file that `torch.save(model.state_dict(), path)` wrote.

    No name outside torch's storages, `_rebuild_tensor_v2` and `OrderedDict` means anything here.

    Raises:
      ConfigError: a file that is absent or truncated, a pickle that names anything else, or one
        that holds no plain dict of tensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            state, places = _zipped(path, size) if zipped else _older(file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a pytorch_model.bin") from None
    # zipfile and pickletools raise errors of many types on a damaged or hostile file.
    except Exception as error:
        reason = printable(str(error), 200) or type(error).__name__
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
        start, nbytes = places.get(view.storage.key, (size, 0))
        if view.storage.nbytes > nbytes or start + nbytes > size:
            raise ConfigError(f"{path}: truncated: {name} lies behind its end; fetch it again")
    if sum(view.nbytes for view in state.values()) > _MOST_SHARED * size:
        raise ConfigError(
            f"{path}: its tensors have more than {_MOST_SHARED} times its bytes, for they share"
            " storages; save a copy of each, or a safetensors file"
        )
    return {
        name: Tensor(view.shape, view.storage.dtype, functools.partial(_mapped, path, view, places))
        for name, view in state.items()
    }


def _mapped(path: Path, view: _View, places: dict[str, tuple[int, int]]) -> np.ndarray:
    """The numbers of a tensor, memory-mapped."""
    storage = view.storage
    if 0 in view.shape:
        return np.zeros(view.shape, storage.dtype)
    start, _ = places[storage.key]
    flat = np.memmap(path, storage.dtype, "r", start, (storage.count,))[view.offset :]
    steps = tuple(s * storage.dtype.itemsize for s in view.strides)
    return np.lib.stride_tricks.as_strided(flat, view.shape, steps, writeable=False)


def _zipped(path: Path, size: int) -> tuple[object, dict[str, tuple[int, int]]]:
    """The state dict, and where in the file each storage begins and how many bytes it has."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("a zip archive without one data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        places = {name: _place(file, info, size) for name, info in entries.items()
                  if name.startswith(root)}  # fmt: skip
        order = f"{root}byteorder"
        if order in entries and archive.read(entries[order]) != b"little":
            raise pickle.UnpicklingError("a big-endian machine's numbers")
        data = archive.read(entries[pickles[0]])
    storages = _Storages()
    state = read_pickle(io.BytesIO(data), _NAMES, build=_no_state, persistent=storages)
    inner = f"{root}data/"
    return state, {n.removeprefix(inner): p for n, p in places.items() if n.startswith(inner)}


def _place(file: IO[bytes], info: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Where an entry lies, which `torch.save` stores as it is: its bytes are the file's own."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise pickle.UnpicklingError("compressed storages")
    file.seek(info.header_offset + 26)  # lengths of the local name and extra field
    lengths = np.frombuffer(file.read(4), "<u2")
    start = info.header_offset + 30 + int(lengths.sum())
    if start + info.file_size > size:
        raise pickle.UnpicklingError("an entry behind the end of the file")
    return start, info.file_size


def _older(file: IO[bytes]) -> tuple[object, dict[str, tuple[int, int]]]:
    """The same of torch's format before zip archives."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        storages = _Storages()
        # A read of the map beyond its end is short and allocates nothing.
        file = cast(IO[bytes], data)
        load = functools.partial(read_pickle, file, _NAMES, build=_no_state, persistent=storages)
        if load() != _MAGIC or load() != _PROTOCOL:
            raise pickle.UnpicklingError("a pickle that torch.save did not write")
        system = load()
        if not isinstance(system, dict) or not system.get("little_endian", False):
            raise pickle.UnpicklingError("a big-endian machine's numbers")
        state, keys = load(), load()
        places = {}
        for key in keys:
            count = int.from_bytes(data.read(8), "little")
            storage = storages.found.get(key) if isinstance(key, str) else None
            if storage is None or count != storage.count:
                raise pickle.UnpicklingError("a storage of another size than its tensors say")
            places[storage.key] = (data.tell(), storage.nbytes)
            data.seek(min(data.tell() + storage.nbytes, len(data)))
        return state, places
