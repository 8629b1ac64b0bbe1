"""Writes what torch.save writes, without torch, in both of its formats; and what it never would."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
         "float64": "DoubleStorage", "int64": "LongStorage"}  # fmt: skip


class Name:
    """A global of another module, by name alone."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Never called; pickle asks for it."""


class Storage:
    def __init__(self, kind: str, key: str, count: int) -> None:
        self.kind, self.key, self.count = kind, key, count


class Call:
    """Pickled as a call of a global."""

    def __init__(self, function: Name, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class Writer(pickle._Pickler):  # type: ignore[name-defined, misc]
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return ("storage", Name("torch", obj.kind), obj.key, "cpu", obj.count)
        return None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Name):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)


def view(storage: Storage, offset: int, shape: Any, strides: Any) -> Call:
    """A tensor over a storage, as torch pickles it."""
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    hooks: OrderedDict[str, Any] = OrderedDict()
    return Call(rebuild, storage, offset, tuple(shape), tuple(strides), False, hooks)


def pickled(obj: Any) -> bytes:
    file = io.BytesIO()
    Writer(file, protocol=2).dump(obj)
    return file.getvalue()


def state(arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """The pickled state dict of arrays and the storages by key; a view of a transpose is kept."""
    tensors: OrderedDict[str, Any] = OrderedDict()
    storages = {}
    for key, (name, x) in enumerate(arrays.items()):
        flat = x.ravel(order="K")  # the order in memory, so that strides mean something
        storages[str(key)] = flat
        storage = Storage(KINDS[x.dtype.name], str(key), flat.size)
        strides = [s // x.itemsize for s in x.strides]
        tensors[name] = view(storage, 0, x.shape, strides)
    return tensors, storages


def save_zipped(path: Path, arrays: dict[str, np.ndarray], compression: int = 0) -> None:
    tensors, storages = state(arrays)
    write_zipped(path, pickled(tensors), storages, compression)


def write_zipped(
    path: Path, data: bytes, storages: dict[str, np.ndarray], compression: int = 0
) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, flat in storages.items():
            archive.writestr(f"archive/data/{key}", flat.tobytes())
        archive.writestr("archive/version", "3\n")


def save_older(path: Path, arrays: dict[str, np.ndarray]) -> None:
    tensors, storages = state(arrays)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickled(part) for part in (0x1950A86A20F9469CFC6C, 1001, system, tensors)]
    parts.append(pickled(list(storages)))
    for flat in storages.values():
        parts += [flat.size.to_bytes(8, "little"), flat.tobytes()]
    path.write_bytes(b"".join(parts))
