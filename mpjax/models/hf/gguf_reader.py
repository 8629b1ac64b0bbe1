"""Reads the layout of a GGUF file; checks each count and length against the bytes that remain.

The reader of the package `gguf` trusts the counts of a file. Only the tensor types and their
decoders come from that package.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from mpjax.typing import Json, Shape

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Type of a value -> format character of struct.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_MOST_AXES = 4  # of a tensor of ggml
_ALIGNMENT = 32  # of tensors, by default


@dataclasses.dataclass(frozen=True)
class GgufField:
    """A setting: a number, a text, or a list of them; `contents` returns it."""

    value: Json | np.ndarray

    def contents(self) -> Json:
        """Returns the value as Python has it."""
        return self.value.tolist() if isinstance(self.value, np.ndarray) else self.value


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor: its blocks are not decoded yet.

    Args:
      shape: of its numbers, rows first, as NumPy has it.
      kind: `gguf.GGMLQuantizationType`.
      data: its bytes, (..., bytes of a row) uint8, memory-mapped.
    """

    shape: Shape
    kind: GGMLQuantizationType
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Settings and tensors of a file by name."""

    fields: dict[str, GgufField]
    tensors: dict[str, GgufTensor]


def read_layout(path: Path, package: ModuleType) -> GgufFile:
    """Returns what a GGUF file says it holds.

    Args:
      path: the file.
      package: `gguf`.

    Raises:
      ValueError: it is something else, damaged, or of another byte order.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if bytes(cursor.take(4)) != b"GGUF" or cursor.number("I") not in _VERSIONS:
        raise ValueError("no GGUF of version 2 or 3, little-endian")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, GgufField] = {}
    for _ in range(
        field_count
    ):  # each field takes bytes, so a false count fails at the end of the file
        name = cursor.text()
        if name in fields:
            raise ValueError(f"the setting {name} twice")
        fields[name] = GgufField(cursor.value(cursor.number("I")))
    infos: dict[str, tuple[Shape, GGMLQuantizationType, int]] = {}
    for _ in range(tensor_count):
        name, axes = cursor.text(), cursor.number("I")
        if name in infos or not 0 < axes <= _MOST_AXES:
            raise ValueError(f"the tensor {name} twice, or with {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        infos[name] = shape, package.GGMLQuantizationType(cursor.number("I")), cursor.number("Q")
    align = fields["general.alignment"].value if "general.alignment" in fields else _ALIGNMENT
    if type(align) is not int or align < 1 or align & (align - 1):
        raise ValueError("an alignment that is no power of two")
    begin = -(-cursor.at // align) * align
    return GgufFile(fields, _tensors(cursor.data, begin, infos, package.GGML_QUANT_SIZES))


def _tensors(
    data: mmap.mmap,
    begin: int,
    infos: dict[str, tuple[Shape, GGMLQuantizationType, int]],
    sizes: Mapping[GGMLQuantizationType, tuple[int, int]],
) -> dict[str, GgufTensor]:
    """Views of the tensors, which neither overlap nor pass the end of the file."""
    tensors, end, last = {}, begin, ""
    for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        block, nbytes = sizes[kind]
        if shape[-1] % block:
            raise ValueError(
                f"{name} has rows of {shape[-1]}, no multiple of its blocks of {block}"
            )
        row, rows, start = shape[-1] // block * nbytes, math.prod(shape[:-1]), begin + offset
        if start < end:
            raise ValueError(f"{name} lies over {last}")
        end, last = start + rows * row, name
        if end > len(data) or 0 in shape:
            raise ValueError(f"{name} of shape {shape} is empty or lies behind the file's end")
        stored = np.frombuffer(data, np.uint8, rows * row, start)
        tensors[name] = GgufTensor(shape, kind, stored.reshape(*shape[:-1], row))
    return {name: tensors[name] for name in infos}


class _Cursor:
    """A position in the file; refuses to read beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        """Returns the next bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes at {self.at}, of {len(self.data)} in the file")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Json:
        """Returns a number of struct's kind."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        """Returns a text behind its length."""
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Json | np.ndarray:
        """Returns a value of a type's number."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            if 8 * count > len(self.data) - self.at:
                raise ValueError(f"{count} texts, more than the file has bytes for")
            return [self.text() for _ in range(count)]
        if inner not in _SCALARS:  # the format allows nested lists; no published file has one
            raise ValueError(f"a list of type {inner}")
        dtype = np.dtype(f"<{_SCALARS[inner]}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)
