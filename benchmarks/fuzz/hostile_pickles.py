"""Pickles made by hand: torch files of both formats and pandas frames.

A title that begins with `fine` marks a file that a reader may also take.
"""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
from typing import Any

import numpy as np

from tests.models.hf.torch_writer import Call, Name, Storage, Writer, pickled, view

Files = dict[str, bytes]
_GLOBALS = (
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.open",
    "io.open",
    "builtins.getattr",
    "builtins.__import__",
    "subprocess.Popen",
    "pickle.loads",
    "torch.load",
    "collections.OrderedDict.fromkeys",
    "mpjax.models.hf.torch_file.read_torch",
    "numpy.load",
    "shutil.rmtree",
    "webbrowser.open",
    "functools.partial",
    "operator.attrgetter",
    "sys.exit",
)


def _opcodes() -> dict[str, bytes]:
    """Pickles that no pickler writes."""
    start = b"\x80\x02"
    found = {
        "empty": b"",
        "no stop": start + b"}",
        "only stop": start + b".",
        "two values": start + b"}}.",
        "a mark left": start + b"(}.",
        "no mark": start + b"t.",
        "nothing to set": start + b"s.",
        "set in a tuple": start + b"(K\x01K\x02)u.",
        "get before put": start + b"h\x05.",
        "text opcodes": b"(dp0\nS'a'\nI1\ns.",
        "int of 10^5 digits": b"I" + b"9" * 10**5 + b"\n.",
        "long of 5000 digits": b"L" + b"9" * 5000 + b"L\n.",
        "list as a key": start + b"}]K\x01s.",
        "frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
        "persistent id of text": b"Pwhat\n.",
        "inst": b"(ios\nsystem\n.",
        "obj": start + b"(cos\nsystem\no.",
        "extension": start + b"\x82\x01.",
        "buffer": b"\x80\x05\x97.",
        "set": b"\x80\x04\x8f.",
        "build on nothing": start + b"}b.",
        "build on a dict": start + b"}}X\x01\x00\x00\x00aK\x01sb.",
        "long1 of 255": start + b"\x8a\xff" + b"\xff" * 255 + b".",
        "million lists": start + b"]" * 10**6 + b".",
        "million marks": start + b"(" * 10**6 + b".",
        "million dicts": start + b"(" + b"}" * 90_000 + b"l.",
        "million memoised": b"\x80\x04]" + b"\x94" * 10**6 + b".",
        "pop": start + b"}0.",
        "dup": start + b"}2.",
        "deep tuples": start + b")" + b"\x85" * 10**6 + b".",
        "list in itself": start + b"]q\x00" + b"h\x00a" * 10**5 + b".",
    }
    for exponent in range(16, 32):
        found[f"memo 2^{exponent}"] = start + b"}r" + struct.pack("<I", 2**exponent) + b"."
    for code, width in (
        (b"X", 4),
        (b"T", 4),
        (b"B", 4),
        (b"\x8d", 8),
        (b"\x8e", 8),
        (b"\x8b", 4),
        (b"\x96", 8),
    ):
        for length in (2**20, 2**31 - 1, 2**62):
            if length < 256**width // 2:
                found[f"{code!r} of {length}"] = (
                    start + code + length.to_bytes(width, "little") + b"x."
                )
    doubled = (
        start + b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200))
    )
    found["2^200 leaves"] = doubled + b"."
    found["2^200 leaves as a key"] = start + b"}" + doubled[2:] + b"K\x01s."
    found["2^200 leaves as a storage"] = (
        start + b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + doubled[2:] + b"NK\x01tQ."
    )
    for name in _GLOBALS:
        module, _, attribute = name.rpartition(".")
        found[f"calls {name}"] = pickled({"w": Call(Name(module, attribute), "touch ran", "w")})
    return found


