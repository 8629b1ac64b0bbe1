"""Files made by hand to hang a reader, to fill the memory, to run something or to garble a terminal.

A title that begins with `fine` marks a file that a reader may also take.
"""

from __future__ import annotations

import io
import json
import lzma
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import fuzz_mutants as mutants
import numpy as np

from tests.models.hf import cases
from tests.models.hf.torch_writer import Call, Name, Storage, Writer, pickled, view

Files = dict[str, bytes]
_GLOBALS = (
    "os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.open", "io.open",
    "builtins.getattr", "builtins.__import__", "subprocess.Popen", "pickle.loads", "torch.load",
    "collections.OrderedDict.fromkeys", "mpjax.models.hf.torch_file.read_torch", "numpy.load",
    "shutil.rmtree", "webbrowser.open", "functools.partial", "operator.attrgetter", "sys.exit",
)  # fmt: skip
_DEEP = (b"[" * 900, b"[" * 10**5, b'{"a":' * 10**5, b"[" * 500 + b"]" * 500, b'{"a":[' * 400)


def _opcodes() -> dict[str, bytes]:
    """Pickles that no pickler writes."""
    start = b"\x80\x02"
    found = {
        "empty": b"", "no stop": start + b"}", "only stop": start + b".", "two values": start + b"}}.",
        "a mark left": start + b"(}.", "no mark": start + b"t.", "nothing to set": start + b"s.",
        "set in a tuple": start + b"(K\x01K\x02)u.", "get before put": start + b"h\x05.",
        "text opcodes": b"(dp0\nS'a'\nI1\ns.", "int of 10^5 digits": b"I" + b"9" * 10**5 + b"\n.",
        "long of 5000 digits": b"L" + b"9" * 5000 + b"L\n.", "list as a key": start + b"}]K\x01s.",
        "frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
        "persistent id of text": b"Pwhat\n.", "inst": b"(ios\nsystem\n.", "obj": start + b"(cos\nsystem\no.",
        "extension": start + b"\x82\x01.", "buffer": b"\x80\x05\x97.", "set": b"\x80\x04\x8f.",
        "build on nothing": start + b"}b.", "build on a dict": start + b"}}X\x01\x00\x00\x00aK\x01sb.",
        "long1 of 255": start + b"\x8a\xff" + b"\xff" * 255 + b".", "million lists": start + b"]" * 10**6 + b".",
        "million marks": start + b"(" * 10**6 + b".", "million dicts": start + b"(" + b"}" * 90_000 + b"l.",
        "million memoised": b"\x80\x04]" + b"\x94" * 10**6 + b".", "pop": start + b"}0.", "dup": start + b"}2.",
        "deep tuples": start + b")" + b"\x85" * 10**6 + b".",
        "list in itself": start + b"]q\x00" + b"h\x00a" * 10**5 + b".",
    }  # fmt: skip
    for exponent in range(16, 32):
        found[f"memo 2^{exponent}"] = start + b"}r" + struct.pack("<I", 2**exponent) + b"."
    for code, width in ((b"X", 4), (b"T", 4), (b"B", 4), (b"\x8d", 8), (b"\x8e", 8), (b"\x8b", 4),
                        (b"\x96", 8)):  # fmt: skip
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
        "nested": {"model": {"w": view(s, 0, (6,), (1,))}}, "a list": [view(s, 0, (6,), (1,))],
        "numbers": {"step": 7}, "no storage": {"w": view([1.0], 0, (1,), (1,))},  # type: ignore[arg-type]
        "65 axes": {"w": view(s, 0, (1,) * 65, (1,) * 65)}, "10^5 axes": {"w": view(s, 0, (1,) * 10**5, (0,) * 10**5)},
        "control name": {"\x1b[2J\x07": 1}, "long name": {"n" * 500_000: 1}, "float shape": {"w": view(s, 0, (1.5,), (1,))},
        "bool shape": {"w": view(s, 0, (True,), (1,))}, "negative stride": {"w": view(s, 5, (6,), (-1,))},
        "other ranks": {"w": view(s, 0, (2, 3), (1,))}, "other key": {"w": view(Storage("FloatStorage", "9", 6), 0, (6,), (1,))},
        "path as a key": {"w": view(Storage("FloatStorage", "../../etc/passwd", 6), 0, (6,), (1,))},
        "unknown storage": {"w": view(Storage("QInt8Storage", "0", 6), 0, (6,), (1,))},
        "two sizes": {"a": view(s, 0, (6,), (1,)), "b": view(Storage("FloatStorage", "0", 5), 0, (5,), (1,))},
    }  # fmt: skip
    for n in (7, 10**6, 2**31, 2**40, 2**62, 2**64, 10**30):
        found[f"storage of {n}"] = {"w": view(Storage("FloatStorage", "0", n), 0, (n,), (1,))}
        found[f"stride 0, {n}"] = {"w": view(s, 0, (n,), (0,))}
        found[f"stride 0 twice, {n}"] = {"w": view(s, 0, (n, n), (0, 0))}
        found[f"offset {n}"] = {"w": view(s, n, (1,), (1,))}
        found[f"stride {n}"] = {"w": view(s, 0, (2,), (n,))}
        found[f"empty by {n}"] = {"w": view(s, 0, (0, n), (1, 1))}
    return found


