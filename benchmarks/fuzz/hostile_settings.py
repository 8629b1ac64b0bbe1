"""Settings and layouts made by hand: JSON files, safetensors, GGUF and our own weight files.

A title that begins with `fine` marks a file that a reader may also take.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import numpy as np

from benchmarks.fuzz import mutants
from tests.models.hf import cases

Files = dict[str, bytes]
_DEEP = (b"[" * 900, b"[" * 10**5, b'{"a":' * 10**5, b"[" * 500 + b"]" * 500, b'{"a":[' * 400)


def texts(good: bytes) -> Iterator[tuple[str, bytes]]:
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
        for t, x in texts(json.dumps({"w": one}).encode())
    }
    for length in (0, 1, 7, 100, 10**6, 2**31, 2**63, 2**64 - 1):
        found[f"length {length}"] = length.to_bytes(8, "little") + b"{}"
    for key, values in (
        (
            "shape",
            (
                *mutants.ODD,
                [-1],
                [None],
                [1.5],
                [True],
                ["2"],
                [2**63],
                [2**32, 2**32],
                [0, 2**62],
                [1] * 100,
                [4],
            ),
        ),
        (
            "data_offsets",
            (*mutants.ODD, [8, 0], [0, 2**64], [-8, 0], [0], [0, 8, 16], [4, 12], [0, 4], [1, 9]),
        ),
        ("dtype", (*mutants.ODD, "F8_E4M3", "C64", "F4", "f32", "I1")),
    ):
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
    found = dict(texts(good[name]))
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
        for title, data in texts(good[name])
        if not (name.startswith("1_") and title.startswith("is")) and not title.startswith("fine")
    }


def configs(good: Files) -> dict[str, Files]:
    """Returns hostile config.json: each field with each odd value."""
    page = json.loads(good["config.json"])
    found, deep = dict(texts(good["config.json"])), {}
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
            "config.json": json.dumps(layers).encode(),
            "model.safetensors": junk,
        }
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
    for key in (
        b"llama.block_count",
        b"llama.embedding_length",
        b"llama.attention.head_count",
        b"llama.attention.head_count_kv",
        b"llama.feed_forward_length",
    ):
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

    found = {
        f"page {t}": file(x.decode("utf-8", "replace"))
        for t, x in texts(json.dumps(page).encode())
        if t not in ("no UTF-8", "UTF-16", "fine half a pair")
    }
    for name, about in page["weights"].items():
        for key in about:
            values = (
                mutants.ODD
                if not key.startswith("array")
                else [
                    *mutants.ODD,
                    *([about[key][0], x] for x in (*mutants.ODD, [-1], [None], [2**62, 4])),
                    *(
                        [x, about[key][1]]
                        for x in (*mutants.ODD, "object", "S5", "datetime64", "float64", "int2")
                    ),
                ]
            )
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