def _views() -> dict[str, Any]:
    """State dicts of tensors that do not fit the 6 numbers of storage 0."""
    s = Storage("FloatStorage", "0", 6)
    found: dict[str, Any] = {
        "many views": {f"w{i}": view(s, 0, (6,), (1,)) for i in range(1000)},
        "nested": {"model": {"w": view(s, 0, (6,), (1,))}},
        "a list": [view(s, 0, (6,), (1,))],
        "numbers": {"step": 7},
        "no storage": {"w": view([1.0], 0, (1,), (1,))},  # type: ignore[arg-type]
        "65 axes": {"w": view(s, 0, (1,) * 65, (1,) * 65)},
        "10^5 axes": {"w": view(s, 0, (1,) * 10**5, (0,) * 10**5)},
        "control name": {"\x1b[2J\x07": 1},
        "long name": {"n" * 500_000: 1},
        "float shape": {"w": view(s, 0, (1.5,), (1,))},
        "bool shape": {"w": view(s, 0, (True,), (1,))},
        "negative stride": {"w": view(s, 5, (6,), (-1,))},
        "other ranks": {"w": view(s, 0, (2, 3), (1,))},
        "other key": {"w": view(Storage("FloatStorage", "9", 6), 0, (6,), (1,))},
        "path as a key": {"w": view(Storage("FloatStorage", "../../etc/passwd", 6), 0, (6,), (1,))},
        "unknown storage": {"w": view(Storage("QInt8Storage", "0", 6), 0, (6,), (1,))},
        "two sizes": {
            "a": view(s, 0, (6,), (1,)),
            "b": view(Storage("FloatStorage", "0", 5), 0, (5,), (1,)),
        },
    }
    for n in (7, 10**6, 2**31, 2**40, 2**62, 2**64, 10**30):
        found[f"storage of {n}"] = {"w": view(Storage("FloatStorage", "0", n), 0, (n,), (1,))}
        found[f"stride 0, {n}"] = {"w": view(s, 0, (n,), (0,))}
        found[f"stride 0 twice, {n}"] = {"w": view(s, 0, (n, n), (0, 0))}
        found[f"offset {n}"] = {"w": view(s, n, (1,), (1,))}
        found[f"stride {n}"] = {"w": view(s, 0, (2,), (n,))}
        found[f"empty by {n}"] = {"w": view(s, 0, (0, n), (1, 1))}
    return found