def _zip(data: bytes, compression: int = 0, **more: bytes) -> bytes:
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
        found[f"{name} bomb"] = _zip(bomb, kind)  # fmt: skip
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


def _texts(good: bytes) -> Iterator[tuple[str, bytes]]:
    """JSON that is none, or bent, whatever it is to say."""
    for number, deep in enumerate(_DEEP):
        yield f"deep {number}", deep
    yield "empty", b""
    yield "UTF-16", good.decode().encode("utf-16")
    yield "no UTF-8", b'{"a": "\xff"}'
    yield "fine half a pair", good.replace(b"{", b'{"\\ud800": 1, ', 1)
    yield "cut", good[: len(good) // 2]
    yield "two values", good + good
    yield "int of 10^5 digits", b'{"a": ' + b"9" * 10**5 + b"}"
    for value in (b"null", b"1", b'"x"', b"true", b"NaN", b"[]", b"[1]", b"[[]]"):
        yield f"is {value.decode()}", value
    yield "a key twice", b'{"a": 1, "a": 2}'
    yield (
        "10^5 keys, one twice",
        b'{"a": 1, "a": 2, ' + b", ".join(b'"%d": 1' % i for i in range(60_000)) + b"}",
    )


def tensors(good: Files) -> dict[str, Files]:
    """Returns hostile safetensors."""
    name, one = "model.safetensors", {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    found = {
        f"header {t}": mutants.safetensors(x, b"\0" * 8)
        for t, x in _texts(json.dumps({"w": one}).encode())
    }
    for length in (0, 1, 7, 100, 10**6, 2**31, 2**63, 2**64 - 1):
        found[f"length {length}"] = length.to_bytes(8, "little") + b"{}"
    for key, values in (
        ("shape", (*mutants.ODD, [-1], [None], [1.5], [True], ["2"], [2**63], [2**32, 2**32], [0, 2**62], [1] * 100, [4])),
        ("data_offsets", (*mutants.ODD, [8, 0], [0, 2**64], [-8, 0], [0], [0, 8, 16], [4, 12], [0, 4], [1, 9])),
        ("dtype", (*mutants.ODD, "F8_E4M3", "C64", "F4", "f32", "I1")),
    ):  # fmt: skip
        for i, value in enumerate(values):
            header = json.dumps({"w": one | {key: value}}).encode("utf-8", "surrogatepass")
            found[f"{key} {i} {str(value)[:20]}"] = mutants.safetensors(header, b"\0" * 8)
    several = {f"w{i}": one for i in range(5000)}
    found["5000 in one place"] = mutants.safetensors(json.dumps(several).encode(), b"\0" * 8)
    empty = {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(9000)}
    found["9000 empty"] = mutants.safetensors(json.dumps(empty).encode(), b"")
    found["control name"] = mutants.safetensors(
        json.dumps({"\x1b[2J\x07": one}).encode(), b"\0" * 8
    )
    found["long name"] = mutants.safetensors(json.dumps({"n" * 500_000: one}).encode(), b"\0" * 8)
    length = int.from_bytes(good[name][:8], "little")
    nan = np.full((len(good[name]) - 8 - length) // 4, np.nan, np.float32).tobytes()
    found["all NaN"] = good[name][: 8 + length] + nan
    found["fine half a pair"] = found.pop("header fine half a pair")
    return {title: {name: data} for title, data in found.items()}


def indices(good: Files) -> dict[str, Files]:
    """Returns hostile indices."""
    name = "model.safetensors.index.json"
    page = json.loads(good[name])
    found = dict(_texts(good[name]))
    for i, value in enumerate(mutants.ODD):
        found[f"weight_map {i}"] = json.dumps({"weight_map": value}).encode(
            "utf-8", "surrogatepass"
        )
        where = page["weight_map"] | {"more": value}
        found[f"a file {i}"] = json.dumps({"weight_map": where}).encode("utf-8", "surrogatepass")
    for i, file in enumerate(
        (
            "../a.safetensors",
            "/etc/passwd",
            "..",
            ".",
            "x/../a.safetensors",
            "a\0b",
            "\x1b[2J",
            "config.json",
            "n" * 10**5,
            "a.safetensors/",
            "~",
            "a.safetensors\n",
        )
    ):
        found[f"file {i} elsewhere"] = json.dumps(
            {"weight_map": dict.fromkeys(page["weight_map"], file)}
        ).encode()
    found["30,000 files"] = json.dumps(
        {"weight_map": {f"w{i}": f"f{i}" for i in range(30_000)}}
    ).encode()
    found["30,000 names"] = json.dumps(
        {"weight_map": dict.fromkeys(map(str, range(30_000)), "a.safetensors")}
    ).encode()
    return {title: {name: data} for title, data in found.items()}


def beside(good: Files) -> dict[str, Files]:
    """Returns hostile files beside the weights."""
    return {
        f"{name} {title}": {name: data}
        for name in ("generation_config.json", "1_Pooling/config.json")
        for title, data in _texts(good[name])
        if not (name.startswith("1_") and title.startswith("is")) and not title.startswith("fine")
    }


def configs(good: Files) -> dict[str, Files]:
    """Returns hostile config.json: each field with each odd value."""
    page = json.loads(good["config.json"])
    found, deep = dict(_texts(good["config.json"])), {}
    for key in page:
        for i, value in enumerate(mutants.ODD):
            if (
                value != page[key]
            ):  # an absent or null field has a default, and others mean the same
                found[f"fine {key} {i}"] = json.dumps(page | {key: value}).encode(
                    "utf-8", "surrogatepass"
                )
    for key in (
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
    ):
        for n in (0, -1, 10**5, 10**6, 2**31 - 1, 2**32 - 1, 10**12, 10**400):
            found[f"{key}={str(n)[:20]}"] = json.dumps(page | {key: n}).encode()
    many = {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(19_000)}
    junk = mutants.safetensors(json.dumps(many, separators=(",", ":")).encode(), b"")
    for kind in ("llama", "gpt2", "bert"):
        layers = cases.CONFIGS[kind] | {
            "n_layer" if kind == "gpt2" else "num_hidden_layers": 15_000
        }
        deep[f"{kind} of 15,000 layers"] = {
            "config.json": json.dumps(layers).encode(), "model.safetensors": junk,
        }  # fmt: skip
    found["200,000 fields"] = json.dumps(page | {f"f{i}\x1b": i for i in range(40_000)}).encode()
    found["a field of 500,000"] = json.dumps(page | {"f" * 500_000: 1}).encode()
    found["escapes"] = json.dumps(page | {"model_type": "\x1b]0;title\x07\u202e"}).encode()
    found["no width"] = json.dumps({k: v for k, v in page.items() if k != "hidden_size"}).encode()
    return {title: {"config.json": data} for title, data in found.items()} | deep


def _kv(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def ggufs(good: Files) -> dict[str, Files]:
    """Returns hostile GGUF files."""

    def head(tensors: int, fields: int, version: int = 3) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)

    found = {"empty": b"", "magic": b"GGUF", "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0)}
    for n in (1, 10**6, 2**31, 2**32 - 1, 2**63, 2**64 - 1):
        found[f"{n} fields"], found[f"{n} tensors"] = head(0, n), head(n, 0)
        found[f"version {n}"] = head(0, 0, n % 2**32)
        found[f"name of {n}"] = head(0, 1) + struct.pack("<Q", n) + b"x"
        found[f"text of {n}"] = head(0, 1) + _kv(b"a.b", 8, struct.pack("<Q", n))
        for kind in range(14):
            found[f"list {kind} of {n}"] = (
                head(0, 1) + _kv(b"a.b", 9, struct.pack("<IQ", kind, n)) + b"\1" * 40
            )
        axes = struct.pack("<Q", 1) + b"w" + struct.pack("<I", n % 2**32)
        found[f"{n} axes"] = head(1, 0) + axes + b"\1" * 64
        for shape in ((n,), (n, n), (n, 0), (n, n, n, n)):
            info = struct.pack("<QcI", 1, b"w", len(shape)) + struct.pack(
                f"<{len(shape)}QIQ", *shape, 0, 0
            )
            found[f"shape {shape}"] = head(1, 0) + info + b"\0" * 64
        info = struct.pack("<QcIQIQ", 1, b"w", 1, 1, 0, n)
        found[f"offset {n}"] = head(1, 0) + info + b"\0" * 64
        align = _kv(b"general.alignment", 4, struct.pack("<I", (n + 1) % 2**32))
        found[f"alignment {n}"] = head(1, 1) + align + info
    found["lists in lists"] = head(0, 1) + _kv(b"a.b", 9, struct.pack("<IQ", 9, 1) * 10**4)
    for kind in range(14, 60):
        found[f"type {kind}"] = (
            head(1, 0) + struct.pack("<QcIQIQ", 1, b"w", 1, 256, kind, 0) + b"\0" * 2000
        )
    found["control name"] = head(0, 1) + _kv(b"\x1b[2J\x07", 99, b"")
    found["no UTF-8"] = head(0, 1) + _kv(b"\xff\xfe", 0, b"\0")
    whole = good["model.gguf"]
    for key in (b"llama.block_count", b"llama.embedding_length", b"llama.attention.head_count",
                b"llama.attention.head_count_kv", b"llama.feed_forward_length"):  # fmt: skip
        at = whole.index(key) + len(key) + 4
        for n in (0, 3, 2**31, 2**32 - 1):
            found[f"{key.decode()}={n}"] = whole[:at] + struct.pack("<I", n) + whole[at + 4 :]
        found[f"{key.decode()} is a float"] = (
            whole[: at - 4] + struct.pack("<If", 6, 1.5) + whole[at + 4 :]
        )
        found[f"no {key.decode()}"] = whole.replace(key, key[:-1] + b"X", 1)
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    for kind in range(50):
        found[f"fine embedding of type {kind}"] = (
            whole[:at] + struct.pack("<I", kind) + whole[at + 4 :]
        )
    return {title: {"model.gguf": data} for title, data in found.items()}


def weights(good: Files) -> dict[str, Files]:
    """Returns hostile files of quantised weights."""
    data = good["w.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    page = json.loads(header["__metadata__"]["mpjax"])

    def file(new: str) -> Files:
        head = header | {"__metadata__": {"mpjax": new}}
        return {"w.safetensors": mutants.safetensors(json.dumps(head).encode(), body)}

    found = {f"page {t}": file(x.decode("utf-8", "replace")) for t, x in _texts(json.dumps(page).encode())
             if t not in ("no UTF-8", "UTF-16", "fine half a pair")}  # fmt: skip
    for name, about in page["weights"].items():
        for key in about:
            values = mutants.ODD if not key.startswith("array") else [
                *mutants.ODD, *([about[key][0], x] for x in (*mutants.ODD, [-1], [None], [2**62, 4])),
                *([x, about[key][1]] for x in (*mutants.ODD, "object", "S5", "datetime64", "float64", "int2")),
            ]  # fmt: skip
            for i, value in enumerate(values):
                if value == about[key]:
                    continue
                new = page["weights"] | {name: about | {key: value}}
                sign = "fine " if key in ("scale_bits", "dtype", "format") else ""
                found[f"{sign}{name} {key} {i}"] = file(json.dumps(page | {"weights": new}))
    leaf = page["weights"]["b"]
    for name in ("a/b", "a" + "/a" * 10**5, "\x1b[2J", "", "/", "b/c"):
        found[f"name {name[:5]!r}"] = file(
            json.dumps(page | {"weights": page["weights"] | {name: leaf}})
        )
    return found


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
    rows = Call(Name(f"{base}base", "_new_Index"), Name(f"{base}range", "RangeIndex"),
                {"name": None, "start": 0, "stop": 2, "step": 1})  # fmt: skip
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
        many = Call(Name(f"{base}base", "_new_Index"), Name(f"{base}range", "RangeIndex"),
                    {"name": None, "start": 0, "stop": n, "step": 1})  # fmt: skip
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


def lines(name: str) -> Callable[[Files], dict[str, Files]]:
    """Returns hostile JSON lines or JSON tables."""

    def hostile(good: Files) -> dict[str, Files]:
        found = dict(_texts(b'{"text": "a", "label": "b"}'))
        for title in ("two values", "is []"):
            del found[title]
        if name == "t.json":
            found = {
                f"{'fine ' if 'fine' in t else ''}list {t}": b"[" + x + b"]"
                for t, x in found.items()
                if t not in ("UTF-16",)
            } | found
        for i, value in enumerate(mutants.ODD):
            row = json.dumps({"text": value, "label": "b"}).encode("utf-8", "surrogatepass")
            found[f"{'fine ' if isinstance(value, str) else ''}text {i}"] = row
            found[f"fine label {i}"] = json.dumps({"text": "a", "label": value}).encode(
                "utf-8", "surrogatepass"
            )
        found["300,000 objects"] = (
            b"{}\n" * 300_000 if name == "t.jsonl" else b"[" + b"{}," * 300_000 + b"{}]"
        )
        return {title: {name: data} for title, data in found.items()}

    return hostile


def parquets(good: Files) -> dict[str, Files]:
    """Returns hostile parquet files: few bytes of many rows, of long texts, of other types."""
    import pyarrow
    from pyarrow import parquet

    def file(text: Any, label: Any, **options: Any) -> bytes:
        out = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": text, "label": label}), out, **options)
        return out.getvalue()

    found = {
        f"{n} equal rows": file(pyarrow.array(["a"] * n), pyarrow.array(["b"] * n))
        for n in (2 * 10**5, 10**6)
    }
    for kind in ("zstd", "gzip", "snappy", "brotli"):
        found[f"a text of 10^8 in {kind}"] = file(
            ["a" * 10**8, "b"], ["c", "d"], compression=kind, use_dictionary=False
        )
    for title, column in {"lists": [[1]], "structs": [{"a": 1}], "bytes": [b"\xff"], "times": [pyarrow.scalar(1)],
                          "nested": [[[[[1]]]]]}.items():  # fmt: skip
        found[title] = file(column, ["b"])
    for end in (0, 4, 8, 12, 100):
        found[f"cut at {end}"] = good["t.parquet"][:end]
    found["footer of 2^31"] = good["t.parquet"][:-8] + struct.pack("<I", 2**31) + b"PAR1"
    found["magic alone"] = b"PAR1PAR1"
    return {title: {"t.parquet": data} for title, data in found.items()}


def text_tables(good: Files) -> dict[str, Files]:
    """Returns hostile text tables."""
    found = {
        "a cell of 900,000": b"a" * 900_000, "quotes": b'"' * 10**6, "tabs": b"a" + b"\t" * 10**6, "NUL": b"a\tb\0",
        "lines": b"a" + b"\n" * 10**6, "one column": b"a\n" * 500_000, "fine rows": b"a\tb\nc\td\n" * 10**5,
        "UTF-16": "a\tb\n".encode("utf-16"), "no UTF-8": b"\xff\t\xfe", "carriage returns": b"\r" * 10**6 + b"a",
        "escapes": b"\x1b[2J\x07\tb\tc\n", "open quote": b'"a\tb\n' + b"c\td\n" * 10**5, "empty": b"", "blank": b"\n\n",
        "a header twice": b"text\tlabel\tlabel\na\tb\tc\n", "half a header": b"text\t\x1b[2J\na\tb\n",
        "fine wide header": b"text\tlabel" + b"\t\x1b[2Jx" * 10**5 + b"\na\tb" + b"\tc" * 10**5 + b"\n",
    }  # fmt: skip
    return {title: {"t.tsv": data} for title, data in found.items()}
