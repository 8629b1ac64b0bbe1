"""pytorch_model.bin: the same numbers as were saved, and no name that a state dict lacks is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models.hf.torch_file import read_torch
from tests.models.hf.torch_writer import (
    Call,
    Name,
    Storage,
    pickled,
    save_older,
    save_zipped,
    view,
    write_zipped,
)

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "turned": RNG.standard_normal((4, 6)).astype(np.float16).T,
    "b": RNG.standard_normal(7).astype(ml_dtypes.bfloat16),
    "one": np.array(3.5, np.float64),
    "none": np.zeros((0, 3), np.float32),
    "ids": np.arange(4).reshape(1, 4),
}
FORMATS = {"zip": save_zipped, "older": save_older}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_reads_what_was_saved(file: Path, save: Callable[..., None]) -> None:
    save(file, ARRAYS)
    tensors = read_torch(file)
    assert list(tensors) == list(ARRAYS)
    for name, x in ARRAYS.items():
        found = tensors[name].read()
        assert (tensors[name].shape, tensors[name].dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(found, x, strict=True)
        assert not x.size or not found.flags.writeable  # memory-mapped, not copied


def test_views_share_a_storage(file: Path) -> None:
    flat = np.arange(12, dtype=np.float32)
    storage = Storage("FloatStorage", "0", 12)
    tied = {"a": view(storage, 0, (3, 4), (4, 1)), "b": view(storage, 4, (2, 3), (4, 1)),
            "rows": view(storage, 0, (2, 4), (0, 1))}  # fmt: skip
    write_zipped(file, pickled(tied), {"0": flat})
    tensors = read_torch(file)
    np.testing.assert_array_equal(tensors["b"].read(), flat.reshape(3, 4)[1:, :3])
    np.testing.assert_array_equal(tensors["rows"].read(), np.stack([flat[:4]] * 2))


MARK = "ran"
HOSTILE: dict[str, Any] = {
    "os.system": Call(Name("os", "system"), f"touch {MARK}"),
    "posix.system": Call(Name("posix", "system"), f"touch {MARK}"),
    "eval": Call(Name("builtins", "eval"), f"open({MARK!r}, 'w')"),
    "open": Call(Name("io", "open"), MARK, "w"),
    "Popen": Call(Name("subprocess", "Popen"), ["touch", MARK]),
    "torch.load": Call(Name("torch", "load"), MARK),
    "dotted": Call(Name("collections", "OrderedDict.fromkeys.__self__"), []),
    "attribute": Call(Name("collections", "abc"), []),
    "ours": Call(Name("mpjax.models.hf.torch_file", "read_torch"), MARK),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("save", FORMATS, ids=FORMATS)
def test_a_hostile_pickle_runs_nothing(
    name: str, save: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    data = pickled({"weight": HOSTILE[name]})
    if save == "zip":
        write_zipped(file, data, {})
    else:
        file.write_bytes(data)  # its first pickle is read before anything tells what it is
    with pytest.raises(ConfigError, match=r"it names [\w.]+, which .* nothing in it was run"):
        read_torch(file)
    assert not Path(MARK).exists()


def test_the_hostile_pickle_would_have_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    pickle.loads(pickled(HOSTILE["open"])).close()
    assert Path(MARK).exists()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "opcodes",
    [
        REBUILD + b"}X\x01\x00\x00\x00xK\x01sb",  # BUILD: sets an attribute by __dict__
        REBUILD + b"N}X\x08\x00\x00\x00__call__K\x01s\x86b",  # and by setattr
        b"ctorch\nFloatStorage\nN}X\x06\x00\x00\x00_dtypeK\x01s\x86b",
        REBUILD + b"N}X\x09\x00\x00\x00__class__K\x01s\x86b",
    ],
)
def test_what_stands_for_torch_cannot_be_changed(opcodes: bytes, file: Path) -> None:
    write_zipped(file, b"\x80\x02}X\x01\x00\x00\x00w" + opcodes + b"s.", {})
    with pytest.raises(ConfigError, match="nothing in it was run"):
        read_torch(file)
    save_zipped(file, ARRAYS)
    assert len(read_torch(file)) == len(ARRAYS)


S = Storage("FloatStorage", "0", 6)
BROKEN = {
    "over the end": ({"w": view(S, 0, (2, 4), (4, 1))}, "reaches over the end"),
    "offset over the end": ({"w": view(S, 6, (1,), (1,))}, "reaches over the end"),
    "huge stride": ({"w": view(S, 0, (2,), (2**62,))}, "reaches over the end"),
    "negative": ({"w": view(S, 5, (2,), (-1,))}, "no view of a storage"),
    "other ranks": ({"w": view(S, 0, (2, 2), (1,))}, "nothing in it was run"),
    "no storage": ({"w": view([1.0], 0, (1,), (1,))}, "no view of a storage"),  # type: ignore[arg-type]
    "absent storage": (
        {"w": view(Storage("FloatStorage", "9", 6), 0, (6,), (1,))},
        "truncated: w lies behind its end",
    ),
    "larger storage": (
        {"w": view(Storage("FloatStorage", "0", 10**6), 0, (10**6,), (1,))},
        "truncated: w lies behind its end",
    ),
    "numbers": ({"step": 7}, "expected a dict of tensors by name"),
    "nested": ({"model": {"w": view(S, 0, (6,), (1,))}}, "save the state dict alone"),
    "a list": ([view(S, 0, (6,), (1,))], "save the state dict alone"),
    "unknown kind": ({"w": view(Storage("QInt8Storage", "0", 6), 0, (6,), (1,))}, "QInt8Storage"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_state_dict_is_refused(name: str, file: Path) -> None:
    content, message = BROKEN[name]
    write_zipped(file, pickled(content), {"0": np.zeros(6, np.float32)})
    with pytest.raises(ConfigError, match=message) as error:
        read_torch(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_compressed_and_foreign_archives_are_refused(file: Path) -> None:
    save_zipped(file, ARRAYS, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigError, match="compressed storages"):
        read_torch(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/readme", "x")
    with pytest.raises(ConfigError, match="without one data.pkl"):
        read_torch(file)
    with pytest.raises(ConfigError, match="no such file"):
        read_torch(file.with_name("absent.bin"))


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_cut_and_changed_files_are_refused_or_read(file: Path, save: Callable[..., None]) -> None:
    save(file, ARRAYS)
    whole = file.read_bytes()
    for end in range(0, len(whole) - 1, 41):
        file.write_bytes(whole[:end])
        with pytest.raises(ConfigError):
            read_torch(file)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(90):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] = rng.integers(256)
        file.write_bytes(changed)
        try:
            for tensor in read_torch(file).values():
                tensor.read().sum(dtype=np.float64)
        except ConfigError:
            refused += 1
    assert 9 < refused < 90  # others change a number or a name, which nothing can tell