def _zip(data: bytes, compression: int = 0, /, **more: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", np.zeros(6, np.float32).tobytes())
        for name, content in more.items():
            archive.writestr(name, content)
    return out.getvalue()


def torch_zips(good: Files) -> dict[str, Files]:
    """Returns hostile zip archives."""
    found = {f"opcodes: {title}": _zip(data) for title, data in _opcodes().items()}
    found |= {f"views: {title}": _zip(pickled(state)) for title, state in _views().items()}
    bomb = pickled({}) + b"\0" * 10**8
    for name, kind in (
        ("deflate", zipfile.ZIP_DEFLATED),
        ("bzip2", zipfile.ZIP_BZIP2),
        ("lzma", zipfile.ZIP_LZMA),
    ):
        found[f"{name} bomb"] = _zip(bomb, kind)
        found[f"{name} byteorder bomb"] = _zip(pickled({}), kind, **{"archive/byteorder": bomb})
    whole = _zip(pickled({"w": view(Storage("FloatStorage", "0", 6), 0, (6,), (1,))}))
    at = whole.rindex(
        b"PK\x01\x02"
    )  # the last entry of the directory: sizes at 20 and 24, place at 42
    for place in (20, 24, 42):
        for number in (0, 1, 2**16, 2**31, 2**32 - 1):
            new = bytearray(whole)
            new[at + place : at + place + 4] = struct.pack("<I", number)
            found[f"entry's {place}: {number}"] = bytes(new)
    found["empty archive"] = b"PK\x05\x06" + b"\0" * 18
    found["two pickles"] = _zip(pickled({}), **{"other/data.pkl": pickled({})})
    found["20,000 entries"] = _zip(
        pickled({"w": 1}), **{f"archive/data/{i}x": b"" for i in range(6000)}
    )
    found["big-endian"] = _zip(pickled({}), **{"archive/byteorder": b"big"})
    return {title: {"pytorch_model.bin": data} for title, data in found.items()}


def torch_older(good: Files) -> dict[str, Files]:
    """Returns hostile files of the older format: one of each pickle at each of their places."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickled(part) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    found = {f"first pickle: {title}": data for title, data in _opcodes().items()}
    found |= {f"state: {title}": b"".join(parts) + data for title, data in _opcodes().items()}
    flat = np.zeros(6, np.float32).tobytes()
    for title, state in _views().items():
        found[f"views: {title}"] = (
            b"".join(parts) + pickled(state) + pickled(["0"]) + struct.pack("<Q", 6) + flat
        )
    whole = {"w": view(Storage("FloatStorage", "0", 6), 0, (6,), (1,))}
    for keys in ([], ["1"], [0], [["0"]], "0", None, ["0"] * 1000, {"0": 1}):
        found[f"keys {str(keys)[:20]}"] = (
            b"".join(parts) + pickled(whole) + pickled(keys) + struct.pack("<Q", 6)
        )
    for count in (0, 7, 2**31, 2**63, 2**64 - 1):
        found[f"count {count}"] = (
            b"".join(parts) + pickled(whole) + pickled(["0"]) + struct.pack("<Q", count) + flat
        )
    return {title: {"pytorch_model.bin": data} for title, data in found.items()}


class _Built(Call):
    """Pickled as a call of a global whose result then takes a state."""

    def __init__(self, state: Any, function: Name, *args: Any) -> None:
        super().__init__(function, *args)
        self.state = state

    def __reduce__(self) -> Any:
        return self.function, self.args, self.state


def _array(data: Any, *shape: int) -> Any:
    dtype = _Built(
        (3, "|", None, None, None, -1, -1, 63), Name("numpy", "dtype"), "O8", False, True
    )
    rebuild = Name("numpy.core.multiarray", "_reconstruct")
    return _Built((1, shape, dtype, False, data), rebuild, Name("numpy", "ndarray"), (0,), b"b")


def _frame(blocks: Any, names: Any) -> bytes:
    base = "pandas.core.indexes."
    rows = Call(
        Name(f"{base}base", "_new_Index"),
        Name(f"{base}range", "RangeIndex"),
        {"name": None, "start": 0, "stop": 2, "step": 1},
    )
    manager = Call(Name("pandas.core.internals.managers", "BlockManager"), blocks, [names, rows])
    frame = _Built({"_mgr": manager, "_typ": "dataframe"}, Name("pandas.core.frame", "DataFrame"))
    file = io.BytesIO()
    Writer(file, protocol=4).dump(frame)
    return lzma.compress(file.getvalue())


def _block(array: Any, *places: int) -> Any:
    where = Call(Name("builtins", "slice"), *places)
    return Call(Name("pandas._libs.internals", "_unpickle_block"), array, where, 2)


def _index(array: Any) -> Any:
    base = "pandas.core.indexes.base"
    return Call(Name(base, "_new_Index"), Name(base, "Index"), {"data": array, "name": None})


def good_frame() -> Files:
    """Returns a DataFrame of two columns as pandas 2 pickles it."""
    block = _block(_array(["a", "b", "c", "d"], 2, 2), 0, 2, 1)
    return {"table.xz": _frame((block,), _index(_array(["text", "label"], 2)))}


def frames(good: Files) -> dict[str, Files]:
    """Returns hostile frames: pickles that are none, bombs, and arrays that say what is not so."""
    found: dict[str, Any] = {f"opcodes: {t}": lzma.compress(x) for t, x in _opcodes().items()}
    whole = lzma.decompress(good["table.xz"])
    found |= {f"bomb of {n}": lzma.compress(whole + b"\0" * n) for n in (10**7, 10**8)}
    found["big dictionary"] = lzma.compress(
        b"\0" * 100, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**29}]
    )
    found["cut"] = good["table.xz"][:-30]
    found["two streams"] = good["table.xz"][:-1] + good["table.xz"]
    found = {title: {"table.xz": data} for title, data in found.items()}
    names, cells = _index(_array(["text", "label"], 2)), _array(["a", "b", "c", "d"], 2, 2)
    base = "pandas.core.indexes."
    for n in (3, 10**6, 10**10, 2**63, 10**30):
        many = Call(
            Name(f"{base}base", "_new_Index"),
            Name(f"{base}range", "RangeIndex"),
            {"name": None, "start": 0, "stop": n, "step": 1},
        )
        for title, data in {
            "names": _frame((_block(cells, 0, 2, 1),), many),
            "rows": _frame((_block(_array(["a"] * 4, n, 2), 0, 2, 1),), names),
            "slice": _frame((_block(cells, 0, n, 1),), _index(_array(["text", "label", "n"], 3))),
            "step": _frame((_block(cells, 0, 2, n),), names),
            "bytes": _frame((_block(_array(b"abcd", n), 0, 2, 1),), names),
        }.items():
            found[f"{n} {title}"] = {"table.xz": data}
    for i, cell in enumerate(([], {}, (), [[1]], {"a": 1})):
        found[f"cell {i}"] = {
            "table.xz": _frame((_block(_array([cell] * 4, 2, 2), 0, 2, 1),), names)
        }
    for i, value in enumerate((None, 1, "x", [], {}, (), names)):
        found[f"blocks {i}"] = {"table.xz": _frame(value, names)}
        found[f"names {i}"] = {"table.xz": _frame((_block(cells, 0, 2, 1),), value)}
    del found["names 6"]
    return found
