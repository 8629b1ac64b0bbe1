"""Hostile torch files: refused in one line, before anything is allocated for what they say."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpjax.models.hf.torch_file import read_torch
from tests.bounds import refused
from tests.models.hf.torch_writer import (
    Call,
    Name,
    Storage,
    Writer,
    pickled,
    save_older,
    state,
    view,
    write_zipped,
)

START = b"\x80\x02"
S = Storage("FloatStorage", "0", 6)
DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(100))  # 2^100 leaves, shared
PICKLES = {
    "a memo of 2^30": (START + b"}r" + struct.pack("<I", 2**30) + b".", "memo 1073741824 behind 0"),
    "a memo that was never set": (START + b"h\x05.", "memo 5, which was never set"),
    "a hash that takes for ever": (START + b"}" + DOUBLED + b"K\x01s.", "a key of type tuple"),
    "the same in an OrderedDict": (
        START + b"ccollections\nOrderedDict\n]]" + DOUBLED + b"aK\x01aa\x85R.",
        "a dict whose keys are no text",
    ),
    "a storage by that name": (
        START + b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + DOUBLED + b"NK\x01tQ.",
        "a storage whose key is no text",
    ),
    "a text of 2 GB": (START + b"X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
    "a text of 2^62": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.", "expected 461168601"),
    "many marks": (START + b"(" * 200_000 + b".", "more values at once"),
    "many lists": (START + b"]" * 200_000 + b".", "more values at once"),
    "lists in each other": (START + b"]" + b"]a" * 210_000 + b".", "more than 200000 lists"),
    "an opcode of text": (b"(dp0\n.", "the opcode DICT"),
    "a copy": (START + b"}2.", "the opcode DUP"),
    "no operand": (START + b"s.", "without its operand"),
    "no mark": (START + b"t.", "without its mark"),
    "items of a tuple": (START + b")K\x01K\x02s.", "items of what is no dict"),
    "elements of a dict": (START + b"}K\x01a.", "elements of what is no list"),
    "an end in the middle": (START + b"}}.", "an end in the middle"),
    "a state of a dict": (START + b"}}X\x01\x00\x00\x00aK\x01sb.", "an attempt to set the state"),
    "no end": (START + b"}", "exhausted before seeing STOP"),
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
def test_pickles_that_no_pickler_writes(name: str, older: bool, tmp_path: Path) -> None:
    data, message = PICKLES[name]
    path = tmp_path / "pytorch_model.bin"
    if older:
        system = {"protocol_version": 1001, "little_endian": True}
        parts = [pickled(part) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
        path.write_bytes(b"".join(parts) + data)
    else:
        write_zipped(path, data, {"0": np.zeros(6, np.float32)})
    with refused(path, message):
        read_torch(path)


VIEWS: dict[str, tuple[Any, str]] = {
    "stride 0": ({"w": view(S, 0, (3 * 10**9,), (0,))}, "repeats its storage"),
    "both strides 0": ({"w": view(S, 0, (2**20, 2**20), (0, 0))}, "repeats its storage"),
    "100 views": (
        {f"w{i}": view(Storage("FloatStorage", "1", 10**4), 0, (10**4,), (1,)) for i in range(100)},
        "more than 4 times its bytes",
    ),
    "65 axes": ({"w": view(S, 0, (1,) * 65, (1,) * 65)}, "shape and strides do not match"),
    "a shape of a fraction": ({"w": view(S, 0, (1.5,), (1,))}, "no view of a storage"),
    "an empty one of 2^62": ({"w": view(S, 0, (0, 2**62), (1, 1))}, "more bytes than can be"),
    "a storage of two sizes": (
        {"a": view(S, 0, (6,), (1,)), "b": view(Storage("FloatStorage", "0", 5), 0, (5,), (1,))},
        "of two kinds or sizes",
    ),
    "a storage as long as the file": (
        {"w": view(Storage("FloatStorage", "0", 100), 0, (100,), (1,))}, "lies behind its end",
    ),
    "half a screen of escapes": ({"\x1b[2J": 1}, "expected a dict of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_tensors_that_their_storage_does_not_hold(name: str, tmp_path: Path) -> None:
    content, message = VIEWS[name]
    path = tmp_path / "pytorch_model.bin"
    write_zipped(path, pickled(content), {"0": np.zeros(6, np.float32), "1": np.zeros(10**4, "f4")})
    with refused(path, message):
        read_torch(path)


def test_archives_that_inflate(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_zipped(path, pickled({}) + b"\0" * 10**6, {}, kind)
        with refused(path, "compressed storages"):
            read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled({}))
        archive.writestr("archive/byteorder", b"\0" * 10**8, zipfile.ZIP_DEFLATED)
    with refused(path, "compressed storages"):
        read_torch(path)
    write_zipped(path, pickled({}), {"0": np.zeros(6, np.float32)})
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02")
    for place in (20, 24):  # both sizes of the first entry
        whole = whole[: at + place] + struct.pack("<I", 2**31) + whole[at + place + 4 :]
    path.write_bytes(whole)
    with refused(path, "behind the end of the file"):
        read_torch(path)


def test_what_torch_and_python_2_also_write_is_read(tmp_path: Path) -> None:
    path, x = tmp_path / "pytorch_model.bin", np.arange(6, dtype=np.float32)
    tensors, storages = state({"w": x, "far": x[::2] * 2})

    class Counted(OrderedDict[str, Any]):
        def __reduce__(self) -> Any:  # as a module's state dict: versions in an attribute
            versions = {"_metadata": OrderedDict({"": {"version": 1}})}
            return OrderedDict, (), versions, None, iter(self.items())

    older = io.BytesIO()
    writer = Writer(older, protocol=2)
    writer.memo[-1] = (0, None)  # Python 2 numbers what it memoises from 1
    items = [[name, tensor] for name, tensor in tensors.items()]
    writer.dump(Call(Name("collections", "OrderedDict"), items))
    newer = io.BytesIO()
    Writer(newer, protocol=4).dump(dict(tensors))
    for data in (pickled(Counted(tensors)), older.getvalue(), newer.getvalue()):
        write_zipped(path, data, storages)
        found = read_torch(path)
        np.testing.assert_array_equal(found["w"].read(), x)
        np.testing.assert_array_equal(found["far"].read(), x[::2] * 2)
    strange = {"w": view(S, 5, (1,), (2**62,))}  # of one number the stride means nothing
    write_zipped(path, pickled(strange), {"0": x})
    assert read_torch(path)["w"].read().tolist() == [5.0]


@pytest.mark.parametrize(
    ("count", "keys", "message"),
    [
        (2**63, ["0"], "another size"),
        (6, [["0"]], "another size"),
        (6, ["1"], "another size"),
        (6, None, "not iterable"),
    ],
)
def test_older_files_whose_storages_are_not_as_said(
    count: int, keys: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "pytorch_model.bin"
    save_older(path, {"w": np.zeros(6, np.float32)})
    whole = path.read_bytes()
    old = pickled(["0"])
    at = whole.rindex(old)
    new = pickled(keys) + struct.pack("<Q", count) + whole[at + len(old) + 8 :]
    path.write_bytes(whole[:at] + new)
    with refused(path, message):
        read_torch(path)
